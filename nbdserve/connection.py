"""One client in the transmission phase: the hot loop.

Measured rules shape it (docs/performance.md): receive much at once and answer every complete
request in it with one send; no checkpoint, thread or task for what the page cache can answer;
large reads by sendfile (largereads.py), large writes straight from the receive buffer. Everything
else becomes a task of the connection (tasks.py, commands.py); replies interleave freely, each
message undivided (sender.py).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import time
from struct import Struct

import trio

from drivers.block.transfer import write_full
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
from nbdserve.commands import Buffer, Refusal, Request, check, trace_request
from nbdserve.exports.nbd import NbdExport
from nbdserve.largereads import LargeReads
from nbdserve.replies import Replies, wire_error
from nbdserve.sender import Sender
from nbdserve.tasks import Tasks
from nbdserve.trace import trace
from nbdserve.turns import Activity, Turn, soon

# A buffer beyond the L2 cache doubles the CPU of a large write.
BUFFER_SIZE = 256 << 10
# Reads up to here are copied through the output buffer, longer ones go by sendfile.
INLINE_READ = 64 << 10
LINGER_PATIENCE = 8  # fruitless waits for a lone client before giving up
LINGER_RETRY = 64  # batches until the next attempt

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_FUA = int(CommandFlag.FUA)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_DATA = int(ReplyType.OFFSET_DATA)
_NONE = int(ReplyType.NONE)
_STRUCTURED_DATA = Struct(">IHHQIQ")  # a structured header with the chunk's offset
_EXTENDED_DATA = Struct(">IHHQQQQ")
_STOPPED = "no more requests were taken"
_ZEROES = memoryview(bytes(INLINE_READ))


class Connection:
    """Serves one negotiated client until it leaves, breaks the protocol or stop() is called."""

    def __init__(self, stream: Stream, export: NbdExport, session: Session, activity: Activity) -> None:
        self._stream = stream
        self._export = export
        self._session = session
        self._replies = Replies(structured=session.structured, extended=session.extended)
        self._turn = Turn(activity, stream.socket.fileno())
        self._sender = Sender(stream, self._turn)
        self._large_reads = LargeReads(export, self._replies, self._sender, self._turn)
        self._tasks: Tasks  # while it runs
        self._stopping = False

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
            self._tasks = Tasks(
                self._export, self._session, self._replies, self._sender, self._turn, nursery, self.stop
            )
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
        export, sender, tasks, turn = self._export, self._sender, self._tasks, self._turn
        pace = export.pace
        plain, plain_write, write_now = export.node.plain, export.node.plain_write, export.node.write_now
        size, mask = export.info.size, self._session.minimum_block - 1
        write_fast = export.writable and not export.writethrough and not trace.enabled
        if trace.enabled:
            plain = _nothing  # every request passes where it is traced
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
        out = _pages(BUFFER_SIZE)
        out_view = memoryview(out)
        # Reads that must not block; 0 where the file system does not know the flag.
        nowait, stall = os.RWF_NOWAIT, pace.STALL_SECONDS
        clock = time.perf_counter
        fileno = sock.fileno()
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
            if lone and not soon((fileno,), ()):
                patience -= 1
                lone = False
            try:
                count = receive_into(view[end:] if end else view)
            except BlockingIOError:
                await self._stream.wait_readable()
                turn.begin()
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
                                await sender.send(out_view[:out_end])
                                await turn.give_way()
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
                                    nowait = 0
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
                    if spans is None or len(spans) == 1:
                        data = view[payload : payload + length]
                        try:
                            if spans is not None:
                                done = pwrite(spans[0][0], data, spans[0][1])
                            else:
                                done = length if write_now(offset, data) else -1
                        except OSError:
                            done = -1  # the slow path meets it again, and reports it
                        if clock() - began >= stall:  # the next one may have to wait as well
                            pace.note(stall)
                        if done == length:
                            if out_end + 32 > BUFFER_SIZE:
                                await sender.send(out_view[:out_end])
                                await turn.give_way()
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
                    await sender.send(out_view[:out_end])
                    out_end = 0
                if cold:
                    await tasks.start_cold(cold)
                    cold = []
                if command == _DISC:
                    return "the client disconnected"
                start += header_size
                request = Request(command, flags, cookie, offset, length)
                start, end = await self._other(request, view, start, end)
                began = clock()
                if began > turn.ends:
                    await turn.give_way()
                    began = clock()

            if out_end:
                if sender.busy:
                    await sender.send(out_view[:out_end])
                else:
                    try:
                        count = send(out_view[:out_end])
                    except BlockingIOError:
                        count = 0
                    if count != out_end:
                        await sender.send(out_view[count:out_end])
                out_end = 0
                pace.note(clock() - began)
            if cold:
                await tasks.start_cold(cold)
                cold = []

            batches += 1
            turn.batch_done()
            lone = patience > 0 and turn.alone and not tasks.in_flight
            if not batches % LINGER_RETRY:
                patience = LINGER_PATIENCE
            if self._stopping:
                return _STOPPED
            if clock() > turn.ends:
                await turn.give_way()

    async def _receive(self, view: memoryview) -> int:
        """More of a payload, however quickly it comes in: a part of `view`, 0 if the client left."""
        await self._turn.give_way()
        return await self._stream.receive_into(view)

    # --- what leaves the fast path ----------------------------------------------------------

    async def _other(self, request: Request, view: memoryview, start: int, end: int) -> tuple[int, int]:
        """Handle a request whose header was taken; its payload, if any, begins at `start`.
        Returns the new bounds of what is in the receive buffer."""
        payload_length = self._payload_length(request)
        if trace.enabled:
            trace_request("nbd_request", request, length=request.length)
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
            await self._tasks.wait_for_room(payload_length)
            request.payload, start, end = await self._payload(payload_length, view, start, end)
            if self._write_now(request):
                await self._sender.send(self._replies.success(request.cookie, request.offset))
                return start, end
        elif request.command == Command.READ:
            if request.length > INLINE_READ and await self._large_reads.answer(request):
                return start, end
            await self._tasks.wait_for_room(request.length)
        else:
            await self._tasks.wait_for_room(0)
        self._tasks.spawn(request)
        return start, end

    async def _refuse(self, request: Request, refusal: Refusal) -> None:
        if trace.enabled:
            trace_request("nbd_request_failed", request, reason=str(refusal))
        error = self._replies.error(request.cookie, request.offset, refusal.number, str(refusal))
        await self._sender.send(error)

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
        await self._tasks.wait_for_room(0)
        self._tasks.spawn(request)
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

    def _write_now(self, request: Request) -> bool:
        """Write a payload that is here whole, if that takes no waiting."""
        export, pace = self._export, self._export.pace
        if (
            export.writethrough
            or request.flags & _FUA
            or not (pace.inline or pace.recover())
            or trace.enabled
        ):
            return False
        began = time.perf_counter()
        done = export.node.write_now(request.offset, memoryview(request.payload))
        pace.note(time.perf_counter() - began)
        return done

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
            await self._sender.send(self._replies.success(request.cookie, offset))
            if trace.enabled:
                trace_request("nbd_reply", request)
        else:
            if trace.enabled:
                trace_request("nbd_request_failed", request, reason=failure.strerror)
            number = wire_error(failure.errno)
            await self._sender.send(
                self._replies.error(request.cookie, offset, number, failure.strerror or "")
            )
        return start, end

    async def _write_part(self, offset: int, data: memoryview) -> None:
        """Write in place, or as any request where that is not possible (any more), or too slow."""
        node, pace = self._export.node, self._export.pace
        spans = node.plain_write(offset, len(data)) if pace.inline or pace.recover() else None
        if spans is None or len(spans) != 1:
            if spans is not None or not pace.inline or not node.write_now(offset, data):
                await node.write(offset, data)
            return
        began = time.perf_counter()
        try:
            write_full(spans[0][0], spans[0][1], data)
        finally:
            pace.note(time.perf_counter() - began)


def _pages(length: int) -> mmap.mmap:
    """`length` bytes in pages of their own: those that a client never fills cost nothing, and all go
    back to the system when they are dropped."""
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _nothing(offset: int, length: int, /) -> None:
    """A plain() that leaves every request to the slow path."""
