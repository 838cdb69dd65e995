"""Decoding replies: every chunk type, every offence, any division of the stream."""

from __future__ import annotations

import errno
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import ProtocolError
from drivers.wire.nbd import messages, replies
from drivers.wire.nbd.client_handshake import ReplyMode
from drivers.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    ReplyType,
)
from drivers.wire.nbd.replies import Fill, Request, decode_replies

OFFSET = 4096


class Decoding:
    """A decoder with one request, cookie 1, in flight, and bytes on their way to it."""

    def __init__(self, mode: ReplyMode, command: Command = Command.READ, length: int = 16, **kwargs: Any):
        self.content = bytearray(b"?" * length if command is Command.READ else b"")
        buffer = memoryview(self.content) if command is Command.READ else None
        self.request = Request(command, OFFSET, length, buffer=buffer, **kwargs)
        self.pending = {1: self.request}
        self.decoder = decode_replies(self.pending, mode)
        self.demand = next(self.decoder)

    def feed(self, data: bytes) -> None:
        """Every byte must be wanted, and in the end nothing half received."""
        while data:
            if isinstance(self.demand, Fill):
                request, start, length = self.demand
                assert len(data) >= length
                if request.buffer is not None:
                    request.buffer[start : start + length] = data[:length]
                answer = memoryview(b"")
            else:
                length = self.demand
                assert len(data) >= length
                answer = memoryview(data[:length])
            data = data[length:]
            self.demand = self.decoder.send(answer)

    @property
    def finished(self) -> bool:
        return not self.pending


def chunk(kind: int, payload: bytes = b"", *, done: bool = False, cookie: int = 1) -> bytes:
    return messages.STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload)) + payload


def extended(kind: int, payload: bytes = b"", *, done: bool = False, offset: int = OFFSET) -> bytes:
    header = messages.EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, done, kind, 1, offset, len(payload))
    return header + payload


def data(start: int, content: bytes, **kwargs: Any) -> bytes:
    return chunk(ReplyType.OFFSET_DATA, messages.OFFSET.pack(OFFSET + start) + content, **kwargs)


def hole(start: int, length: int, **kwargs: Any) -> bytes:
    return chunk(ReplyType.OFFSET_HOLE, messages.HOLE.pack(OFFSET + start, length), **kwargs)


def error(code: int, text: bytes = b"", **kwargs: Any) -> bytes:
    return chunk(ReplyType.ERROR, messages.ERROR.pack(code, len(text)) + text, **kwargs)


def status(context: int, *extents: tuple[int, int], done: bool = False) -> bytes:
    payload = messages.STATUS_HEADER.pack(context) + b"".join(messages.EXTENT.pack(*e) for e in extents)
    return chunk(ReplyType.BLOCK_STATUS, payload, done=done)


def test_simple_read() -> None:
    decoding = Decoding(ReplyMode.SIMPLE)
    decoding.feed(messages.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, 1) + b"0123456789abcdef")
    assert decoding.finished and decoding.content == b"0123456789abcdef"


def test_simple_error_has_no_payload() -> None:
    decoding = Decoding(ReplyMode.SIMPLE)
    decoding.feed(messages.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, errno.EIO, 1))
    assert decoding.finished and decoding.request.error and decoding.request.error.errno == errno.EIO


def test_structured_read_in_any_order_with_holes() -> None:
    decoding = Decoding(ReplyMode.STRUCTURED)
    decoding.feed(data(8, b"89ab") + hole(2, 6) + data(0, b"01") + data(12, b"cdef"))
    assert not decoding.finished
    decoding.feed(chunk(ReplyType.NONE, done=True))
    assert decoding.finished and decoding.content == b"01" + bytes(6) + b"89abcdef"
    assert decoding.request.error is None


def test_an_error_chunk_fails_the_request_and_its_text_is_kept() -> None:
    decoding = Decoding(ReplyMode.STRUCTURED)
    decoding.feed(data(0, b"01") + error(errno.EIO, b"bad sector", done=True))
    assert decoding.finished
    assert decoding.request.error and str(decoding.request.error) == "bad sector"


@pytest.mark.parametrize("code", [2, 4095, 0xFFFFFFFF])
def test_unknown_error_numbers_count_as_einval(code: int) -> None:
    decoding = Decoding(ReplyMode.STRUCTURED)
    decoding.feed(error(code, done=True))
    assert decoding.request.error and decoding.request.error.errno == errno.EINVAL


def test_unknown_error_types_are_errors_all_the_same() -> None:
    decoding = Decoding(ReplyMode.STRUCTURED)
    decoding.feed(chunk(0x9999, messages.ERROR.pack(errno.ENOSPC, 2) + b"hm" + b"more", done=True))
    assert decoding.request.error and decoding.request.error.errno == errno.ENOSPC


def test_block_status_is_clipped_to_the_request() -> None:
    decoding = Decoding(ReplyMode.STRUCTURED, Command.BLOCK_STATUS, 1000, contexts=(5, 6))
    decoding.feed(status(5, (600, 0), (600, 3), (8, 1)) + status(6, (1, 1), done=True))
    assert decoding.request.statuses == {5: [(600, 0), (400, 3)], 6: [(1, 1)]}


def test_block_status_with_64_bits() -> None:
    decoding = Decoding(ReplyMode.EXTENDED, Command.BLOCK_STATUS, 1 << 40, contexts=(5,))
    payload = messages.EXTENDED_STATUS_HEADER.pack(5, 2) + messages.EXTENDED_EXTENT.pack(1 << 35, 0)
    payload += messages.EXTENDED_EXTENT.pack(1 << 63, 1 << 40)
    decoding.feed(extended(ReplyType.BLOCK_STATUS_EXT, payload, done=True))
    assert decoding.request.statuses == {5: [(1 << 35, 0), ((1 << 40) - (1 << 35), 1 << 40)]}


@given(st.data())
def test_a_read_cut_into_any_chunks_arrives_whole(draw: st.DataObject) -> None:
    length = draw.draw(st.integers(1, 200))
    content = draw.draw(st.binary(min_size=length, max_size=length))
    cuts = sorted({0, length, *draw.draw(st.lists(st.integers(0, length)))})
    parts = draw.draw(st.permutations(list(itertools.pairwise(cuts))))
    decoding = Decoding(ReplyMode.STRUCTURED, length=length)
    for start, end in parts:
        decoding.feed(data(start, content[start:end]))
    decoding.feed(chunk(ReplyType.NONE, done=True))
    assert decoding.finished and decoding.content == content


def test_an_abandoned_reply_is_taken_and_written_nowhere() -> None:
    decoding = Decoding(ReplyMode.STRUCTURED)
    decoding.request.buffer = None
    decoding.feed(data(0, b"0123456789") + hole(10, 6, done=True))
    assert decoding.finished and decoding.content == b"?" * 16


SIMPLE = messages.SIMPLE_REPLY
READ_OFFENCES = [
    (data(0, b"0123456789abcdefg"), "outside the range"),  # one byte too many
    (data(-1, b"0"), "outside the range"),
    (data(16, b"0"), "outside the range"),
    (data(1 << 50, b"0"), "outside the range"),
    (hole(0, 17), "outside the range"),
    (hole(0, 0), "outside the range"),
    (hole(15, 0xFFFFFFFF), "outside the range"),
    (data(0, b"0123") + data(3, b"3"), "twice"),
    (data(4, b"4567") + data(0, b"01234"), "twice"),
    (data(0, b"0123") + hole(0, 4), "twice"),
    (data(0, b"0123456789abcdef") + hole(4, 4), "twice"),
    (data(0, b"0123", done=True), "bytes missing"),
    (chunk(ReplyType.NONE, done=True), "bytes missing"),
    (chunk(ReplyType.NONE), "empty chunk"),
    (chunk(ReplyType.NONE, b"x", done=True), "empty chunk"),
    (chunk(ReplyType.OFFSET_DATA, bytes(8)), "without data"),
    (chunk(ReplyType.OFFSET_HOLE, bytes(13)), "wrong length"),
    (chunk(3), "unknown type 3"),
    (chunk(ReplyType.BLOCK_STATUS_EXT, bytes(24)), "unknown type 6"),
    (status(0, (1, 0)), "does not belong to READ"),
    (chunk(ReplyType.ERROR, bytes(5)), "impossible length"),
    (chunk(ReplyType.ERROR, messages.ERROR.pack(5, 9) + b"short"), "longer than the chunk"),
    (chunk(ReplyType.ERROR, messages.ERROR.pack(0, 0)), "without an error"),
    (messages.STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, 1, 0x8001, 1, 1 << 30), "impossible length"),
    (
        chunk(ReplyType.ERROR_OFFSET, messages.ERROR.pack(5, 0) + messages.OFFSET.pack(OFFSET + 16)),
        "outside the request",
    ),
    (chunk(ReplyType.NONE, cookie=2), "nobody made"),
    (bytes(16), "wrong magic"),
    (SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, 1), "simple reply to a structured read"),
]


@pytest.mark.parametrize(("stream", "reason"), READ_OFFENCES)
def test_offences_in_a_read_end_the_connection(stream: bytes, reason: str) -> None:
    decoding = Decoding(ReplyMode.STRUCTURED)
    with pytest.raises(ProtocolError, match=reason):
        decoding.feed(stream)


STATUS_OFFENCES = [
    (status(5, (0, 0)), "length 0"),
    (status(5, (10, 0), (0, 1)), "length 0"),
    (status(7, (10, 0)), "nobody asked for"),
    (status(5, (10, 0)) + status(5, (10, 0)), "twice"),
    (status(5, (10, 0), done=True), "left out"),
    (chunk(ReplyType.BLOCK_STATUS, bytes(4)), "impossible length"),
    (chunk(ReplyType.BLOCK_STATUS, bytes(13)), "impossible length"),
    (messages.STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, 1, 5, 1, 0xFFFFFFFC), "impossible length"),
    (data(0, b"x"), "does not belong to BLOCK_STATUS"),
    (SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, 1), "without any status"),
]


@pytest.mark.parametrize(("stream", "reason"), STATUS_OFFENCES)
def test_offences_in_a_block_status_end_the_connection(stream: bytes, reason: str) -> None:
    decoding = Decoding(ReplyMode.STRUCTURED, Command.BLOCK_STATUS, 1000, contexts=(5, 6))
    with pytest.raises(ProtocolError, match=reason):
        decoding.feed(stream)


def test_one_extent_means_one() -> None:
    decoding = Decoding(ReplyMode.STRUCTURED, Command.BLOCK_STATUS, 1000, contexts=(5,), one_extent=True)
    with pytest.raises(ProtocolError, match="several extents"):
        decoding.feed(status(5, (10, 0), (10, 1)))


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (extended(ReplyType.NONE, offset=OFFSET + 1), "another offset"),
        (SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, 1) + bytes(16), "wrong magic"),
        (extended(ReplyType.BLOCK_STATUS, bytes(12)), "unknown type 5"),
        (extended(ReplyType.OFFSET_DATA, bytes(8) + b"x"), "outside the range"),
    ],
)
def test_offences_with_extended_headers(stream: bytes, reason: str) -> None:
    decoding = Decoding(ReplyMode.EXTENDED)
    with pytest.raises(ProtocolError, match=reason):
        decoding.feed(stream)


def test_extended_status_must_count_right() -> None:
    decoding = Decoding(ReplyMode.EXTENDED, Command.BLOCK_STATUS, 1000, contexts=(5,))
    payload = messages.EXTENDED_STATUS_HEADER.pack(5, 2) + messages.EXTENDED_EXTENT.pack(10, 0)
    with pytest.raises(ProtocolError, match="miscounts"):
        decoding.feed(extended(ReplyType.BLOCK_STATUS_EXT, payload))


def test_structured_chunks_need_negotiation() -> None:
    with pytest.raises(ProtocolError, match="wrong magic"):
        Decoding(ReplyMode.SIMPLE).feed(data(0, b"x"))


def test_memory_for_fragments_and_errors_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_FRAGMENTS", 3)
    monkeypatch.setattr(replies, "MAX_ERRORS", 3)
    with pytest.raises(ProtocolError, match="too many pieces"):
        Decoding(ReplyMode.STRUCTURED).feed(b"".join(data(2 * n, b"x") for n in range(4)))
    with pytest.raises(ProtocolError, match="too many errors"):
        Decoding(ReplyMode.STRUCTURED).feed(4 * error(errno.EIO))


def test_of_very_many_extents_the_first_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_EXTENTS", 3)
    decoding = Decoding(ReplyMode.STRUCTURED, Command.BLOCK_STATUS, 1000, contexts=(5,))
    decoding.feed(status(5, *[(10, n & 1) for n in range(10)], done=True))
    assert decoding.request.statuses == {5: [(10, 0), (10, 1), (10, 0)]}
