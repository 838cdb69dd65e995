"""Linux's native asynchronous input and output, for files open with O_DIRECT (io_submit(2)).

A request costs no thread: its iocb goes to the kernel, completions are announced by an eventfd,
and one task takes all of them at once. Every request carries RWF_NOWAIT, so that io_submit never
blocks the loop: what the kernel cannot begin at once (a block to be allocated, a full queue, a
lock that is taken) it gives back, and a thread does it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from struct import Struct

import trio

# Requests in the kernel at once; more of them wait.
DEPTH = 64
# Longer requests are left to threads, where copying them holds up nobody; beside such a transfer
# the way to a thread and back is short.
MAX_LENGTH = 128 << 10

_IOCB_CMD_PREAD = 0
_IOCB_CMD_PWRITE = 1
_IOCB_FLAG_RESFD = 1

# linux/aio_abi.h, little-endian: data, key, rw_flags, opcode, priority, descriptor, buffer,
# length, offset, reserved, flags, eventfd
_IOCB = Struct("<QIiHhIQQqQII")
_EVENT = Struct("<QQqq")  # data, iocb, result, second result

# io_setup, io_destroy, io_getevents, io_submit
_GENERIC = (0, 1, 4, 2)
_NUMBERS = {
    "x86_64": (206, 207, 208, 209),
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
    "loongarch64": _GENERIC,
}
_known = sys.maxsize > 1 << 32 and platform.machine() in _NUMBERS
_SETUP, _DESTROY, _GETEVENTS, _SUBMIT = _NUMBERS[platform.machine()] if _known else (-1, -1, -1, -1)

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long,) * 6
_syscall.restype = ctypes.c_long


def _call(number: int, *arguments: int) -> int:
    """Raises OSError."""
    while True:
        result = int(_syscall(number, *arguments, *(0,) * (5 - len(arguments))))
        if result >= 0:
            return result
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _not_yet(_: object) -> trio.lowlevel.Abort:
    """The kernel may still use the buffer: a cancelled request waits for its end."""
    return trio.lowlevel.Abort.FAILED


class AioQueue:
    """The requests of one file. Each has a slot: an iocb, an aligned buffer, the task that waits.

    Offsets are multiples of `alignment`. Raises OSError where the system or the file system cannot
    do it: ENOSYS, EAGAIN (too many queues), EOPNOTSUPP (it cannot promise not to block).
    """

    def __init__(self, fd: int, alignment: int) -> None:
        """Blocks, as close() does."""
        self._fd = fd
        self._alignment = alignment
        # Pages that were never used take no memory, and the slot last free is the next in use.
        memory = mmap.mmap(-1, DEPTH * MAX_LENGTH)
        self._memory = memoryview(memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._iocbs = ctypes.create_string_buffer(DEPTH * _IOCB.size)
        self._pointers = (ctypes.c_ulong * DEPTH)()  # to those that are handed over
        self._events = ctypes.create_string_buffer(DEPTH * _EVENT.size)
        self._tasks: list[trio.lowlevel.Task | None] = [None] * DEPTH
        self._results = [0] * DEPTH
        self._free = list(range(DEPTH))
        self._waiting = trio.lowlevel.ParkingLot()  # for a free slot
        self._queued: list[int] = []
        self._in_kernel = 0
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._context = self._set_up()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._probe()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _set_up() -> int:
        context = ctypes.c_ulong()
        _call(_SETUP, DEPTH, ctypes.addressof(context))
        return context.value

    def _probe(self) -> None:
        """Read the first block, so that a refusal is met now."""
        self._prepare(0, _IOCB_CMD_PREAD, 0, self._alignment, 0)
        self._pointers[0] = ctypes.addressof(self._iocbs)
        _call(_SUBMIT, self._context, 1, ctypes.addressof(self._pointers))
        _call(_GETEVENTS, self._context, 1, 1, ctypes.addressof(self._events))
        os.eventfd_read(self._eventfd)

    def start(self) -> None:
        """Begin to take completions; stop() ends it."""
        trio.lowlevel.spawn_system_task(self._serve, name="completions of a direct file")

    async def stop(self) -> None:
        """No request is in flight, and none follows."""
        self._scope.cancel()
        await self._stopped.wait()

    def close(self) -> None:
        # The kernel waits here until no processor looks at the queue any more: milliseconds.
        _call(_DESTROY, self._context)
        os.close(self._eventfd)

    # --- requests ---------------------------------------------------------------------------

    async def read(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer`. False: nothing was done, a thread must do it. Raises OSError."""
        length = len(buffer)
        whole = -(-length // self._alignment) * self._alignment
        if whole > MAX_LENGTH:
            return False
        slot = await self._take()
        try:
            got = await self._transfer(slot, _IOCB_CMD_PREAD, offset, whole, 0)
            if got < length:
                return False  # the file ends here, or the kernel stopped early
            start = slot * MAX_LENGTH
            buffer[:] = self._memory[start : start + length]
            return True
        finally:
            self._give_back(slot)

    async def write(self, offset: int, data: memoryview, flags: int = 0) -> bool:
        """Write all of `data`; `flags` are pwritev2's. False: a thread must do it, all of it.
        Raises OSError."""
        length = len(data)
        if length > MAX_LENGTH or length % self._alignment:
            return False
        slot = await self._take()
        try:
            start = slot * MAX_LENGTH
            self._memory[start : start + length] = data
            return await self._transfer(slot, _IOCB_CMD_PWRITE, offset, length, flags) == length
        finally:
            self._give_back(slot)

    async def _take(self) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._free:
            await self._waiting.park()
        return self._free.pop()

    def _give_back(self, slot: int) -> None:
        self._free.append(slot)
        self._waiting.unpark()

    async def _transfer(self, slot: int, command: int, offset: int, length: int, flags: int) -> int:
        """Bytes transferred; 0 where the kernel could not begin at once."""
        self._prepare(slot, command, offset, length, flags)
        self._tasks[slot] = trio.lowlevel.current_task()
        self._queued.append(slot)
        if not self._in_kernel:
            self._submit()
        elif len(self._queued) == 1:
            # Others are likely to follow in this turn of the loop: they go together in the next.
            os.eventfd_write(self._eventfd, 1)
        if self._tasks[slot] is not None:
            await trio.lowlevel.wait_task_rescheduled(_not_yet)
        result = self._results[slot]
        if result >= 0:
            return result
        if result == -errno.EAGAIN:
            return 0
        raise OSError(-result, os.strerror(-result))

    def _prepare(self, slot: int, command: int, offset: int, length: int, flags: int) -> None:
        _IOCB.pack_into(
            self._iocbs, slot * _IOCB.size,
            slot, 0, flags | os.RWF_NOWAIT, command, 0, self._fd,
            self._address + slot * MAX_LENGTH, length, offset, 0, _IOCB_FLAG_RESFD, self._eventfd,
        )  # fmt: skip

    # --- the kernel's side ------------------------------------------------------------------

    def _submit(self) -> None:
        """Hand over what is queued. What is refused ends with that error."""
        queued, self._queued = self._queued, []
        iocbs = ctypes.addressof(self._iocbs)
        for number, slot in enumerate(queued):
            self._pointers[number] = iocbs + slot * _IOCB.size
        done = 0
        while done < len(queued):
            pointers = ctypes.addressof(self._pointers) + done * 8
            try:
                count = _call(_SUBMIT, self._context, len(queued) - done, pointers)
            except OSError as error:
                # It is about the first of them.
                self._finish(queued[done], -(error.errno or errno.EIO))
                done += 1
            else:
                done += count
                self._in_kernel += count

    def _finish(self, slot: int, result: int) -> None:
        task, self._tasks[slot] = self._tasks[slot], None
        self._results[slot] = result
        # A task whose own call was refused is not asleep yet.
        if task is not None and task is not trio.lowlevel.current_task():
            trio.lowlevel.reschedule(task)

    async def _serve(self) -> None:
        try:
            with self._scope:
                while True:
                    await trio.lowlevel.wait_readable(self._eventfd)
                    os.eventfd_read(self._eventfd)
                    if self._queued:
                        self._submit()
                    self._take_completions()
        finally:
            self._stopped.set()

    def _take_completions(self) -> None:
        count = _call(_GETEVENTS, self._context, 0, DEPTH, ctypes.addressof(self._events))
        self._in_kernel -= count
        events = memoryview(self._events)[: count * _EVENT.size]
        for slot, _, result, _ in _EVENT.iter_unpack(events):
            self._finish(slot, result)
