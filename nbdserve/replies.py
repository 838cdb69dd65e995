"""Encoding a session's replies: simple, structured or extended, chosen once per connection."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ReplyType,
    WireError,
)

# The wire knows eight numbers; what else can go wrong is EINVAL, as the specification has it.
_WIRE_ERRORS = {
    errno.EPERM: WireError.EPERM,
    errno.EROFS: WireError.EPERM,
    errno.EACCES: WireError.EPERM,
    errno.EIO: WireError.EIO,
    errno.ETIMEDOUT: WireError.EIO,
    errno.ENOMEDIUM: WireError.EIO,
    errno.ENOMEM: WireError.ENOMEM,
    errno.ENOSPC: WireError.ENOSPC,
    errno.EDQUOT: WireError.ENOSPC,
    errno.EFBIG: WireError.ENOSPC,
    errno.EOVERFLOW: WireError.EOVERFLOW,
    errno.ENOTSUP: WireError.ENOTSUP,
    errno.ESHUTDOWN: WireError.ESHUTDOWN,
}

# Error texts are for people: one line is enough.
_MAX_ERROR_TEXT = 512


def wire_error(number: int | None) -> WireError:
    return _WIRE_ERRORS.get(number or 0, WireError.EINVAL)


class Replies:
    """Headers and small replies as bytes; `offset` is the request's, which extended replies echo."""

    def __init__(self, *, structured: bool, extended: bool) -> None:
        self.structured = structured or extended
        self.extended = extended

    def chunk(self, kind: ReplyType, done: bool, cookie: int, offset: int, length: int) -> bytes:
        """The header of a chunk with `length` bytes of payload."""
        flags = REPLY_FLAG_DONE if done else 0
        if self.extended:
            return messages.EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)
        return messages.STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)

    def success(self, cookie: int, offset: int) -> bytes:
        """For everything that returns no data."""
        if self.extended:
            return self.chunk(ReplyType.NONE, True, cookie, offset, 0)
        return messages.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def done(self, cookie: int, offset: int) -> bytes:
        """The end of a read's chunks; nothing where replies are simple."""
        return self.chunk(ReplyType.NONE, True, cookie, offset, 0) if self.structured else b""

    def error(self, cookie: int, offset: int, number: WireError, text: str = "") -> bytes:
        if not self.structured:
            return messages.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, number, cookie)
        message = text.encode("utf-8", "replace")[:_MAX_ERROR_TEXT]
        payload = messages.ERROR.pack(number, len(message)) + message
        return self.chunk(ReplyType.ERROR, True, cookie, offset, len(payload)) + payload

    def data(self, cookie: int, offset: int, at: int, length: int, *, done: bool) -> bytes:
        """What goes before `length` bytes of data from `at`. A simple reply has no chunks: `at` is
        the request's offset and `length` all of it."""
        if not self.structured:
            return messages.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        header = self.chunk(ReplyType.OFFSET_DATA, done, cookie, offset, 8 + length)
        return header + messages.OFFSET.pack(at)

    def hole(self, cookie: int, offset: int, at: int, length: int, *, done: bool) -> bytes:
        """A whole chunk that stands for `length` zeroes (structured replies only)."""
        return self.chunk(ReplyType.OFFSET_HOLE, done, cookie, offset, 12) + messages.HOLE.pack(at, length)

    def status(
        self, cookie: int, offset: int, context_id: int, statuses: Sequence[tuple[int, int]], *, done: bool
    ) -> bytes:
        """The chunk of one metadata context."""
        if self.extended:
            payload = messages.EXTENDED_STATUS_HEADER.pack(context_id, len(statuses))
            extent, kind = messages.EXTENDED_EXTENT, ReplyType.BLOCK_STATUS_EXT
        else:
            payload = messages.STATUS_HEADER.pack(context_id)
            extent, kind = messages.EXTENT, ReplyType.BLOCK_STATUS
        payload += b"".join(extent.pack(*pair) for pair in statuses)
        return self.chunk(kind, done, cookie, offset, len(payload)) + payload
