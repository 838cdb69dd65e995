"""A client that says exactly what a test tells it to, against a server in the same process."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from drivers.block.extents import Span
from drivers.block.node import Node, OpenFlags
from drivers.net.stream import Stream
from drivers.testing.memory import MemoryNode
from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Option,
    OptionReply,
)
from nbdserve.exports.nbd import NbdExport
from nbdserve.server import Server


class QuietLog:
    """Keeps what the server says; an error is a bug of ours and fails the test that looks."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.errors: list[str] = []

    def debug(self, event: str, **fields: object) -> None:
        self.events.append(f"{event} {fields}")

    def error(self, event: str, **fields: object) -> None:
        self.errors.append(f"{event} {fields}")


class PlainNode(MemoryNode):
    """Memory that is a file too, so that the fast path answers."""

    def __init__(self, size: int, *, flags: OpenFlags | None = None) -> None:
        super().__init__(bytearray(), flags=flags)
        self.size = size
        self.fd = os.memfd_create("disk")
        os.truncate(self.fd, size)

    def _plain(self, offset: int, length: int, /) -> list[Span]:
        return [(self.fd, offset, length)]

    _plain_write = _plain

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        os.preadv(self.fd, [buffer], offset)

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        os.pwrite(self.fd, data, offset)

    async def _close(self) -> None:
        os.close(self.fd)


@dataclass
class Chunk:
    """A reply or a chunk of one. `error` is set for simple replies."""

    style: str
    cookie: int
    kind: int = 0
    done: bool = True
    error: int = 0
    payload: bytes = b""
    offset: int = 0


class RawClient:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.extended = False

    async def receive(self, length: int) -> bytes:
        with trio.fail_after(20):
            return await self.stream.receive_exactly(length)

    async def at_end(self) -> bool:
        """Whether the server has closed the connection."""
        with trio.fail_after(20):
            try:
                return await self.stream.receive_into(memoryview(bytearray(1))) == 0
            except ConnectionResetError:
                return True

    async def greet(self, flags: int = 3) -> None:
        await self.receive(messages.GREETING.size)
        await self.stream.send_all(messages.CLIENT_FLAGS.pack(flags))

    async def option(self, number: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        """Replies up to the final one, as (type, payload)."""
        await self.stream.send_all(messages.OPTION.pack(OPTION_MAGIC, number, len(payload)) + payload)
        replies = []
        while True:
            magic, answered, kind, length = messages.OPTION_REPLY.unpack(await self.receive(20))
            assert magic == OPTION_REPLY_MAGIC
            assert answered == number
            replies.append((kind, await self.receive(length) if length else b""))
            if kind == OptionReply.ACK or kind >> 31:
                return replies

    async def go(
        self, *, style: str = "structured", contexts: tuple[bytes, ...] = (), name: bytes = b""
    ) -> None:
        await self.greet()
        if style == "structured":
            await self.option(Option.STRUCTURED_REPLY)
        elif style == "extended":
            await self.option(Option.EXTENDED_HEADERS)
            self.extended = True
        if contexts:
            queries = b"".join(len(query).to_bytes(4, "big") + query for query in contexts)
            await self.option(
                Option.SET_META_CONTEXT,
                len(name).to_bytes(4, "big") + name + len(contexts).to_bytes(4, "big") + queries,
            )
        replies = await self.option(Option.GO, len(name).to_bytes(4, "big") + name + b"\0\1\0\3")
        assert replies[-1][0] == OptionReply.ACK

    def request(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7
    ) -> bytes:
        if self.extended:
            return messages.EXTENDED_REQUEST.pack(
                EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length
            )
        return messages.REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)

    async def send(self, *parts: bytes) -> None:
        with trio.fail_after(20):
            await self.stream.send_all(b"".join(parts))

    async def chunk(self, read_length: int = 0) -> Chunk:
        """The next reply; `read_length` bytes follow a successful simple one."""
        (magic,) = messages.U32.unpack(await self.receive(4))
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = messages.SIMPLE_REPLY.unpack(b"\0\0\0\0" + await self.receive(12))[1:]
            payload = await self.receive(read_length) if read_length and not error else b""
            return Chunk("simple", cookie, error=error, payload=payload)
        if magic == STRUCTURED_REPLY_MAGIC:
            _, flags, kind, cookie, length = messages.STRUCTURED_REPLY.unpack(
                b"\0\0\0\0" + await self.receive(16)
            )
            offset = 0
        else:
            assert magic == EXTENDED_REPLY_MAGIC
            _, flags, kind, cookie, offset, length = messages.EXTENDED_REPLY.unpack(
                b"\0\0\0\0" + await self.receive(28)
            )
        payload = await self.receive(length) if length else b""
        error = int.from_bytes(payload[:4], "big") if kind >> 15 else 0
        return Chunk(
            "extended" if self.extended else "structured",
            cookie,
            kind,
            bool(flags & 1),
            error,
            payload,
            offset,
        )

    async def reply(self, read_length: int = 0) -> list[Chunk]:
        """All chunks of the next reply; nothing else may be in flight."""
        chunks = [await self.chunk(read_length)]
        while not chunks[-1].done:
            chunks.append(await self.chunk())
        return chunks

    async def result(self, *parts: bytes) -> int:
        """Send a request and return the error number of its reply."""
        await self.send(*parts)
        return max(chunk.error for chunk in await self.reply())


@contextlib.asynccontextmanager
async def serving(*exports: NbdExport, **settings: object) -> AsyncIterator[tuple[Server, str, QuietLog]]:
    """A server for `exports` on an abstract unix socket; its address is the second value."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # the kernel picks an abstract name
    listener.listen(128)
    log = QuietLog()
    settings.setdefault("max_clients", 0)
    settings.setdefault("persistent", True)
    server = Server(exports, log=log, **settings)  # type: ignore[arg-type]
    with listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, [listener])
            try:
                yield server, listener.getsockname(), log
            finally:
                server.stop()
    assert not log.errors, log.errors


async def connect(address: object) -> RawClient:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)  # type: ignore[arg-type]
    return RawClient(Stream(sock))


@contextlib.asynccontextmanager
async def one_client(
    node: Node, *, style: str = "structured", contexts: tuple[bytes, ...] = (), **export_settings: object
) -> AsyncIterator[RawClient]:
    """A negotiated client of an export of `node`."""
    export = await NbdExport.open("", node, **export_settings)  # type: ignore[arg-type]
    async with serving(export) as (_, address, _log):
        client = await connect(address)
        try:
            await client.go(style=style, contexts=contexts)
            yield client
        finally:
            client.stream.close()
    await export.aclose()
