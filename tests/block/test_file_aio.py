"""Direct files without threads: the kernel's asynchronous input and output."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from drivers.block.graph import Graph
from drivers.block.node import OpenFlags
from drivers.catalog import Catalog
from drivers.errors import RequestError
from drivers.protocol.file import aio
from drivers.protocol.file.aio import DEPTH, MAX_LENGTH, AioQueue
from drivers.protocol.file.driver import FileNode
from drivers.testing.contract import pattern
from drivers.testing.model import contents

BLOCK = 4096
COUNT = 3 * DEPTH


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.write(fd, pattern(COUNT * BLOCK))
    # Where pages are in the cache, the kernel gives direct writes back to us.
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return path


@asynccontextmanager
async def opened(path: Path, flags: OpenFlags | None = None) -> AsyncIterator[FileNode]:
    node = await Graph(Catalog()).open(
        {"driver": "file", "filename": str(path)}, flags or OpenFlags(direct=True)
    )
    assert isinstance(node, FileNode)
    yield node
    await node.aclose()


def queue_of(node: FileNode) -> AioQueue:
    if node._aio is None:
        pytest.skip("this system, or its file system, has no asynchronous input and output")
    return node._aio


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the system calls made."""
    made: list[int] = []
    real = aio._syscall

    def recorded(number: int, *arguments: int) -> int:
        made.append(number)
        return int(real(number, *arguments))

    monkeypatch.setattr(aio, "_syscall", recorded)
    return made


class Held:
    """Keeps the completions of a queue back, as a slow disk would."""

    def __init__(self, queue: AioQueue) -> None:
        self._queue = queue
        self._take = queue._take_completions
        queue._take_completions = lambda: None  # type: ignore[method-assign]

    def release(self) -> None:
        self._queue._take_completions = self._take  # type: ignore[method-assign]
        os.eventfd_write(self._queue._eventfd, 1)


# --- requests -----------------------------------------------------------------------------------


async def test_many_requests_go_together_and_without_a_thread(
    disk: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pattern(COUNT * BLOCK, seed=1)
    found = bytearray(COUNT * BLOCK)
    async with opened(disk) as node:
        queue_of(node)
        run = node._run
        threads: list[object] = []

        async def counted(function: Callable[[], object]) -> object:
            threads.append(function)
            return await run(function)

        del calls[:]
        with monkeypatch.context() as patched:
            patched.setattr(node, "_run", counted)
            async with trio.open_nursery() as nursery:
                for at in range(0, COUNT * BLOCK, BLOCK):
                    nursery.start_soon(node.write, at, content[at : at + BLOCK])
            async with trio.open_nursery() as nursery:
                for at in range(0, COUNT * BLOCK, BLOCK):
                    nursery.start_soon(node.read_into, at, memoryview(found)[at : at + BLOCK])
        assert found == content
        # Some file systems give a write back when the file's time must be changed.
        assert len(threads) <= COUNT // 4
        # Far fewer calls than requests: the first goes alone, as many as there are slots together.
        assert 2 <= calls.count(aio._SUBMIT) <= COUNT // 2
    assert disk.read_bytes() == content


async def test_what_is_too_long_or_unaligned_goes_to_a_thread(disk: Path) -> None:
    content = bytearray(pattern(COUNT * BLOCK))  # reading the file would take it into the cache
    async with opened(disk) as node:
        queue = queue_of(node)
        assert not await queue.read(0, memoryview(bytearray(MAX_LENGTH + 1)))
        assert not await queue.write(0, memoryview(bytes(MAX_LENGTH + BLOCK)))
        assert not await queue.write(0, memoryview(b"x" * 100))
        content[:MAX_LENGTH] = pattern(MAX_LENGTH, seed=2)
        assert await queue.write(0, memoryview(content)[:MAX_LENGTH])
        found = bytearray(MAX_LENGTH - 100)
        assert await queue.read(0, memoryview(found))
        assert found == content[: MAX_LENGTH - 100]
    assert disk.read_bytes() == content


async def test_what_the_kernel_gives_back_is_done_by_a_thread(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(disk.read_bytes())
    async with opened(disk) as node:
        queue = queue_of(node)
        finish = queue._finish
        monkeypatch.setattr(queue, "_finish", lambda slot, result: finish(slot, -errno.EAGAIN))
        content[BLOCK : 2 * BLOCK] = pattern(BLOCK, seed=3)
        await node.write(BLOCK, content[BLOCK : 2 * BLOCK])
        assert await contents(node) == content

        def half(slot: int, result: int) -> None:
            queue._memory[slot * MAX_LENGTH :][512:BLOCK] = bytes(BLOCK - 512)
            finish(slot, 512)

        monkeypatch.setattr(queue, "_finish", half)
        content[:BLOCK] = pattern(BLOCK, seed=4)
        await node.write(0, content[:BLOCK])
        found = bytearray(BLOCK)
        await node.read_into(0, found)
        assert found == content[:BLOCK]
    assert disk.read_bytes() == content


async def test_a_write_into_a_hole_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    path = tmp_path / "hole.img"
    with path.open("wb") as file:
        file.truncate(COUNT * BLOCK)
    content = pattern(COUNT * BLOCK)
    async with opened(path) as node, trio.open_nursery() as nursery:
        for at in range(0, COUNT * BLOCK, BLOCK):
            nursery.start_soon(node.write, at, content[at : at + BLOCK])
    assert path.read_bytes() == content


# --- cancelling and closing ---------------------------------------------------------------------


async def test_a_cancelled_request_keeps_its_buffer_until_the_kernel_is_done(disk: Path) -> None:
    content = disk.read_bytes()
    async with opened(disk) as node:
        queue = queue_of(node)
        held = Held(queue)
        found, other = bytearray(BLOCK), bytearray(BLOCK)
        ended: list[str] = []

        async def read(name: str, offset: int, buffer: bytearray, scope: trio.CancelScope) -> None:
            with scope:
                await node.read_into(offset, buffer)
                ended.append(name)

        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "cancelled", 0, found, scope)
            await trio.testing.wait_all_tasks_blocked()
            (busy,) = set(range(DEPTH)) - set(queue._free)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read, "other", BLOCK, other, trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
            assert ended == []
            assert busy not in queue._free
            assert len(queue._free) == DEPTH - 2
            held.release()
        assert sorted(ended) == ["cancelled", "other"]
        assert found == content[:BLOCK]
        assert other == content[BLOCK : 2 * BLOCK]
        assert len(queue._free) == DEPTH


async def test_a_request_that_waits_for_a_slot_can_be_cancelled(disk: Path) -> None:
    async with opened(disk) as node:
        queue = queue_of(node)
        held = Held(queue)
        async with trio.open_nursery() as nursery:
            for at in range(DEPTH):
                nursery.start_soon(node.read_into, at * BLOCK, bytearray(BLOCK))
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0) as scope:
                await node.read_into(0, bytearray(BLOCK))
            assert scope.cancelled_caught
            held.release()
        with trio.move_on_after(0) as scope:
            await node.read_into(0, bytearray(BLOCK))
        assert scope.cancelled_caught  # although there is room again
        assert await contents(node) == disk.read_bytes()


async def test_closing_waits_for_what_is_in_flight(disk: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    content = disk.read_bytes()
    found = bytearray(BLOCK)
    async with opened(disk) as node:
        held = Held(queue_of(node))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.read_into, BLOCK, found)
            nursery.start_soon(node.write, 0, b"n" * BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(node.aclose)
            await trio.testing.wait_all_tasks_blocked()
            assert not node.closed
            held.release()
        assert node.closed
        assert found == content[BLOCK : 2 * BLOCK]
        with pytest.raises(RequestError, match="closed"):
            await node.read_into(0, found)
    assert disk.read_bytes()[:BLOCK] == b"n" * BLOCK
    assert len(os.listdir("/proc/self/fd")) == before


# --- errors -------------------------------------------------------------------------------------


async def test_each_refused_request_of_a_batch_has_its_own_error(disk: Path) -> None:
    content = disk.read_bytes()
    async with opened(disk) as node:
        queue = queue_of(node)
        real, queue._fd = queue._fd, os.open(disk, os.O_RDONLY | os.O_DIRECT)
        errors: list[int | None] = []

        async def write(offset: int) -> None:
            with pytest.raises(OSError, match="Bad file descriptor") as caught:
                await node.write(offset, b"x" * BLOCK)
            errors.append(caught.value.errno)

        try:
            found = bytearray(8 * BLOCK)
            async with trio.open_nursery() as nursery:
                for at in range(0, 8 * BLOCK, BLOCK):
                    nursery.start_soon(write, at)
                    nursery.start_soon(node.read_into, at, memoryview(found)[at : at + BLOCK])
            assert errors == [errno.EBADF] * 8
            assert found == content[: 8 * BLOCK]
        finally:
            os.close(queue._fd)
            queue._fd = real
        await node.write(0, b"x" * BLOCK)
    assert disk.read_bytes()[:BLOCK] == b"x" * BLOCK


async def test_a_failed_write_is_reported_with_its_error(disk: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with opened(disk) as node:
        queue_of(node)
        resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                await node.write(2 * BLOCK, b"x" * BLOCK)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert caught.value.errno == errno.EFBIG
        await node.write(2 * BLOCK, b"y" * BLOCK)
    assert disk.read_bytes()[2 * BLOCK : 3 * BLOCK] == b"y" * BLOCK


@pytest.mark.parametrize(
    ("call", "number"), [("_SETUP", errno.ENOSYS), ("_SETUP", errno.EAGAIN), ("_SUBMIT", errno.EOPNOTSUPP)]
)
async def test_where_the_system_cannot_do_it_threads_do(
    disk: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    real = aio._syscall
    open_queues = 0

    def failing(system_call: int, *arguments: int) -> int:
        nonlocal open_queues
        if system_call == getattr(aio, call):
            ctypes.set_errno(number)
            return -1
        open_queues += (system_call == aio._SETUP) - (system_call == aio._DESTROY)
        return int(real(system_call, *arguments))

    monkeypatch.setattr(aio, "_syscall", failing)
    before = len(os.listdir("/proc/self/fd"))
    content = bytearray(disk.read_bytes())
    async with opened(disk) as node:
        assert node._aio is None
        assert open_queues == 0
        content[BLOCK : 2 * BLOCK] = b"x" * BLOCK
        await node.write(BLOCK, b"x" * BLOCK, fua=True)
        assert await contents(node) == content
    assert disk.read_bytes() == content
    assert len(os.listdir("/proc/self/fd")) == before


# --- durable writes -----------------------------------------------------------------------------


class Recorder:
    """The flags of each request of a queue, and how often fdatasync was called."""

    def __init__(self, queue: AioQueue, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flags: list[int] = []
        self.syncs = 0
        prepare, fdatasync = queue._prepare, os.fdatasync

        def recorded_prepare(slot: int, command: int, offset: int, length: int, flags: int) -> None:
            self.flags.append(flags)
            prepare(slot, command, offset, length, flags)

        def recorded_sync(fd: int) -> None:
            self.syncs += 1
            fdatasync(fd)

        monkeypatch.setattr(queue, "_prepare", recorded_prepare)
        monkeypatch.setattr(os, "fdatasync", recorded_sync)


async def test_a_durable_write_is_one_request(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(disk) as node:
        recorder = Recorder(queue_of(node), monkeypatch)
        await node.write(0, b"d" * BLOCK, fua=True)
        await node.write(BLOCK, b"e" * BLOCK)
        assert recorder.flags == [os.RWF_DSYNC, 0]
        assert recorder.syncs == 0
    assert disk.read_bytes()[: 2 * BLOCK] == b"d" * BLOCK + b"e" * BLOCK


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
async def test_a_file_system_without_durable_writes_is_synced_after_them(
    disk: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    async with opened(disk) as node:
        queue = queue_of(node)
        recorder = Recorder(queue, monkeypatch)
        finish: Callable[[int, int], None] = queue._finish

        def refused(slot: int, result: int) -> None:
            finish(slot, -number if recorder.flags[-1] & os.RWF_DSYNC else result)

        monkeypatch.setattr(queue, "_finish", refused)
        await node.write(0, b"d" * BLOCK, fua=True)
        await node.write(0, b"e" * BLOCK, fua=True)
        assert recorder.flags == [os.RWF_DSYNC, 0, 0]
        assert recorder.syncs == 2
    assert disk.read_bytes()[:BLOCK] == b"e" * BLOCK


async def test_after_a_failed_durable_write_flushing_fails_for_good(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await Graph(Catalog()).open({"driver": "file", "filename": str(disk)}, OpenFlags(direct=True))
    assert isinstance(node, FileNode)
    queue = queue_of(node)
    finish: Any = queue._finish
    with monkeypatch.context() as patched:
        patched.setattr(queue, "_finish", lambda slot, result: finish(slot, -errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            await node.write(0, b"x" * BLOCK, fua=True)
    for operation in (node.flush, node.aclose):
        with pytest.raises(OSError, match="Input/output error"):
            await operation()
