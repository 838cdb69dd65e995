"""Decoding the server's replies, for the client. No I/O: the decoder says what it wants next.

Everything a server says is checked against the request it claims to answer before a byte lands
in a caller's buffer (the libnbd hole of October 2019). All errors are ProtocolError: afterwards
nothing that comes on this connection can be trusted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Generator
from struct import Struct
from typing import NamedTuple, NoReturn, TypeAlias

from drivers.errors import ProtocolError, RequestError
from drivers.wire.nbd import messages
from drivers.wire.nbd.client_handshake import ReplyMode
from drivers.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    MAX_EXTENTS,
    MAX_STRING,
    REPLY_FLAG_DONE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    ReplyType,
    WireError,
)
from drivers.wire.nbd.messages import bounded_text

# A status chunk with more descriptors than this is refused; of longer ones than MAX_EXTENTS
# only the beginning is kept, as if the server had known no more.
MAX_CHUNK_EXTENTS = 1 << 20
# Separate runs of bytes that one reply may have covered before the gaps between them are filled.
MAX_FRAGMENTS = 1 << 16
MAX_ERRORS = 1024  # error chunks in one reply
_ERROR_HEADS = {ReplyType.ERROR: 6, ReplyType.ERROR_OFFSET: 14}
MAX_ERROR_PAYLOAD = messages.ERROR.size + 0xFFFF + 64  # text, and what unknown types may add
ERROR_TYPE_BIT = 1 << 15

_ZEROES = bytes(1 << 20)
_KNOWN_ERRORS = frozenset(WireError)


class Fill(NamedTuple):
    """Receive `length` payload bytes into the request's buffer from `start`; into nowhere if the
    request was abandoned, even meanwhile."""

    request: Request
    start: int
    length: int


# What the decoder asks for: so many bytes, handed over in one piece, or a payload to be moved.
Demand: TypeAlias = int | Fill
Statuses: TypeAlias = "dict[int, list[tuple[int, int]]]"


class Request:
    """One request in flight and what has come back of it.

    `buffer`, of `length` bytes, is a read's target; None for other commands and once nobody waits
    any more. `contexts` are the ids that a block status must answer. `statuses` gets a list of
    (length, status) for each of them.
    """

    __slots__ = (
        "_fragments",
        "buffer",
        "command",
        "contexts",
        "covered",
        "error",
        "error_count",
        "length",
        "offset",
        "one_extent",
        "statuses",
    )

    def __init__(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        *,
        buffer: memoryview | None = None,
        contexts: Collection[int] = (),
        one_extent: bool = False,
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.contexts = contexts
        self.one_extent = one_extent
        self.covered = 0
        self.error: RequestError | None = None
        self.error_count = 0
        self.statuses: Statuses = {}
        self._fragments: list[tuple[int, int]] = []

    def completed(self) -> None:
        """Called once the whole reply is in: the hook of whoever waits."""

    def cover(self, start: int, length: int) -> None:
        """Note that bytes have come; no byte may come twice."""
        end = start + length
        fragments = self._fragments
        at = bisect_right(fragments, (start, self.length))
        if (at and fragments[at - 1][1] > start) or (at < len(fragments) and fragments[at][0] < end):
            raise ProtocolError("the server sent the same bytes of a read twice")
        if at < len(fragments) and fragments[at][0] == end:
            end = fragments.pop(at)[1]
        if at and fragments[at - 1][1] == start:
            fragments[at - 1] = (fragments[at - 1][0], end)
        else:
            fragments.insert(at, (start, end))
            if len(fragments) > MAX_FRAGMENTS:
                raise ProtocolError("the server sent a read in too many pieces")
        self.covered += length

    def fail(self, code: int, text: bytes = b"") -> None:
        """Keep the first error; a number the protocol does not know counts as EINVAL."""
        self.error_count += 1
        if self.error_count > MAX_ERRORS:
            raise ProtocolError("the server sent too many errors for one request")
        if self.error is None:
            known = code if code in _KNOWN_ERRORS else WireError.EINVAL
            self.error = RequestError(int(known), bounded_text(text))


def decode_replies(pending: dict[int, Request], mode: ReplyMode) -> Generator[Demand, memoryview, NoReturn]:
    """Reply after reply; finished requests leave `pending` (cookie to request) and are told.

    An int is answered with that many bytes, valid until the next demand; a Fill with anything.
    """
    if mode is ReplyMode.EXTENDED:
        while True:
            magic, flags, kind, cookie, offset, length = messages.EXTENDED_REPLY.unpack((yield 32))
            if magic != EXTENDED_REPLY_MAGIC:
                raise _wrong_magic(magic)
            request = _request(pending, cookie)
            if offset != request.offset:
                raise ProtocolError("the server's reply is about another offset than the request")
            yield from _chunk(pending, cookie, request, flags, kind, length, extended=True)
    while True:
        head = yield 16
        (magic,) = messages.U32.unpack_from(head)
        if magic == SIMPLE_REPLY_MAGIC:
            _, error, cookie = messages.SIMPLE_REPLY.unpack(head)
            request = _request(pending, cookie)
            if error:
                request.fail(error)
            if request.command is Command.READ:
                if mode is not ReplyMode.SIMPLE:
                    raise ProtocolError("the server sent a simple reply to a structured read")
                if not error:
                    yield Fill(request, 0, request.length)
            elif request.command is Command.BLOCK_STATUS and not error:
                raise ProtocolError("the server answered a block status without any status")
            _finish(pending, cookie, request)
        elif magic == STRUCTURED_REPLY_MAGIC and mode is ReplyMode.STRUCTURED:
            _, flags, kind, cookie = _STRUCTURED_HEAD.unpack(head)
            (length,) = messages.U32.unpack((yield 4))
            request = _request(pending, cookie)
            yield from _chunk(pending, cookie, request, flags, kind, length, extended=False)
        else:
            raise _wrong_magic(magic)


# A structured reply's header up to the length, which is what fits a simple reply's 16 bytes.
_STRUCTURED_HEAD = Struct(">IHHQ")


def _chunk(
    pending: dict[int, Request],
    cookie: int,
    request: Request,
    flags: int,
    kind: int,
    length: int,
    *,
    extended: bool,
) -> Generator[Demand, memoryview, None]:
    done = flags & REPLY_FLAG_DONE
    if kind == ReplyType.OFFSET_DATA:
        _expect(request, Command.READ)
        if length <= messages.OFFSET.size:
            raise ProtocolError("the server sent a data chunk without data")
        (offset,) = messages.OFFSET.unpack((yield messages.OFFSET.size))
        start = _place(request, offset, length - messages.OFFSET.size)
        yield Fill(request, start, length - messages.OFFSET.size)
    elif kind == ReplyType.OFFSET_HOLE:
        _expect(request, Command.READ)
        if length != messages.HOLE.size:
            raise ProtocolError("the server sent a hole chunk of the wrong length")
        offset, hole = messages.HOLE.unpack((yield length))
        _zero(request, _place(request, offset, hole), hole)
    elif kind == (ReplyType.BLOCK_STATUS_EXT if extended else ReplyType.BLOCK_STATUS):
        _expect(request, Command.BLOCK_STATUS)
        yield from _status(request, length, extended)
    elif kind & ERROR_TYPE_BIT:
        yield from _error(request, kind, length)
    elif kind == ReplyType.NONE:
        if length or not done:
            raise ProtocolError("the server sent an empty chunk that is not empty or not the last")
    else:
        raise ProtocolError(f"the server sent a chunk of the unknown type {kind}")
    if done:
        _check_complete(request)
        _finish(pending, cookie, request)


def _status(request: Request, length: int, extended: bool) -> Generator[Demand, memoryview, None]:
    header, layout = (
        (messages.EXTENDED_STATUS_HEADER, messages.EXTENDED_EXTENT)
        if extended
        else (messages.STATUS_HEADER, messages.EXTENT)
    )
    count, rest = divmod(length - header.size, layout.size)
    if rest or not 0 < count <= MAX_CHUNK_EXTENTS:
        raise ProtocolError(f"the server sent a block status of an impossible length, {length} bytes")
    data = yield length
    context, *claimed = header.unpack_from(data)
    if claimed and claimed[0] != count:
        raise ProtocolError("the server's block status miscounts its extents")
    if context not in request.contexts:
        raise ProtocolError("the server sent the status of a metadata context nobody asked for")
    if context in request.statuses:
        raise ProtocolError("the server sent the status of a metadata context twice")
    if request.one_extent and count != 1:
        raise ProtocolError("the server sent several extents where one was asked for")
    extents: list[tuple[int, int]] = []
    left = request.length
    for extent_length, status in layout.iter_unpack(data[header.size :]):
        if not extent_length:
            raise ProtocolError("the server sent an extent of length 0")
        if left and len(extents) < MAX_EXTENTS:
            # The last may reach further than was asked.
            extents.append((min(extent_length, left), status))
            left -= extents[-1][0]
    request.statuses[context] = extents


def _error(request: Request, kind: int, length: int) -> Generator[Demand, memoryview, None]:
    fixed = _ERROR_HEADS.get(kind, messages.ERROR.size)  # type: ignore[call-overload]
    if not fixed <= length <= MAX_ERROR_PAYLOAD:
        raise ProtocolError(f"the server sent an error of an impossible length, {length} bytes")
    data = yield length
    code, text_length = messages.ERROR.unpack_from(data)
    if text_length > length - fixed:
        raise ProtocolError("the server sent an error whose text is longer than the chunk")
    if not code:
        raise ProtocolError("the server sent an error chunk without an error")
    text_end = messages.ERROR.size + text_length
    if kind == ReplyType.ERROR_OFFSET:
        (offset,) = messages.OFFSET.unpack_from(data, text_end)
        if not request.offset <= offset < request.offset + max(request.length, 1):
            raise ProtocolError("the server sent an error at an offset outside the request")
    text = bytes(data[messages.ERROR.size : text_end])
    request.fail(code, text[:MAX_STRING])


def _request(pending: dict[int, Request], cookie: int) -> Request:
    try:
        return pending[cookie]
    except KeyError:
        raise ProtocolError("the server answered a request that nobody made") from None


def _finish(pending: dict[int, Request], cookie: int, request: Request) -> None:
    del pending[cookie]
    request.completed()


def _place(request: Request, offset: int, length: int) -> int:
    """Where in the request's buffer a chunk belongs."""
    start = offset - request.offset
    if start < 0 or not length or start + length > request.length:
        raise ProtocolError("the server sent data outside the range that was asked for")
    request.cover(start, length)
    return int(start)


def _zero(request: Request, start: int, length: int) -> None:
    view = request.buffer
    if view is None:
        return
    end = start + length
    while start < end:
        count = min(end - start, len(_ZEROES))
        view[start : start + count] = _ZEROES[:count]
        start += count


def _check_complete(request: Request) -> None:
    if request.error is not None:
        return
    if request.command is Command.READ and request.covered != request.length:
        raise ProtocolError("the server ended a read with bytes missing")
    if len(request.statuses) != len(request.contexts):
        raise ProtocolError("the server left out the status of a metadata context")


def _expect(request: Request, command: Command) -> None:
    if request.command is not command:
        raise ProtocolError(f"the server sent a chunk that does not belong to {request.command.name}")


def _wrong_magic(magic: int) -> ProtocolError:
    return ProtocolError(f"the server's reply begins with the wrong magic {magic:#010x}")
