"""One connection to an NBD server: many requests in flight, each awaited by its own task.

A request that is cancelled while its reply is awaited costs nothing but the reply, which is
received into nowhere; the caller's buffer is not touched any more. A request that is cancelled
while it is being sent gets SEND_GRACE seconds to leave completely; if it cannot, the stream is out
of step, and the connection and everything in flight on it are lost.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Sequence
from typing import TypeVar

import trio

from drivers.errors import OptionError, ProtocolError, RequestError
from drivers.net.address import Address
from drivers.net.stream import Buffer, Stream
from drivers.wire.nbd import messages
from drivers.wire.nbd.client_handshake import Export, ReplyMode, Wishes, open_export
from drivers.wire.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    TransmissionFlag,
)
from drivers.wire.nbd.replies import Fill, Request, decode_replies
from drivers.wire.nbd.steps import Handshake, Receive, Send

T = TypeVar("T")

SEND_GRACE = 1.0  # seconds
DISCONNECT_GRACE = 1.0  # seconds for NBD_CMD_DISC to go out

# Replies are received into this much at once, payloads beyond it straight to where they belong.
_BUFFER = 64 << 10
# Behind a large payload only this much is received ahead: what is, is copied once more.
_AHEAD = 4 << 10
# After so many receives without a pause, others get their turn.
_FAIRNESS = 16
# One request without payload covers at most so much where lengths have 32 bits.
_MAX_EFFECT = 1 << 31
_SCRATCH = 64 << 10


async def perform(stream: Stream, handshake: Handshake[T]) -> T:
    """Carry out a handshake over `stream` and return its result."""
    try:
        step = next(handshake)
        while True:
            if isinstance(step, Receive):
                try:
                    data = await stream.receive_exactly(step.length)
                except (ProtocolError, OSError) as error:
                    step = handshake.throw(_lost(error))
                    continue
                step = handshake.send(data)
            elif isinstance(step, Send):
                try:
                    await stream.send_all(step.data)
                except OSError as error:
                    raise _lost(error) from None
                step = handshake.send(b"")
            else:
                raise OptionError("TLS is not supported yet")
    except StopIteration as end:
        result: T = end.value
        return result


async def connect(address: Address, wishes: Wishes, *, timeout: float | None = None) -> ClientConnection:
    """A connection in transmission phase. The caller closes it with aclose().

    Raises RequestError where the server cannot be reached, ProtocolError where it does not let us
    in, OptionError for what is not supported.
    """
    stream = Stream(await address.connect(timeout))
    try:
        export = await perform(stream, open_export(wishes))
    except BaseException:
        stream.close()
        raise
    return ClientConnection(stream, export)


class _Waited(Request):
    """A request with the task that awaits its reply."""

    __slots__ = ("done", "task")

    done: bool
    task: trio.lowlevel.Task | None

    def completed(self) -> None:
        self.done = True
        self.wake()

    def wake(self) -> None:
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None

    def abandon(self, _: object) -> trio.lowlevel.Abort:
        """The waiting task is cancelled; at once, since the reply may come before it runs."""
        self.task = self.buffer = None
        return trio.lowlevel.Abort.SUCCEEDED


class ClientConnection:
    """`export` is what the server said. `failure` is why the connection is lost, once it is.

    Operations raise RequestError where the server, or a check here, refuses the request, and
    ProtocolError where the connection is lost. They split what is larger than the server takes;
    parts of such a request may have happened when it fails.
    """

    def __init__(self, stream: Stream, export: Export) -> None:
        self.stream = stream
        self.export = export
        self.failure: ProtocolError | None = None
        self.pending: dict[int, Request] = {}
        self.flags = export.flags if export.flags & TransmissionFlag.HAS_FLAGS else TransmissionFlag.HAS_FLAGS
        self.max_payload = _rounded(min(export.maximum_payload, MAX_PAYLOAD), export.minimum_block)
        self._extended = export.mode is ReplyMode.EXTENDED
        self._cookie = 0
        self._send_lock = trio.Lock()
        self._reading = trio.CancelScope()
        self._stopped = trio.Event()
        # Not in the caller's nursery: a block node lives in none, and an error in a user's `async
        # with` body should not come out wrapped in a group. aclose() ends it.
        trio.lowlevel.spawn_system_task(self._read_replies, name="NBD replies")

    # --- commands ---------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from `offset`. After an error its content is undefined."""
        view = memoryview(buffer).cast("B")
        self._check(offset, len(view))
        for start in range(0, len(view), self.max_payload):
            part = view[start : start + self.max_payload]
            await self._request(_Waited(Command.READ, offset + start, len(part), buffer=part))

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        view = memoryview(data).cast("B")
        self._check(offset, len(view), writing=True)
        flags = self._fua(fua)
        if self._extended:
            flags |= CommandFlag.PAYLOAD_LEN
        for start in range(0, len(view), self.max_payload):
            part = view[start : start + self.max_payload]
            await self._request(_Waited(Command.WRITE, offset + start, len(part)), flags, payload=part)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Advice that the range's content is of no more use."""
        self._offered(TransmissionFlag.SEND_TRIM, "trim")
        await self._effect(Command.TRIM, offset, length, self._fua(fua))

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Make the range read as zeroes; with `no_hole` its storage stays allocated, with `fast`
        ENOTSUP unless it is quicker than writing."""
        self._offered(TransmissionFlag.SEND_WRITE_ZEROES, "write zeroes")
        flags = self._fua(fua) | (CommandFlag.NO_HOLE if no_hole else 0)
        if fast:
            self._offered(TransmissionFlag.SEND_FAST_ZERO, "fast zeroing")
            flags |= CommandFlag.FAST_ZERO
        await self._effect(Command.WRITE_ZEROES, offset, length, flags)

    async def cache(self, offset: int, length: int) -> None:
        """Advice that the range will be read soon."""
        self._offered(TransmissionFlag.SEND_CACHE, "cache")
        self._check(offset, length)
        # Servers limit it like a read.
        for start in range(0, length, self.max_payload):
            size = min(self.max_payload, length - start)
            await self._request(_Waited(Command.CACHE, offset + start, size))

    async def flush(self) -> None:
        """Everything that has been answered before is durable when this returns."""
        self._offered(TransmissionFlag.SEND_FLUSH, "flush")
        await self._request(_Waited(Command.FLUSH))

    async def block_status(
        self, offset: int, length: int, *, contexts: Sequence[str] | None = None, one: bool = False
    ) -> dict[str, list[tuple[int, int]]]:
        """The (length, status) runs from `offset` on, for each context by name (default: all that
        were negotiated). At least one run each, at most `length` bytes, often less; contexts differ
        in how far they reach. With `one` exactly one run each.
        """
        self._check(offset, length)
        known = self.export.contexts
        names = list(known) if contexts is None else list(dict.fromkeys(contexts))
        for name in names:
            if name not in known:
                raise RequestError(errno.ENOTSUP, f"the server does not offer the context '{name}'")
        if not names:
            raise RequestError(errno.ENOTSUP, "the server does not offer block status")
        if not length:
            return {name: [] for name in names}
        flags = CommandFlag.REQ_ONE if one else CommandFlag(0)
        if not self._extended:
            length = min(length, _MAX_EFFECT)
        payload: bytes | None = None
        ids: Collection[int] = known.values()
        if len(names) < len(known) and self.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD and self._extended:
            ids = [known[name] for name in names]
            payload = length.to_bytes(8, "big") + b"".join(messages.U32.pack(context) for context in ids)
            flags |= CommandFlag.PAYLOAD_LEN
        request = _Waited(Command.BLOCK_STATUS, offset, length, contexts=ids, one_extent=one)
        await self._request(request, flags, payload=payload)
        return {name: request.statuses[known[name]] for name in names}

    async def aclose(self) -> None:
        """Tell the server goodbye and close the connection. What is in flight fails. Idempotent."""
        with trio.CancelScope(shield=True):
            if self.failure is None:
                with trio.move_on_after(DISCONNECT_GRACE):
                    await self._disconnect()
                self._fail(ProtocolError("the connection is closed"))
            self._reading.cancel()
            await self._stopped.wait()

    # --- sending ----------------------------------------------------------------------------

    async def _effect(self, command: Command, offset: int, length: int, flags: int) -> None:
        self._check(offset, length, writing=True)
        step = length if self._extended else _MAX_EFFECT
        for start in range(0, length, max(step, 1)):
            await self._request(_Waited(command, offset + start, min(step, length - start)), flags)

    async def _request(self, request: _Waited, flags: int = 0, *, payload: Buffer | None = None) -> None:
        """Send `request` and wait for the whole reply."""
        self._check_alive()
        request.task = None
        request.done = False
        self._cookie = cookie = self._cookie + 1
        length = len(payload) if payload is not None else request.length
        magic, layout = (
            (EXTENDED_REQUEST_MAGIC, messages.EXTENDED_REQUEST)
            if self._extended
            else (REQUEST_MAGIC, messages.REQUEST)
        )
        header = layout.pack(magic, flags, request.command, cookie, request.offset, length)
        self.pending[cookie] = request
        try:
            await self._send(cookie, header, payload)
            if not request.done and self.failure is None:
                request.task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(request.abandon)
        finally:
            # If the reply is still to come: nobody waits for it any more.
            request.task = request.buffer = None
        if request.error is not None:
            error = request.error
            raise error
        if not request.done:
            self._check_alive()

    async def _send(self, cookie: int, header: bytes, payload: Buffer | None) -> None:
        try:
            self._send_lock.acquire_nowait()
        except trio.WouldBlock:
            try:
                await self._send_lock.acquire()
            except trio.Cancelled:
                self.pending.pop(cookie, None)
                raise
        try:
            self._check_alive()
            await self._send_locked(cookie, header, payload)
        except (OSError, trio.ClosedResourceError) as error:
            self._fail(_lost(error))
        finally:
            self._send_lock.release()

    async def _send_locked(self, cookie: int, header: bytes, payload: Buffer | None) -> None:
        sock = self.stream.socket
        try:
            sent = sock.sendmsg((header, payload) if payload is not None else (header,))
        except BlockingIOError:
            sent = 0
        while sent < len(header):
            try:
                await self.stream.wait_writable()
            except trio.Cancelled:
                if sent:
                    self._fail(ProtocolError("a request was cancelled while it was being sent"))
                self.pending.pop(cookie, None)
                raise
            try:
                sent += sock.sendmsg((header[sent:], payload) if payload is not None else (header[sent:],))
            except BlockingIOError:
                continue
        if payload is None or sent == len(header) + len(payload):
            return
        rest = memoryview(payload)[sent - len(header) :]
        while rest:
            try:
                await self.stream.wait_writable()
            except trio.Cancelled:
                await self._finish_sending(rest)
                raise
            try:
                rest = rest[sock.send(rest) :]
            except BlockingIOError:
                continue

    async def _finish_sending(self, rest: memoryview) -> None:
        """The request is cancelled, but half of it is out."""
        with trio.move_on_after(SEND_GRACE, shield=True):
            await self.stream.send_all(rest)
            return
        self._fail(ProtocolError("a request was cancelled while it was being sent"))

    async def _disconnect(self) -> None:
        async with self._send_lock:
            layout, magic = (
                (messages.EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC)
                if self._extended
                else (messages.REQUEST, REQUEST_MAGIC)
            )
            try:
                await self.stream.send_all(layout.pack(magic, 0, Command.DISC, 0, 0, 0))
            except OSError as error:
                self._fail(_lost(error))

    # --- receiving --------------------------------------------------------------------------

    async def _read_replies(self) -> None:
        """Runs as long as the connection does; never raises."""
        try:
            with self._reading:
                await self._receive()
        except ProtocolError as error:
            self._fail(error)
        except OSError as error:
            self._fail(_lost(error))
        finally:
            self.stream.close()
            self._stopped.set()

    async def _receive(self) -> None:
        decoder = decode_replies(self.pending, self.export.mode)
        receive = _Receiver(self.stream)
        demand = next(decoder)
        empty = memoryview(b"")
        while True:
            if isinstance(demand, int):
                demand = decoder.send(await receive.bytes(demand))
            else:
                await receive.payload(demand)
                demand = decoder.send(empty)

    def _fail(self, error: ProtocolError) -> None:
        """The connection is lost: everything in flight fails, and everything to come."""
        if self.failure is not None:
            return
        self.failure = error
        self._reading.cancel()
        for request in self.pending.values():
            request.buffer = None
            assert isinstance(request, _Waited)
            request.wake()
        self.pending.clear()

    # --- checks -----------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise ProtocolError(str(self.failure))

    def _check(self, offset: int, length: int, *, writing: bool = False) -> None:
        end = offset + length
        if offset < 0 or length < 0 or end > self.export.size:
            raise RequestError(errno.ENOSPC if writing else errno.EINVAL, "the range lies outside the export")
        if writing and self.flags & TransmissionFlag.READ_ONLY:
            raise RequestError(errno.EPERM, "the export is read-only")
        block = self.export.minimum_block
        # The end of an export of odd size is the server's to judge.
        if offset % block or (length % block and end != self.export.size):
            raise RequestError(
                errno.EINVAL, f"the range is not a multiple of the export's block size {block}"
            )

    def _offered(self, flag: TransmissionFlag, what: str) -> None:
        if not self.flags & flag:
            raise RequestError(errno.ENOTSUP, f"the server does not offer {what}")

    def _fua(self, fua: bool) -> int:
        if not fua:
            return 0
        self._offered(TransmissionFlag.SEND_FUA, "FUA")
        return CommandFlag.FUA


class _Receiver:
    """Bytes from a socket, in the two ways that decode_replies() asks for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._buffer = memoryview(bytearray(_BUFFER))
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._start = self._end = 0  # what has been received ahead
        self._ahead = _BUFFER
        self._turns = 0

    async def bytes(self, length: int) -> memoryview:
        start, end = self._start, self._end
        if end - start < length:
            if length > _BUFFER:
                return await self._large(length)
            if start + length > _BUFFER or start == end:
                self._buffer[: end - start] = bytes(self._buffer[start:end])
                start, end = 0, end - start
            while end - start < length:
                limit = max(start + length, min(_BUFFER, end + self._ahead))
                end += await self._receive((self._buffer[end:limit],))
            self._end = end
        self._start = start + length
        return self._buffer[start : start + length]

    async def _large(self, length: int) -> memoryview:
        """`length` has been bounded by the decoder."""
        whole = memoryview(bytearray(length))
        done = self._end - self._start
        whole[:done] = self._buffer[self._start : self._end]
        self._start = self._end = 0
        while done < length:
            done += await self._receive((whole[done:],))
        return whole

    async def payload(self, fill: Fill) -> None:
        request, at, length = fill
        stop = at + length
        count = min(length, self._end - self._start)
        if count:
            if request.buffer is not None:
                request.buffer[at : at + count] = self._buffer[self._start : self._start + count]
            self._start += count
            at += count
        self._ahead = _BUFFER if length < _BUFFER else _AHEAD
        ahead = self._buffer[: self._ahead]
        while at < stop:
            # The request may be abandoned at any await: then its buffer is gone.
            got = await self._receive_payload(request, at, stop, ahead)
            if at + got > stop:
                self._start, self._end = 0, at + got - stop
            at += got

    async def _receive_payload(self, request: Request, at: int, stop: int, ahead: memoryview) -> int:
        await self._pause()
        while True:
            buffer = request.buffer
            target = self._scratch[: stop - at] if buffer is None else buffer[at:stop]
            # What lies behind the payload may only be received once all of it fits.
            targets = (target, ahead) if len(target) == stop - at else (target,)
            if got := self._try(targets):
                return got
            await self.stream.wait_readable()

    async def _receive(self, targets: tuple[memoryview, ...]) -> int:
        await self._pause()
        while not (got := self._try(targets)):
            await self.stream.wait_readable()
        return got

    async def _pause(self) -> None:
        self._turns += 1
        if self._turns >= _FAIRNESS:
            self._turns = 0
            await trio.lowlevel.checkpoint()

    def _try(self, targets: tuple[memoryview, ...]) -> int:
        """Receive what is there; 0 if nothing is."""
        try:
            got = self.stream.socket.recvmsg_into(targets)[0]
        except BlockingIOError:
            self._turns = 0
            return 0
        if not got:
            raise ProtocolError("the server closed the connection")
        return got


def _rounded(size: int, block: int) -> int:
    return size - size % block


def _lost(error: Exception) -> ProtocolError:
    if isinstance(error, ProtocolError):
        return ProtocolError("the server closed the connection")
    reason = error.strerror if isinstance(error, OSError) else "closed"
    return ProtocolError(f"the connection to the server was lost: {reason}")
