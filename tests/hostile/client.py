"""A blocking client that keeps to no rule but its test's, for a server in another process."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    Option,
    OptionReply,
    ReplyType,
)

STYLES = ("simple", "structured", "extended")
TIMEOUT = 20


@dataclass(slots=True)
class Reply:
    """A whole reply. `data` is a read's bytes; `extents` are a block status', by context id."""

    cookie: int
    error: int
    data: bytes
    extents: dict[int, list[tuple[int, int]]]


class Client:
    def __init__(self, address: str | tuple[str, int]) -> None:
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(address)
        self.style = "simple"
        self.size = 0
        self.flags = 0
        # Of the requests in flight: what a reply cannot be understood without.
        self._reads: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    # --- handshake ----------------------------------------------------------------------------

    def greet(self, flags: int = 3) -> None:
        assert self.receive(messages.GREETING.size).startswith(b"NBDMAGICIHAVEOPT")
        self.socket.sendall(messages.CLIENT_FLAGS.pack(flags))

    def option(self, number: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        """Replies up to the final one, as (type, payload)."""
        self.socket.sendall(messages.OPTION.pack(OPTION_MAGIC, number, len(payload)) + payload)
        replies = []
        while True:
            magic, answered, kind, length = messages.OPTION_REPLY.unpack(self.receive(20))
            assert (magic, answered) == (OPTION_REPLY_MAGIC, number)
            replies.append((kind, self.receive(length)))
            if kind == OptionReply.ACK or kind >> 31:
                return replies

    def go(self, style: str = "structured", contexts: Iterable[bytes] = (), name: bytes = b"") -> Client:
        self.greet()
        self.style = style
        if style != "simple":
            wanted = Option.EXTENDED_HEADERS if style == "extended" else Option.STRUCTURED_REPLY
            assert self.option(wanted)[-1][0] == OptionReply.ACK
        named = counted(name)
        if contexts:
            queries = [counted(context) for context in contexts]
            payload = named + messages.U32.pack(len(queries)) + b"".join(queries)
            assert self.option(Option.SET_META_CONTEXT, payload)[-1][0] == OptionReply.ACK
        *infos, (last, _) = self.option(Option.GO, named + b"\0\0")
        assert last == OptionReply.ACK
        self.size, self.flags = next(
            struct.unpack_from(">QH", payload, 2) for _, payload in infos if payload[:2] == b"\0\0"
        )
        return self

    # --- transmission -------------------------------------------------------------------------

    def header(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7
    ) -> bytes:
        if self.style == "extended":
            if command == Command.WRITE:
                flags |= CommandFlag.PAYLOAD_LEN
            return messages.EXTENDED_REQUEST.pack(
                EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length
            )
        return messages.REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)

    def begin(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        data: bytes = b"",
        flags: int = 0,
        cookie: int = 7,
    ) -> bytes:
        """A request's bytes, remembered so that its reply can be understood."""
        if command == Command.READ:
            self._reads[cookie] = offset, length
        return self.header(command, offset, length or len(data), flags=flags, cookie=cookie) + data

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def call(
        self, command: int, offset: int = 0, length: int = 0, *, data: bytes = b"", flags: int = 0
    ) -> Reply:
        """One request and its reply; nothing else may be in flight."""
        self.send(self.begin(command, offset, length, data=data, flags=flags))
        return self.reply()

    def read(self, offset: int, length: int) -> bytes:
        reply = self.call(Command.READ, offset, length)
        assert not reply.error
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        return self.call(Command.WRITE, offset, data=data, flags=flags).error

    def flush(self) -> int:
        return self.call(Command.FLUSH).error

    def disconnect(self) -> None:
        self.send(self.header(Command.DISC))
        assert self.at_end()

    def reply(self) -> Reply:
        """The next reply, put together; its chunks must not be mixed with another's."""
        magic = self.receive(4)
        if magic == messages.U32.pack(SIMPLE_REPLY_MAGIC):
            _, error, cookie = messages.SIMPLE_REPLY.unpack(magic + self.receive(12))
            _, length = self._reads.pop(cookie, (0, 0))
            return Reply(cookie, error, b"" if error else self.receive(length), {})
        whole: Reply | None = None
        covered = 0
        while True:
            cookie, kind, done, payload = self._chunk(magic)
            if whole is None:
                at, length = self._reads.pop(cookie, (0, 0))
                whole = Reply(cookie, 0, b"", {})
                data = bytearray(min(length, MAX_PAYLOAD))
            assert cookie == whole.cookie
            covered += _apply(whole, data, at, kind, payload)
            if done:
                assert whole.error or covered == length
                whole.data = b"" if whole.error else bytes(data)
                return whole
            magic = self.receive(4)

    def _chunk(self, magic: bytes) -> tuple[int, int, bool, bytes]:
        if self.style == "extended":
            number, flags, kind, cookie, offset, length = messages.EXTENDED_REPLY.unpack(
                magic + self.receive(28)
            )
            assert number == EXTENDED_REPLY_MAGIC
            assert cookie not in self._reads or self._reads[cookie][0] == offset
        else:
            number, flags, kind, cookie, length = messages.STRUCTURED_REPLY.unpack(magic + self.receive(16))
            assert number == STRUCTURED_REPLY_MAGIC
        assert length <= (33 << 20)
        return cookie, kind, bool(flags & 1), self.receive(length)

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes."""
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            count = self.socket.recv_into(view)
            if not count:
                raise EOFError(f"{len(view)} of {length} bytes are missing")
            view = view[count:]
        return bytes(buffer)

    def at_end(self) -> bool:
        """Drop what still comes; whether the server closes the connection."""
        try:
            while self.socket.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True


def counted(text: bytes) -> bytes:
    return messages.U32.pack(len(text)) + text


def _apply(whole: Reply, data: bytearray, at: int, kind: int, payload: bytes) -> int:
    """Take a chunk into a reply; how many bytes of a read it answers."""
    if kind >> 15:
        (whole.error, length) = messages.ERROR.unpack_from(payload)
        assert len(payload) >= 6 + length
        return 0
    if kind in (ReplyType.BLOCK_STATUS, ReplyType.BLOCK_STATUS_EXT):
        extended = kind == ReplyType.BLOCK_STATUS_EXT
        layout, skipped = (messages.EXTENDED_EXTENT, 8) if extended else (messages.EXTENT, 4)
        (context,) = messages.U32.unpack_from(payload)
        whole.extents[context] = list(layout.iter_unpack(payload[skipped:]))
        return 0
    if kind == ReplyType.NONE:
        assert not payload
        return 0
    (offset,) = messages.OFFSET.unpack_from(payload)
    if kind == ReplyType.OFFSET_HOLE:
        _, length = messages.HOLE.unpack(payload)
        assert offset - at >= 0 and offset - at + length <= len(data)
        data[offset - at : offset - at + length] = bytes(length)
        return int(length)
    assert kind == ReplyType.OFFSET_DATA
    length = len(payload) - 8
    assert offset - at >= 0 and offset - at + length <= len(data)
    data[offset - at : offset - at + length] = payload[8:]
    return length
