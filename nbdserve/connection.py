"""One client in the transmission phase: the hot loop.

Measured rules shape it (docs/performance.md): receive much at once and answer every complete
request in it with one send; no checkpoint, thread or task for what the page cache can answer;
large reads by sendfile, large writes straight from the receive buffer. Everything else becomes a
task of the connection (commands.py); replies interleave freely, and whoever sends holds the lock
for a whole message.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import socket
import time
from collections.abc import Sequence
from struct import Struct

import trio

from drivers.block.extents import Span
from drivers.errors import ProtocolError
from drivers.net.stream import Stream
from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REPLY_FLAG_DONE,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    ReplyType,
    WireError,
)
from drivers.wire.nbd.server_handshake import Session
from nbdserve.commands import Buffer, Refusal, Request, check, execute
from nbdserve.exports.nbd import NbdExport
from nbdserve.replies import Replies, wire_error
from nbdserve.trace import trace

# A buffer beyond the L2 cache doubles the CPU of a large write.
BUFFER_SIZE = 256 << 10
# Reads up to here are copied through the output buffer, longer ones go by sendfile.
INLINE_READ = 64 << 10
# Requests that run as tasks, of one connection, and the payload bytes they may hold. One request
# is always let in.
MAX_IN_FLIGHT = 32
MAX_BYTES_IN_FLIGHT = MAX_PAYLOAD
MAX_PARTS = 64  # of one sendmsg; the system's own limit is 1024
# So long a connection may have the loop to itself while there is work: then others get their turn,
# and a cancellation is noticed.
TURN_SECONDS = 1e-3
# A lone, quick client is waited for actively for so long, then in the kernel, before the task is
# parked: putting a processor to sleep and waking it costs more than the client needs.
SPIN_SECONDS = 25e-6
LINGER_SECONDS = 50e-6
COLD_SECONDS = 150e-6  # the same for the disk
LINGER_PATIENCE = 8  # fruitless waits before giving up, until the next LINGER_RETRY batches
LINGER_RETRY = 64
LINGER_STREAK = 8  # batches without any other connection at work

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_FUA = int(CommandFlag.FUA)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_DF = int(CommandFlag.DF)
_DATA = int(ReplyType.OFFSET_DATA)
_NONE = int(ReplyType.NONE)
_STRUCTURED_DATA = Struct(">IHHQIQ")  # a structured header with the chunk's offset
_EXTENDED_DATA = Struct(">IHHQQQQ")
_STOPPED = "no more requests were taken"
_ZEROES = memoryview(bytes(BUFFER_SIZE))


class Activity:
    """Shared by a server's connections: whether one of them has the loop to itself."""

    def __init__(self) -> None:
        self.last: object = None
        self.streak = 0


class Connection:
    """Serves one negotiated client until it leaves, breaks the protocol or stop() is called."""

    def __init__(self, stream: Stream, export: NbdExport, session: Session, activity: Activity) -> None:
        self._stream = stream
        self._export = export
        self._session = session
        self._activity = activity
        self._replies = Replies(structured=session.structured, extended=session.extended)
        self._lock = trio.Lock()  # held for the sending of one message
        self._stopping = False
        self._cold_patience = LINGER_PATIENCE
        # select()'s own limit; and waiting actively on a single processor starves the client.
        self._can_linger = stream.socket.fileno() < 1024 and len(os.sched_getaffinity(0)) > 1
        self._in_flight = 0
        self._bytes_in_flight = 0
        self._room: trio.Event | None = None
        self._ready: list[tuple[Request, list[Buffer]]] = []  # answered, to be sent
        self._nursery: trio.Nursery
        self._out = _pages(BUFFER_SIZE)
        self._out_view = memoryview(self._out)
        self._turn_ends = 0.0
        # Reads that must not block; 0 where the file system does not know the flag.
        self._nowait = os.RWF_NOWAIT

    @property
    def style(self) -> str:
        """Which kind of replies was negotiated."""
        return (
            "extended" if self._replies.extended else "structured" if self._replies.structured else "simple"
        )

    def stop(self) -> None:
        """Take no more requests; those in flight are finished and answered."""
        self._stopping = True
        # Wakes whoever waits for more, as if the client had left.
        with contextlib.suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_RD)

    async def run(self) -> str:
        """Returns why it ended, in words for the log. To cancel it is to drop the client: nothing
        more is sent, perhaps in the middle of a message."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                reason = await self._serve()
            except (ProtocolError, OSError) as error:
                reason = str(error)
        return _STOPPED if self._stopping else reason

    # --- the hot loop -----------------------------------------------------------------------

    async def _serve(self) -> str:
        # Long on purpose: every call and attribute in here is paid for each request.
        sock = self._stream.socket
        receive_into, send = sock.recv_into, sock.send
        preadv, pwrite = os.preadv, os.pwrite
        export, activity = self._export, self._activity
        pace = export.pace
        plain, plain_write = export.node.plain, export.node.plain_write
        if trace.enabled:
            plain = plain_write = _nothing  # every request passes where it is traced
        size, mask = export.info.size, self._session.minimum_block - 1
        write_fast = export.writable and not export.writethrough
        extended, structured = self._replies.extended, self._replies.structured
        header = messages.EXTENDED_REQUEST if extended else messages.REQUEST
        request_magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        header_size, unpack_header = header.size, header.unpack_from
        plain_write_flags = _PAYLOAD_LEN if extended else 0
        data_header_size = 40 if extended else 28 if structured else 16
        pack_simple = messages.SIMPLE_REPLY.pack_into
        pack_extended = messages.EXTENDED_REPLY.pack_into
        pack_structured_data = _STRUCTURED_DATA.pack_into
        pack_extended_data = _EXTENDED_DATA.pack_into
        buffer = _pages(BUFFER_SIZE)
        view = memoryview(buffer)
        out, out_view = self._out, self._out_view
        nowait, stall = self._nowait, pace.STALL_SECONDS
        clock = time.perf_counter
        fileno, can_linger = sock.fileno(), self._can_linger
        lone = False
        cold: list[Request] = []
        patience, batches = LINGER_PATIENCE, 0
        start = end = out_end = 0

        while True:
            # Receive into the free end of the buffer; make room when there is too little.
            if start == end:
                start = end = 0
            elif end == BUFFER_SIZE:
                view[: end - start] = view[start:end]
                start, end = 0, end - start
            # A lone client that sends one request at a time is waited for in the kernel, briefly.
            if lone and not _soon((fileno,), ()):
                patience -= 1
                lone = False
            try:
                count = receive_into(view[end:] if end else view)
            except BlockingIOError:
                await self._stream.wait_readable()
                self._turn_ends = clock() + TURN_SECONDS
                continue
            if not count:
                if start != end:
                    raise ProtocolError("the client left in the middle of a request") from None
                return "the client left without saying goodbye"
            end += count

            began = clock()
            while end - start >= header_size:
                magic, flags, command, cookie, offset, length = unpack_header(buffer, start)
                if magic != request_magic:
                    raise ProtocolError(f"bad request magic {magic:#x}")

                if command == _READ and flags <= _FUA and offset + length <= size:
                    if (
                        0 < length <= INLINE_READ
                        and not (offset | length) & mask
                        and (nowait or pace.inline or pace.recover())
                    ):
                        spans = plain(offset, length)
                        if spans is not None and len(spans) == 1:
                            if out_end + data_header_size + length > BUFFER_SIZE:
                                await self._send(out_view[:out_end])
                                await self._give_way()
                                out_end = 0
                                began = clock()
                                continue  # an await ends a span's life: ask again
                            fd, position, _ = spans[0]
                            at = out_end + data_header_size
                            try:
                                if fd >= 0:
                                    done = preadv(fd, (out_view[at : at + length],), position, nowait)
                                    if not nowait:
                                        now = clock()
                                        pace.note(now - began)
                                        began = now
                                else:
                                    out_view[at : at + length] = _ZEROES[:length]
                                    done = length
                            except OSError as error:
                                done = -1
                                if error.errno == errno.EOPNOTSUPP and nowait:
                                    self._nowait = nowait = 0
                                    continue
                                if error.errno == errno.EAGAIN:
                                    # The disk begins on it now; the waiting is done for all of a
                                    # batch at once.
                                    os.posix_fadvise(fd, position, length, os.POSIX_FADV_WILLNEED)
                                    cold.append(Request(command, flags, cookie, offset, length))
                                    start += header_size
                                    continue
                            if done == length:
                                if extended:
                                    pack_extended_data(
                                        out, out_end, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, _DATA,
                                        cookie, offset, length + 8, offset,
                                    )  # fmt: skip
                                elif structured:
                                    pack_structured_data(
                                        out, out_end, STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, _DATA,
                                        cookie, length + 8, offset,
                                    )  # fmt: skip
                                else:
                                    pack_simple(out, out_end, SIMPLE_REPLY_MAGIC, 0, cookie)
                                out_end = at + length
                                start += header_size
                                continue
                elif (
                    command == _WRITE
                    and (flags == plain_write_flags or not flags)
                    and write_fast
                    and 0 < length <= BUFFER_SIZE - header_size
                    and offset + length <= size
                    and not (offset | length) & mask
                    and (pace.inline or pace.recover())
                ):
                    payload = start + header_size
                    if end - payload < length:
                        if start + header_size + length > BUFFER_SIZE:
                            view[: end - start] = view[start:end]
                            start, end = 0, end - start
                        break
                    spans = plain_write(offset, length)
                    if spans is not None and len(spans) == 1:
                        try:
                            done = pwrite(spans[0][0], view[payload : payload + length], spans[0][1])
                        except OSError:
                            done = -1  # the slow path meets it again, and reports it
                        if clock() - began >= stall:  # the next one may have to wait as well
                            pace.note(stall)
                        if done == length:
                            if out_end + 32 > BUFFER_SIZE:
                                await self._send(out_view[:out_end])
                                await self._give_way()
                                out_end = 0
                                began = clock()
                            if extended:
                                pack_extended(
                                    out, out_end, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, _NONE,
                                    cookie, offset, 0,
                                )  # fmt: skip
                                out_end += 32
                            else:
                                pack_simple(out, out_end, SIMPLE_REPLY_MAGIC, 0, cookie)
                                out_end += 16
                            start = payload + length
                            continue

                # Everything else leaves the fast path; it may wait, so what is ready goes out.
                if out_end:
                    await self._send(out_view[:out_end])
                    out_end = 0
                if cold:
                    await self._start_cold(cold)
                    cold = []
                if command == _DISC:
                    return "the client disconnected"
                start += header_size
                request = Request(command, flags, cookie, offset, length)
                start, end = await self._other(request, view, start, end)
                began = clock()
                if began > self._turn_ends:
                    await self._give_way()
                    began = clock()

            if out_end:
                if self._lock.locked():
                    await self._send(out_view[:out_end])
                else:
                    try:
                        count = send(out_view[:out_end])
                    except BlockingIOError:
                        count = 0
                    if count != out_end:
                        await self._send(out_view[count:out_end])
                out_end = 0
                pace.note(clock() - began)
            if cold:
                await self._start_cold(cold)
                cold = []

            batches += 1
            if activity.last is self:
                activity.streak += 1
            else:
                activity.last = self
                activity.streak = 0
            lone = patience > 0 and activity.streak > LINGER_STREAK and not self._in_flight and can_linger
            if not batches % LINGER_RETRY:
                patience = LINGER_PATIENCE
            if self._stopping:
                return _STOPPED
            if clock() > self._turn_ends:
                await self._give_way()

    async def _give_way(self) -> None:
        """Let the others go first, if this connection has had its turn."""
        if time.perf_counter() > self._turn_ends:
            await trio.lowlevel.checkpoint()
            self._turn_ends = time.perf_counter() + TURN_SECONDS

    async def _receive(self, view: memoryview) -> int:
        """More of a payload, however quickly it comes in: a part of `view`, 0 if the client left."""
        await self._give_way()
        return await self._stream.receive_into(view)

    # --- what leaves the fast path ----------------------------------------------------------

    async def _other(self, request: Request, view: memoryview, start: int, end: int) -> tuple[int, int]:
        """Handle a request whose header was taken; its payload, if any, begins at `start`.
        Returns the new bounds of what is in the receive buffer."""
        payload_length = self._payload_length(request)
        if trace.enabled:
            _trace("nbd_request", request, length=request.length)
        if request.flags & _PAYLOAD_LEN and request.command == Command.BLOCK_STATUS:
            return await self._filtered_status(request, payload_length, view, start, end)
        try:
            check(self._export, self._session, request)
        except Refusal as refusal:
            start, end = await self._drain(payload_length, view, start, end)
            await self._refuse(request, refusal)
            return start, end
        if request.command == Command.WRITE:
            if payload_length > BUFFER_SIZE // 2 and not request.flags & _FUA:
                streamed = await self._stream_write(request, view, start, end)
                if streamed is not None:
                    return streamed
            await self._wait_for_room(payload_length)
            request.payload, start, end = await self._payload(payload_length, view, start, end)
        elif request.command == Command.READ:
            if await self._send_plain(request):
                return start, end
            await self._wait_for_room(request.length)
        else:
            await self._wait_for_room(0)
        self._spawn(request)
        return start, end

    async def _refuse(self, request: Request, refusal: Refusal) -> None:
        if trace.enabled:
            _trace("nbd_request_failed", request, reason=str(refusal))
        error = self._replies.error(request.cookie, request.offset, refusal.number, str(refusal))
        await self._send(error)

    def _payload_length(self, request: Request) -> int:
        """Bytes that follow the header. A length that no server would take ends the session."""
        # A write must have the flag in extended headers, but QEMU's client (10.0) sends it without.
        if request.command != Command.WRITE and not (
            self._session.extended and request.flags & CommandFlag.PAYLOAD_LEN
        ):
            return 0
        if self._session.extended and request.length > MAX_PAYLOAD:
            raise ProtocolError(f"a payload of {request.length} bytes")
        return request.length

    async def _filtered_status(
        self, request: Request, length: int, view: memoryview, start: int, end: int
    ) -> tuple[int, int]:
        """A block status request whose payload holds the real length and the contexts wanted."""
        longest = 8 + 4 * len(self._session.contexts)
        if length % 4 or not 12 <= length <= longest:
            start, end = await self._drain(length, view, start, end)
            refusal = Refusal(WireError.EINVAL, "the payload does not name negotiated contexts")
            await self._refuse(request, refusal)
            return start, end
        request.payload, start, end = await self._payload(length, view, start, end)
        (request.length,) = messages.OFFSET.unpack_from(request.payload)
        try:
            check(self._export, self._session, request)
        except Refusal as refusal:
            await self._refuse(request, refusal)
            return start, end
        await self._wait_for_room(0)
        self._spawn(request)
        return start, end

    async def _payload(self, length: int, view: memoryview, start: int, end: int) -> tuple[Buffer, int, int]:
        """The `length` bytes that follow, in a buffer of their own."""
        # One that is only announced must not cost what it would if it came.
        target = memoryview(_pages(length) if length > BUFFER_SIZE else bytearray(length))
        done = min(length, end - start)
        target[:done] = view[start : start + done]
        while done < length:
            count = await self._receive(target[done:])
            if not count:
                raise ProtocolError("the client left in the middle of a write")
            done += count
        return target, min(end, start + length), end

    async def _drain(self, length: int, view: memoryview, start: int, end: int) -> tuple[int, int]:
        """Drop the `length` bytes that follow, so that the stream stays in step."""
        while length > end - start:
            length -= end - start
            start, end = 0, await self._receive(view)
            if not end:
                raise ProtocolError("the client left in the middle of a request")
        return start + length, end

    async def _stream_write(
        self, request: Request, view: memoryview, start: int, end: int
    ) -> tuple[int, int] | None:
        """Write a long payload piece by piece as it arrives, or None where the bytes cannot be
        overwritten in place. A client that leaves midway leaves a part written."""
        export, offset, length = self._export, request.offset, request.length
        if export.writethrough or not (export.pace.inline or export.pace.recover()):
            return None
        spans = export.node.plain_write(offset, length)
        if spans is None or len(spans) != 1:
            return None
        failure: OSError | None = None
        left = length
        while True:
            count = min(left, end - start)
            if count and failure is None:
                try:
                    await self._write_part(offset + length - left, view[start : start + count])
                except OSError as error:
                    failure = error
            left -= count
            start += count
            if not left:
                break
            # The client may never send the rest: nothing is held, but asked for again.
            start, end = 0, await self._receive(view)
            if not end:
                raise ProtocolError("the client left in the middle of a write")
        if failure is None:
            await self._send(self._replies.success(request.cookie, offset))
            if trace.enabled:
                _trace("nbd_reply", request)
        else:
            if trace.enabled:
                _trace("nbd_request_failed", request, reason=failure.strerror)
            number = wire_error(failure.errno)
            await self._send(self._replies.error(request.cookie, offset, number, failure.strerror or ""))
        return start, end

    async def _write_part(self, offset: int, data: memoryview) -> None:
        """Write in place, or as any request where that is not possible (any more), or too slow."""
        node, pace = self._export.node, self._export.pace
        spans = node.plain_write(offset, len(data)) if pace.inline or pace.recover() else None
        if spans is None or len(spans) != 1:
            await node.write(offset, data)
            return
        began = time.perf_counter()
        try:
            _write_all(spans[0][0], data, spans[0][1])
        finally:
            pace.note(time.perf_counter() - began)

    # --- large reads ------------------------------------------------------------------------

    async def _send_plain(self, request: Request) -> bool:
        """Answer a read straight from host files. False: nothing was sent, it must be read."""
        offset, length = request.offset, request.length
        if length <= INLINE_READ or not (self._export.pace.inline or self._export.pace.recover()):
            return False
        spans = self._export.node.plain(offset, length)
        if spans is None or not self._resident(spans):
            return False
        one_chunk = len(spans) > 1 and (not self._replies.structured or bool(request.flags & _DF))
        await self._begin_message()
        try:
            await self._send_spans(request, spans, one_chunk)
        except BaseException:
            self._break_off()
            raise
        finally:
            self._lock.release()
        if trace.enabled:
            _trace("nbd_reply", request)
        return True

    def _resident(self, spans: Sequence[Span]) -> bool:
        """Whether the ends of each span are in the page cache, so that sendfile will most likely
        not wait for the disk. If not, the kernel is told to fetch them."""
        probe = bytearray(1)
        resident = True
        for fd, position, length in spans:
            if fd < 0:
                continue
            try:
                if self._nowait:
                    os.preadv(fd, (probe,), position, self._nowait)
                    os.preadv(fd, (probe,), position + length - 1, self._nowait)
            except BlockingIOError:
                os.posix_fadvise(fd, position, length, os.POSIX_FADV_WILLNEED)
                resident = False
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    return False
                self._nowait = 0
        return resident

    async def _send_spans(self, request: Request, spans: Sequence[Span], one_chunk: bool) -> None:
        """Send a whole read reply; the lock is held. The spans tell how it is cut into chunks. These
        end with one of their own, because a sendfile that fails must still be reported."""
        replies, cookie, offset = self._replies, request.cookie, request.offset
        at = offset
        failure: OSError | None = None
        if one_chunk:
            await self._put(replies.data(cookie, offset, offset, request.length, done=False), more=True)
            failure = await self._put_range(offset, request.length)
            spans = ()
        for fd, _, length in spans:
            if fd < 0 and replies.structured:
                await self._put(replies.hole(cookie, offset, at, length, done=False), more=True)
            else:
                await self._put(replies.data(cookie, offset, at, length, done=False), more=True)
                failure = await self._put_range(at, length) or failure
            at += length
        if failure is None:
            end = replies.done(cookie, offset)
        else:
            end = replies.error(cookie, offset, wire_error(failure.errno), failure.strerror or "")
        if end:
            await self._put(end)

    async def _put_range(self, at: int, length: int) -> OSError | None:
        """Send `length` bytes of the export from `at` on, which is all of a chunk; what cannot be read
        is sent as zeroes and the error returned. A simple reply has said that there is none: it must
        not be completed, so ProtocolError.

        A client may take its time, or never come back for the rest, and must not keep others from
        what lies there: so nothing is held meanwhile, but asked for again after each wait.
        """
        node = self._export.node
        while length:
            await self._give_way()
            try:
                spans = node.plain(at, length)
                if spans is None:
                    count = min(length, BUFFER_SIZE)
                    buffer = bytearray(count)
                    await node.read_into(at, buffer)
                    await self._put(buffer)
                else:
                    count = await self._put_span(*spans[0])
            except ConnectionError:
                raise
            except OSError as error:
                if not self._replies.structured:
                    raise ProtocolError(f"a read failed after its reply had begun: {error}") from None
                await self._put_zeroes(length)
                return error
            at += count
            length -= count
        return None

    async def _put_span(self, fd: int, position: int, length: int) -> int:
        """Send the beginning of a span; how many bytes, 0 if it had to wait."""
        if fd < 0:
            length = min(length, BUFFER_SIZE)
            await self._put(_ZEROES[:length])
            return length
        began = time.perf_counter()
        try:
            count = os.sendfile(self._stream.socket.fileno(), fd, position, length)
        except BlockingIOError:
            await self._writable()
            return 0
        self._export.pace.note(time.perf_counter() - began)
        if not count:  # the file ends before the image does: the rest reads as zeroes
            await self._put_zeroes(length)
            return length
        return count

    async def _put_zeroes(self, length: int) -> None:
        while length:
            count = min(length, BUFFER_SIZE)
            await self._put(_ZEROES[:count])
            length -= count

    # --- tasks ------------------------------------------------------------------------------

    async def _wait_for_room(self, weight: int) -> None:
        """Until another request, with `weight` bytes to hold, may be in flight."""
        while self._in_flight and (
            self._in_flight >= MAX_IN_FLIGHT or self._bytes_in_flight + weight > MAX_BYTES_IN_FLIGHT
        ):
            self._room = trio.Event()
            await self._room.wait()

    def _spawn(self, request: Request) -> None:
        self._in_flight += 1
        self._bytes_in_flight += _weight(request)
        self._nursery.start_soon(self._execute, request)

    async def _execute(self, request: Request) -> None:
        parts = await execute(self._export, self._session, self._replies, request)
        self._ready.append((request, parts))
        if len(self._ready) == 1:
            await self._send_ready()

    async def _send_ready(self) -> None:
        """Send the replies that the tasks of this turn of the loop have made, at once: sending is
        the most expensive thing about a small reply."""
        if self._in_flight > 1:
            await trio.lowlevel.cancel_shielded_checkpoint()
        ready, self._ready = self._ready, []
        try:
            await self._send(*[part for _, parts in ready for part in parts])
            if trace.enabled:
                for request, _ in ready:
                    _trace("nbd_reply", request)
        except OSError:
            self.stop()  # nobody is there to read an answer
        finally:
            self._finished(len(ready), sum(_weight(request) for request, _ in ready))

    def _finished(self, count: int, weight: int) -> None:
        self._in_flight -= count
        self._bytes_in_flight -= weight
        if self._room is not None:
            self._room.set()
            self._room = None

    async def _start_cold(self, requests: list[Request]) -> None:
        """Wait for these reads, which the disk has been told of: for a moment here, since a quick
        disk has them before a thread has begun to wait, then in one thread for many of them."""
        # A batch may ask for far more than may be in flight.
        for first in range(0, len(requests), MAX_IN_FLIGHT):
            await self._start_some_cold(requests[first : first + MAX_IN_FLIGHT])
            await self._give_way()

    async def _start_some_cold(self, requests: list[Request]) -> None:
        if self._cold_patience > 0 and self._can_linger and self._activity.streak > LINGER_STREAK:
            parts, requests = self._poll_cold(requests)
            if parts:
                await self._send(b"".join(parts))
                self._cold_patience = LINGER_PATIENCE
            else:
                self._cold_patience -= 1
                if not self._cold_patience:
                    self._cold_patience = -LINGER_RETRY
            if not requests:
                return
        elif self._cold_patience < 0:
            self._cold_patience += 1
            if not self._cold_patience:
                self._cold_patience = LINGER_PATIENCE
        weight = sum(map(_weight, requests))
        await self._wait_for_room(weight)
        self._in_flight += len(requests)
        self._bytes_in_flight += weight
        self._nursery.start_soon(self._read_cold, requests, weight)

    def _poll_cold(self, requests: list[Request]) -> tuple[list[Buffer], list[Request]]:
        """Ask the page cache for these reads until they are there, COLD_SECONDS at most. Replies to
        those that came, and the others."""
        node, clock = self._export.node, time.perf_counter
        deadline = clock() + COLD_SECONDS
        parts: list[Buffer] = []
        for number, request in enumerate(requests):
            cookie, at, length = request.cookie, request.offset, request.length
            spans = node.plain(at, length)
            if spans is None or len(spans) != 1 or spans[0][0] < 0:
                return parts, requests[number:]
            buffer = bytearray(length)
            done = -1
            while done != length:
                try:
                    done = os.preadv(spans[0][0], (buffer,), spans[0][1], self._nowait)
                except BlockingIOError:
                    done = -1
                except OSError:
                    return parts, requests[number:]
                if done != length and clock() > deadline:
                    return parts, requests[number:]
            parts += (self._replies.data(cookie, at, at, length, done=True), buffer)
        return parts, []

    async def _read_cold(self, requests: list[Request], weight: int) -> None:
        node = self._export.node
        jobs: list[Span] = []
        held = []
        waiting = []
        others = []
        for request in requests:
            spans = node.plain(request.offset, request.length)
            if spans is not None and len(spans) == 1 and spans[0][0] >= 0:
                jobs.append(spans[0])
                held.append(node.hold(request.offset, request.length))
                waiting.append(request)
            else:
                others.append(request)
        try:
            try:
                found = await trio.to_thread.run_sync(read_spans, jobs, limiter=self._export.threads)
            finally:
                for hold in held:
                    node.release(hold)
            parts: list[Buffer] = []
            for request, data in zip(waiting, found, strict=True):
                if data is None:
                    others.append(request)  # fails once more, and is reported
                else:
                    cookie, at = request.cookie, request.offset
                    parts += (self._replies.data(cookie, at, at, len(data), done=True), data)
            await self._send(b"".join(parts))
            for request in others:
                await self._send(*await execute(self._export, self._session, self._replies, request))
        except OSError:
            self.stop()  # nobody is there to read an answer
        finally:
            self._finished(len(requests), weight)

    # --- sending ----------------------------------------------------------------------------

    async def _send(self, *parts: Buffer) -> None:
        """Send one message, or several whole ones, undivided."""
        await self._begin_message()
        try:
            rest = self._put_together(parts) if len(parts) > 1 else parts
            for number, part in enumerate(rest, 1):
                await self._put(part, more=number < len(rest))
        except BaseException:
            self._break_off()
            raise
        finally:
            self._lock.release()

    async def _begin_message(self) -> None:
        """Take the lock. Not a checkpoint where it is free: nothing may come between a partial send
        and its rest."""
        if self._lock.locked():
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()

    def _break_off(self) -> None:
        """A message was begun and cannot be completed: it is the last one, or whatever another task
        sent would be taken for its rest."""
        with contextlib.suppress(OSError):
            self._stream.socket.shutdown(socket.SHUT_RDWR)

    def _put_together(self, parts: Sequence[Buffer]) -> Sequence[Buffer]:
        """Send what the socket takes of `parts` at once; the lock is held. What is left."""
        try:
            count = self._stream.socket.sendmsg(parts[:MAX_PARTS])
        except BlockingIOError:
            return parts
        for number, part in enumerate(parts):
            if count < len(part):
                return [memoryview(part)[count:], *parts[number + 1 :]]
            count -= len(part)
        return ()

    async def _put(self, data: Buffer, *, more: bool = False) -> None:
        """Send `data`; the lock is held. `more` holds it back until it can go with what follows."""
        sock = self._stream.socket
        flags = socket.MSG_MORE if more else 0
        view = memoryview(data)
        while view:
            try:
                view = view[sock.send(view, flags) :]
            except BlockingIOError:
                await self._writable()

    async def _writable(self) -> None:
        """Wait until the client has taken some of what was sent."""
        alone = self._can_linger and self._activity.streak > LINGER_STREAK
        in_turn = time.perf_counter() < self._turn_ends
        if not (alone and in_turn and _soon((), (self._stream.socket.fileno(),))):
            await self._stream.wait_writable()
            self._turn_ends = time.perf_counter() + TURN_SECONDS


def _pages(length: int) -> mmap.mmap:
    """`length` bytes in pages of their own: those that a client never fills cost nothing, and all go
    back to the system when they are dropped."""
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _soon(readable: Sequence[int], writable: Sequence[int]) -> bool:
    """Wait for a moment, blocking the loop, until the one descriptor given is ready."""
    clock = time.perf_counter
    deadline = clock() + SPIN_SECONDS
    while clock() < deadline:
        ready = select.select(readable, writable, (), 0)
        if ready[0] or ready[1]:
            return True
    ready = select.select(readable, writable, (), LINGER_SECONDS)
    return bool(ready[0] or ready[1])


def _nothing(offset: int, length: int, /) -> None:
    """A plain() that leaves every request to the slow path."""


def _trace(event: str, request: Request, **more: object) -> None:
    trace(
        event,
        command=request.command,
        cookie=request.cookie,
        offset=request.offset,
        flags=request.flags,
        **more,
    )


def _weight(request: Request) -> int:
    return request.length if request.command in (Command.READ, Command.WRITE) else 0


def read_spans(spans: Sequence[Span]) -> list[bytearray | None]:
    """The bytes of each span; None where they could not be read whole. Waits for the disk."""
    found: list[bytearray | None] = []
    for fd, position, length in spans:
        buffer = bytearray(length)
        try:
            done = os.preadv(fd, (buffer,), position)
        except OSError:
            done = -1
        found.append(buffer if done == length else None)
    return found


def _write_all(fd: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(fd, data, position)
        data = data[count:]
        position += count
