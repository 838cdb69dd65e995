"""Large reads: straight from host files to the socket."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

from drivers.block.extents import Span
from drivers.errors import ProtocolError
from drivers.wire.nbd.constants import CommandFlag
from nbdserve.commands import Request, trace_request
from nbdserve.exports.nbd import NbdExport
from nbdserve.replies import Replies, wire_error
from nbdserve.sender import Sender
from nbdserve.trace import trace
from nbdserve.turns import Turn

_DF = int(CommandFlag.DF)
# What must be read because it is not plain goes out in such pieces.
_PIECE = 256 << 10


class LargeReads:
    """Answers one connection's reads by sendfile, where their bytes are plain and at hand."""

    def __init__(self, export: NbdExport, replies: Replies, sender: Sender, turn: Turn) -> None:
        self._export = export
        self._replies = replies
        self._sender = sender
        self._turn = turn
        # Probes that must not block; 0 where the file system does not know the flag.
        self._nowait = os.RWF_NOWAIT
        self._can_sendfile = True

    async def answer(self, request: Request) -> bool:
        """Answer a read straight from host files. False: nothing was sent, it must be read."""
        offset, length = request.offset, request.length
        if not (self._can_sendfile and (self._export.pace.inline or self._export.pace.recover())):
            return False
        spans = self._export.node.plain(offset, length)
        if spans is None or not self._resident(spans):
            return False
        self._export.node.lend()
        one_chunk = len(spans) > 1 and (not self._replies.structured or bool(request.flags & _DF))
        async with self._sender.message():
            await self._send_spans(request, spans, one_chunk)
        if trace.enabled:
            trace_request("nbd_reply", request)
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
        """Send a whole read reply, within message(). The spans tell how it is cut into chunks. These
        end with one of their own, because a sendfile that fails must still be reported."""
        replies, cookie, offset = self._replies, request.cookie, request.offset
        at = offset
        failure: OSError | None = None
        if one_chunk:
            await self._sender.put(
                replies.data(cookie, offset, offset, request.length, done=False), more=True
            )
            failure = await self._put_range(offset, request.length)
            spans = ()
        for fd, _, length in spans:
            if fd < 0 and replies.structured:
                await self._sender.put(replies.hole(cookie, offset, at, length, done=False), more=True)
            else:
                await self._sender.put(replies.data(cookie, offset, at, length, done=False), more=True)
                failure = await self._put_range(at, length) or failure
            at += length
        if failure is None:
            end = replies.done(cookie, offset)
        else:
            end = replies.error(cookie, offset, wire_error(failure.errno), failure.strerror or "")
        if end:
            await self._sender.put(end)

    async def _put_range(self, at: int, length: int) -> OSError | None:
        """Send `length` bytes of the export from `at` on, which is all of a chunk; what cannot be read
        is sent as zeroes and the error returned. A simple reply has said that there is none: it must
        not be completed, so ProtocolError.

        A client may take its time, or never come back for the rest, and must not keep others from
        what lies there: so nothing is held meanwhile, but asked for again after each wait.
        """
        node = self._export.node
        while length:
            await self._turn.give_way()
            try:
                spans = node.plain(at, length)
                if spans is None or not self._can_sendfile:
                    count = min(length, _PIECE)
                    buffer = bytearray(count)
                    await node.read_into(at, buffer)
                    await self._sender.put(buffer)
                else:
                    count = await self._put_span(*spans[0])
            except ConnectionError:
                raise
            except OSError as error:
                if not self._replies.structured:
                    raise ProtocolError(f"a read failed after its reply had begun: {error}") from None
                await self._sender.put_zeroes(length)
                return error
            at += count
            length -= count
        return None

    async def _put_span(self, fd: int, position: int, length: int) -> int:
        """Send the beginning of a span; how many bytes, 0 if it had to wait."""
        if fd < 0:
            await self._sender.put_zeroes(length)
            return length
        began = time.perf_counter()
        try:
            count = os.sendfile(self._sender.stream.socket.fileno(), fd, position, length)
        except BlockingIOError:
            await self._sender.writable()
            return 0
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            self._can_sendfile = False  # not on this file system
            return 0
        self._export.pace.note(time.perf_counter() - began)
        if not count:  # the file ends before the image does: the rest reads as zeroes
            await self._sender.put_zeroes(length)
            return length
        return count
