"""The transmission phase, request by request, in all three reply styles and on both paths: a node
that answers plain() (the fast path) and one that does not."""

from __future__ import annotations

import errno
import os
import random
import struct
from pathlib import Path

import pytest
import trio
import trio.testing

from drivers.block.node import Node, OpenFlags
from drivers.errors import RequestError
from drivers.testing.memory import MemoryNode
from drivers.wire.nbd.constants import Command, CommandFlag, ReplyType
from nbdserve import tasks
from nbdserve.exports.nbd import NbdExport
from tests.server.rawclient import PlainNode, RawClient, connect, one_client, serving

SIZE = 4 << 20
STYLES = ["simple", "structured", "extended"]


def make(kind: str, **flags: object) -> Node:
    opened = OpenFlags(**{"discard": True, **flags})  # type: ignore[arg-type]
    return PlainNode(SIZE, flags=opened) if kind == "plain" else MemoryNode(bytearray(SIZE), flags=opened)


@pytest.fixture(params=["plain", "memory"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(client: RawClient, offset: int, data: bytes, **more: int) -> bytes:
    flags = more.pop("flags", 0) | (CommandFlag.PAYLOAD_LEN if client.extended else 0)
    return client.request(Command.WRITE, offset, len(data), flags=flags, **more) + data


async def read(client: RawClient, offset: int, length: int, flags: int = 0) -> bytes:
    """The bytes of a read, put together from its chunks."""
    await client.send(client.request(Command.READ, offset, length, flags=flags))
    buffer = bytearray(b"\xee" * length)
    for chunk in await client.reply(length):
        assert not chunk.error
        if chunk.style == "simple":
            return chunk.payload
        (at,) = struct.unpack_from(">Q", chunk.payload) if chunk.payload else (0,)
        if chunk.style == "extended":
            assert chunk.offset == offset
        if chunk.kind == ReplyType.OFFSET_DATA:
            buffer[at - offset : at - offset + len(chunk.payload) - 8] = chunk.payload[8:]
        elif chunk.kind == ReplyType.OFFSET_HOLE:
            (hole,) = struct.unpack_from(">I", chunk.payload, 8)
            buffer[at - offset : at - offset + hole] = bytes(hole)
    return bytes(buffer)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [1, 512, 4096, 65536, 65537, 300_000, 1 << 20])
async def test_what_is_written_is_read(kind: str, style: str, length: int) -> None:
    data = os.urandom(length)
    async with one_client(make(kind), style=style) as client:
        assert await client.result(write(client, 12345, data)) == 0
        assert await read(client, 12345, length) == data
        assert await read(client, 12345, length, CommandFlag.FUA) == data
        assert await read(client, 0, 12345) == bytes(12345)


@pytest.mark.parametrize("style", STYLES)
async def test_many_requests_in_one_packet(kind: str, style: str) -> None:
    async with one_client(make(kind), style=style) as client:
        blocks = [os.urandom(4096) for _ in range(100)]
        await client.send(
            *(write(client, 4096 * i, block, cookie=i) for i, block in enumerate(blocks)),
        )
        assert {(await client.chunk()).cookie for _ in blocks} == set(range(100))
        await client.send(*(client.request(Command.READ, 4096 * i, 4096, cookie=i) for i in range(100)))
        for _ in blocks:
            chunk = await client.chunk(4096)
            assert chunk.payload[-4096:] == blocks[chunk.cookie]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [5, 70_000])
async def test_requests_split_at_every_byte(kind: str, style: str, length: int) -> None:
    data = os.urandom(length)
    async with one_client(make(kind), style=style) as client:
        message = write(client, 100, data)
        for position in range(90):
            await client.send(message[position : position + 1])
            await trio.lowlevel.checkpoint()
        assert await client.result(message[90:]) == 0
        assert await read(client, 100, length) == data


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "expected"),
    [
        (Command.READ, 0, SIZE, 1, errno.EINVAL),
        (Command.READ, 0, SIZE - 1, 2, errno.EINVAL),
        (Command.READ, 0, (1 << 64) - 1, 1, errno.EINVAL),
        (Command.READ, 0, (1 << 64) - 4096, 4096, errno.EINVAL),
        (Command.READ, 0, 0, (32 << 20) + 1, errno.EINVAL),
        (Command.READ, 0, 0, 0xFFFFFFFF, errno.EINVAL),
        (Command.READ, CommandFlag.NO_HOLE, 0, 1, errno.EINVAL),
        (Command.READ, 1 << 15, 0, 1, errno.EINVAL),
        (Command.WRITE_ZEROES, 0, SIZE - 1, 2, errno.ENOSPC),
        (Command.WRITE_ZEROES, CommandFlag.DF, 0, 1, errno.EINVAL),
        (Command.TRIM, 0, SIZE, 1, errno.EINVAL),
        (Command.TRIM, 0, 0, 0xFFFFFFFF, errno.EINVAL),
        (Command.CACHE, 0, SIZE, 1, errno.EINVAL),
        (Command.FLUSH, 0, 1, 0, errno.EINVAL),
        (Command.FLUSH, 0, 0, 1, errno.EINVAL),
        (Command.BLOCK_STATUS, 0, 0, 4096, errno.EINVAL),
        (Command.RESIZE, 0, 0, 0, errno.EINVAL),
        (9, 0, 0, 0, errno.EINVAL),
        (0xFFFF, 0, 0, 0, errno.EINVAL),
        (Command.READ, 0, 5, 0, 0),
        (Command.TRIM, 0, 0, 0, 0),
        (Command.WRITE_ZEROES, 0, 0, 0, 0),
        (Command.FLUSH, CommandFlag.FUA, 0, 0, 0),
        (Command.CACHE, CommandFlag.FUA, 0, SIZE, 0),
        (Command.TRIM, CommandFlag.FUA, 3, SIZE - 3, 0),
        (Command.WRITE_ZEROES, CommandFlag.FUA | CommandFlag.NO_HOLE, 1, SIZE - 2, 0),
        (Command.WRITE_ZEROES, CommandFlag.FAST_ZERO, 0, SIZE, 0),
    ],
)
async def test_each_request_gets_its_error_and_the_connection_lives_on(
    kind: str, style: str, command: int, flags: int, offset: int, length: int, expected: int
) -> None:
    async with one_client(make(kind), style=style) as client:
        assert await client.result(client.request(command, offset, length, flags=flags)) == expected
        assert await read(client, 0, 4096) == bytes(4096)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 5, 10), (1 << 63, 5), (SIZE, 500_000)])
async def test_a_write_out_of_range_is_swallowed(kind: str, style: str, offset: int, length: int) -> None:
    async with one_client(make(kind), style=style) as client:
        assert await client.result(write(client, offset, b"x" * length)) == errno.ENOSPC
        assert await read(client, SIZE - 4096, 4096) == bytes(4096)


async def test_cve_2005_3534_an_oversize_write_is_drained_not_held() -> None:
    """33 MiB are refused, dropped as they come, and the next request is answered."""
    async with one_client(make("plain")) as client:
        length = 33 << 20
        await client.send(client.request(Command.WRITE, 0, length))
        for _ in range(33):
            await client.send(bytes(1 << 20))
        assert max(chunk.error for chunk in await client.reply()) == errno.EINVAL
        assert await read(client, 0, 10) == bytes(10)


@pytest.mark.parametrize("style", STYLES)
async def test_a_read_only_export_refuses_changes(kind: str, style: str) -> None:
    async with one_client(make(kind, read_only=True), style=style) as client:
        assert await client.result(write(client, 0, b"x" * 100)) == errno.EPERM
        assert await client.result(client.request(Command.TRIM, 0, 100)) == errno.EPERM
        assert await client.result(client.request(Command.WRITE_ZEROES, 0, 100)) == errno.EPERM
        assert await read(client, 0, 100) == bytes(100)


async def test_extended_headers_bring_64_bit_lengths() -> None:
    async with one_client(make("memory"), style="extended") as client:
        beyond = 1 << 33
        assert await client.result(client.request(Command.TRIM, 0, beyond)) == errno.EINVAL
        assert await client.result(client.request(Command.WRITE_ZEROES, 0, SIZE)) == 0


@pytest.mark.parametrize("length", [5, 4096, 300_000])
@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
async def test_an_extended_write_may_lack_the_payload_flag(kind: str, length: int, flags: int) -> None:
    """The protocol demands it, but QEMU 10's client goes without."""
    async with one_client(make(kind), style="extended") as client:
        data = random.Random(length).randbytes(length)
        assert await client.result(client.request(Command.WRITE, 0, length, flags=flags), data) == 0
        assert await read(client, 0, length) == data


async def test_a_payload_that_nobody_asked_for_is_swallowed() -> None:
    async with one_client(make("plain"), style="extended") as client:
        flagged = client.request(Command.READ, 0, 5, flags=CommandFlag.PAYLOAD_LEN) + b"hello"
        assert await client.result(flagged) == errno.EINVAL
        assert await read(client, 0, 5) == bytes(5)


async def test_an_absurd_extended_payload_ends_the_connection() -> None:
    async with one_client(make("plain"), style="extended") as client:
        await client.send(client.request(Command.WRITE, 0, 1 << 40, flags=CommandFlag.PAYLOAD_LEN))
        assert await client.at_end()


@pytest.mark.parametrize("style", STYLES)
async def test_a_bad_magic_ends_the_connection(style: str) -> None:
    async with one_client(make("plain"), style=style) as client:
        await client.send(b"\0" * 32)
        assert await client.at_end()


@pytest.mark.parametrize("style", STYLES)
async def test_disconnect_finishes_what_is_in_flight(style: str) -> None:
    async with one_client(make("memory"), style=style) as client:
        await client.send(
            write(client, 0, b"x" * 100_000), client.request(Command.DISC), client.request(Command.READ, 0, 1)
        )
        chunk = await client.chunk()
        assert (chunk.cookie, chunk.error) == (7, 0)
        assert await client.at_end()


# --- block status ---------------------------------------------------------------------------------

BASE = (b"base:allocation",)


@pytest.mark.parametrize("style", STYLES[1:])
async def test_block_status(style: str) -> None:
    async with one_client(make("memory"), style=style, contexts=BASE) as client:
        await client.send(client.request(Command.BLOCK_STATUS, 1, 1000))
        (chunk,) = await client.reply()
        expected = (
            struct.pack(">IIQQ", 1, 1, 1000, 0) if style == "extended" else struct.pack(">III", 1, 1000, 0)
        )
        assert chunk.payload == expected
        one = client.request(Command.BLOCK_STATUS, 1, 1000, flags=CommandFlag.REQ_ONE)
        assert await client.result(one) == 0
        assert await client.result(client.request(Command.BLOCK_STATUS, 0, 0)) == errno.EINVAL
        assert await client.result(client.request(Command.BLOCK_STATUS, 1, SIZE)) == errno.EINVAL


async def test_two_contexts_give_two_chunks_and_the_last_ends_the_reply() -> None:
    contexts = (b"base:allocation", b"qemu:allocation-depth")
    async with one_client(make("memory"), contexts=contexts, allocation_depth=True) as client:
        await client.send(client.request(Command.BLOCK_STATUS, 0, SIZE))
        chunks = await client.reply()
        assert [chunk.payload for chunk in chunks] == [
            struct.pack(">III", 1, SIZE, 0),
            struct.pack(">III", 2, SIZE, 1),
        ]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (struct.pack(">QI", 4096, 2), [2]),
        (struct.pack(">QII", 4096, 2, 1), [2, 1]),
        (struct.pack(">QII", 4096, 1, 1), None),
        (struct.pack(">QI", 4096, 3), None),
        (struct.pack(">Q", 4096), None),
        (struct.pack(">QIII", 4096, 1, 2, 3), None),
        (struct.pack(">QI", 1 << 40, 1), None),
        (b"x", None),
        (b"x" * 100_000, None),
    ],
)
async def test_a_status_request_may_choose_its_contexts(payload: bytes, expected: list[int] | None) -> None:
    contexts = (b"base:allocation", b"qemu:allocation-depth")
    async with one_client(
        make("memory"), style="extended", contexts=contexts, allocation_depth=True
    ) as client:
        flags = CommandFlag.PAYLOAD_LEN
        await client.send(client.request(Command.BLOCK_STATUS, 0, len(payload), flags=flags), payload)
        chunks = await client.reply()
        if expected is None:
            assert [chunk.error for chunk in chunks] == [errno.EINVAL]
        else:
            assert [struct.unpack_from(">I", chunk.payload)[0] for chunk in chunks] == expected
        assert await read(client, 0, 10) == bytes(10)


# --- failures -------------------------------------------------------------------------------------


class FailingNode(MemoryNode):
    """Every operation fails with `number`."""

    number = errno.EIO

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        raise RequestError(self.number, "the disk is on fire")

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        raise OSError(self.number, os.strerror(self.number))

    async def _flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("number", "wire"),
    [
        (errno.EIO, errno.EIO),
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EDQUOT, errno.ENOSPC),
        (errno.EFBIG, errno.ENOSPC),
        (errno.EROFS, errno.EPERM),
        (errno.ENOMEM, errno.ENOMEM),
        (errno.ENOENT, errno.EINVAL),
        (errno.ENOTSUP, errno.EINVAL),
    ],
)
async def test_errors_reach_the_client_under_the_wires_numbers(style: str, number: int, wire: int) -> None:
    node = FailingNode(bytearray(SIZE))
    node.number = number
    async with one_client(node, style=style) as client:
        assert await client.result(client.request(Command.READ, 0, 10)) == wire
        assert await client.result(write(client, 0, b"x" * 10)) == wire
        assert await client.result(client.request(Command.FLUSH)) == wire
        node.number = 0
        node.__class__ = MemoryNode


async def test_a_structured_error_says_why() -> None:
    node = FailingNode(bytearray(SIZE))
    async with one_client(node) as client:
        await client.send(client.request(Command.READ, 0, 10))
        (chunk,) = await client.reply()
        assert b"the disk is on fire" in chunk.payload
        node.__class__ = MemoryNode


async def test_fast_zero_alone_may_be_told_enotsup() -> None:
    class Slow(MemoryNode):
        async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
            raise RequestError(errno.ENOTSUP)

    async with one_client(Slow(bytearray(b"x" * SIZE))) as client:
        fast = client.request(Command.WRITE_ZEROES, 0, SIZE, flags=CommandFlag.FAST_ZERO)
        assert await client.result(fast) == errno.ENOTSUP
        assert await read(client, 0, 5) == b"xxxxx"
        assert await client.result(client.request(Command.WRITE_ZEROES, 0, SIZE)) == 0
        assert await read(client, SIZE - 5, 5) == bytes(5)


# --- durability -----------------------------------------------------------------------------------


class RecordingNode(PlainNode):
    """Notes what is made durable."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.durable: list[str] = []

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        await super()._write(offset, data, fua=fua)
        if fua:
            self.durable.append("fua")

    async def _flush(self) -> None:
        self.durable.append("flush")


@pytest.mark.parametrize("style", STYLES)
async def test_fua_and_flush_reach_the_node(style: str) -> None:
    node = RecordingNode()
    async with one_client(node, style=style) as client:
        assert await client.result(write(client, 0, b"x" * 4096)) == 0
        assert node.durable == []
        assert await client.result(write(client, 0, b"x" * 4096, flags=CommandFlag.FUA)) == 0
        assert await client.result(write(client, 0, b"x" * 500_000, flags=CommandFlag.FUA)) == 0
        assert node.durable == ["fua", "fua"]
        assert await client.result(client.request(Command.FLUSH)) == 0
        assert await client.result(client.request(Command.TRIM, 0, 4096, flags=CommandFlag.FUA)) == 0
        zero = client.request(Command.WRITE_ZEROES, 0, 4096, flags=CommandFlag.FUA)
        assert await client.result(zero) == 0
        assert node.durable == ["fua", "fua", "flush", "flush", "flush"]


async def test_writethrough_makes_every_write_durable() -> None:
    node = RecordingNode()
    async with one_client(node, writethrough=True) as client:
        assert await client.result(write(client, 0, b"x" * 4096)) == 0
        assert await client.result(write(client, 0, b"x" * 500_000)) == 0
        assert node.durable == ["fua", "fua"]
        assert await client.result(client.request(Command.TRIM, 0, 4096)) == 0
        assert node.durable == ["fua", "fua", "flush"]


# --- replies interleave; clients do not harm each other ---------------------------------------------


class GatedNode(MemoryNode):
    """Reads below 4096 wait for the gate."""

    def __init__(self) -> None:
        super().__init__(bytearray(SIZE))
        self.gate = trio.Event()

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        if offset < 4096:
            await self.gate.wait()
        await super()._read_into(offset, buffer)


async def test_a_slow_request_does_not_hold_up_the_others() -> None:
    node = GatedNode()
    async with one_client(node) as client:
        await client.send(
            client.request(Command.READ, 0, 10, cookie=1), client.request(Command.READ, 4096, 10, cookie=2)
        )
        assert (await client.chunk()).cookie == 2
        node.gate.set()
        assert (await client.chunk()).cookie == 1


async def test_a_client_that_leaves_midway_harms_nobody() -> None:
    node = GatedNode()
    export = await NbdExport.open("", node)
    async with serving(export) as (_, address, log):
        good, bad = await connect(address), await connect(address)
        await good.go()
        await bad.go()
        await bad.send(bad.request(Command.READ, 0, 10), bad.request(Command.WRITE, 0, 1 << 20) + b"some")
        bad.stream.close()
        node.gate.set()
        for _ in range(50):
            assert await read(good, 8192, 100) == bytes(100)
        assert await read(good, 0, 4) == bytes(4)
        good.stream.close()
        assert not log.errors
    await export.aclose()


async def test_cve_2013_7441_port_scans_and_garbage_do_not_end_the_server() -> None:
    export = await NbdExport.open("", make("plain"))
    async with serving(export, persistent=False) as (_, address, log):
        for garbage in (b"", b"GET / HTTP/1.0\r\n\r\n", bytes(1000), b"\xff" * 5000):
            scanner = await connect(address)
            await scanner.send(garbage)
            scanner.stream.close()
        client = await connect(address)
        await client.go()
        assert await read(client, 0, 10) == bytes(10)
        client.stream.close()
        assert not log.errors
    await export.aclose()


async def test_the_server_ends_with_its_last_negotiated_client_unless_persistent() -> None:
    export = await NbdExport.open("", make("plain"))
    with trio.fail_after(20):
        async with serving(export, persistent=False) as (server, address, _):
            client = await connect(address)
            await client.go()
            await client.send(client.request(Command.DISC))
            assert await client.at_end()
            client.stream.close()
            while not server._stopping:
                await trio.lowlevel.checkpoint()
    await export.aclose()


async def test_cve_2024_7409_idle_clients_are_dropped_at_the_handshake_limit() -> None:
    export = await NbdExport.open("", make("plain"))
    async with serving(export, handshake_limit=0.05) as (_, address, log):
        idle = [await connect(address) for _ in range(20)]
        for client in idle:
            await client.receive(18)  # the greeting
            assert await client.at_end()
            client.stream.close()
        assert sum("too long" in event for event in log.events) == 20
    await export.aclose()


async def test_more_clients_than_allowed_wait_for_a_place() -> None:
    export = await NbdExport.open("", make("plain"))
    async with serving(export, max_clients=1) as (_, address, _):
        first, second = await connect(address), await connect(address)
        await first.go()
        with trio.move_on_after(0.05) as scope:
            await second.receive(1)
        assert scope.cancelled_caught
        first.stream.close()
        await second.go()
        second.stream.close()
    await export.aclose()


async def test_stopping_answers_what_is_in_flight() -> None:
    node = GatedNode()
    export = await NbdExport.open("", node)
    async with serving(export) as (server, address, _):
        client = await connect(address)
        await client.go()
        await client.send(client.request(Command.READ, 0, 10))
        await client.send(client.request(Command.READ, 4096, 10, cookie=2))
        assert (await client.chunk()).cookie == 2  # so the other is in flight as well
        server.stop()
        node.gate.set()
        assert (await client.chunk()).cookie == 7
        assert await client.at_end()
        client.stream.close()
    await export.aclose()


@pytest.mark.parametrize("style", STYLES)
async def test_replies_that_go_out_together_stay_whole_where_the_socket_is_full(style: str) -> None:
    """Made in one turn of the loop, they are far more than a socket takes."""
    node = GatedNode()
    node.content[:] = random.Random(0).randbytes(SIZE)
    length = 300001
    async with one_client(node, style=style) as client:
        await client.send(*(client.request(Command.READ, i, length, cookie=i) for i in range(30)))
        await trio.testing.wait_all_tasks_blocked()
        node.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        cookies = set()
        for _ in range(30):
            chunk = await client.chunk(length)
            assert chunk.payload[-length:] == node.content[chunk.cookie : chunk.cookie + length]
            cookies.add(chunk.cookie)
        assert cookies == set(range(30))


async def test_a_flood_of_slow_requests_is_bounded() -> None:
    """A client that asks for more than may be in flight is no longer read from; then all is answered."""
    node = GatedNode()
    async with one_client(node) as client:
        count = 200
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                client.send, *(client.request(Command.READ, 0, 1 << 20, cookie=i) for i in range(count))
            )
            await trio.testing.wait_all_tasks_blocked()
            assert len(node.requests._active) <= 32
            node.gate.set()
            cookies = set()
            for _ in range(count):
                cookies.add((await client.chunk()).cookie)
        assert cookies == set(range(count))


# --- data that is not in the page cache -----------------------------------------------------------


class FileBacked(PlainNode):
    """A disk on a real file system, whose pages can be dropped."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(len(content), flags=OpenFlags(discard=True))
        os.close(self.fd)
        path.write_bytes(content)
        self.fd = os.open(path, os.O_RDWR)

    def drop(self) -> None:
        os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("patience", [0, 8])
async def test_cold_reads_are_right_on_every_path(
    tmp_path: Path, style: str, patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Polled for by a lone client (after a few batches), or waited for by a thread."""
    monkeypatch.setattr(tasks, "COLD_PATIENCE", patience)
    content = os.urandom(SIZE)
    node = FileBacked(tmp_path / "disk", content)
    async with one_client(node, style=style) as client:
        for round_number in range(30):
            node.drop()
            length = (512, 4096, 65536)[round_number % 3]
            offsets = [(round_number * 7919 + number * 131_072) % (SIZE - length) for number in range(20)]
            await client.send(
                *(client.request(Command.READ, at, length, cookie=at) for at in offsets),
            )
            for _ in offsets:
                chunk = await client.chunk(length)
                assert chunk.done and not chunk.error
                assert chunk.payload[-length:] == content[chunk.cookie : chunk.cookie + length]
        assert await client.result(client.request(Command.TRIM, 0, SIZE)) == 0  # nothing is held


async def test_a_disconnect_right_behind_cold_reads_waits_for_their_replies(tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    node = FileBacked(tmp_path / "disk", content)
    async with one_client(node) as client:
        node.drop()
        await client.send(
            *(client.request(Command.READ, at, 4096, cookie=at) for at in range(0, SIZE, 1 << 18)),
            client.request(Command.DISC),
        )
        seen = set()
        for _ in range(0, SIZE, 1 << 18):
            chunk = await client.chunk()
            assert chunk.payload[8:] == content[chunk.cookie : chunk.cookie + 4096]
            seen.add(chunk.cookie)
        assert seen == set(range(0, SIZE, 1 << 18))
        assert await client.at_end()


async def test_a_file_cut_behind_our_back_reads_as_zeroes(tmp_path: Path) -> None:
    node = FileBacked(tmp_path / "disk", b"x" * SIZE)
    async with one_client(node, style="structured") as client:
        os.truncate(node.fd, 100_000)
        assert await read(client, 99_000, 4096) == b"x" * 1000 + bytes(3096)
        assert await read(client, 0, 1 << 20) == b"x" * 100_000 + bytes((1 << 20) - 100_000)


@pytest.mark.parametrize("style", STYLES)
async def test_a_file_system_without_sendfile_is_read_instead(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def sendfile(*arguments: object) -> int:
        asked.append(arguments)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "sendfile", sendfile)
    data = os.urandom(1 << 20)
    async with one_client(make("plain"), style=style) as client:
        assert await client.result(write(client, 0, data)) == 0
        assert await read(client, 0, len(data)) == data
        assert await read(client, 0, len(data)) == data
    assert len(asked) == 1


async def test_tracing_sees_every_request_and_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbdserve.trace import EVENTS, trace

    seen: list[tuple[str, object]] = []
    trace.enable(EVENTS, lambda name, **fields: seen.append((name, fields.get("cookie"))))
    try:
        async with one_client(make("plain")) as client:
            assert await client.result(write(client, 0, b"x" * 512, cookie=1)) == 0
            assert await client.result(write(client, 0, b"x" * 500_000, cookie=2)) == 0
            await client.send(client.request(Command.READ, 0, 512, cookie=3))
            await client.reply()
            await client.send(client.request(Command.READ, 0, 1 << 20, cookie=4))
            await client.reply()
            assert await client.result(client.request(Command.FLUSH, cookie=5)) == 0
            assert await client.result(client.request(99, cookie=6)) == errno.EINVAL
    finally:
        trace.enable((), lambda name, **fields: None)
    for cookie in range(1, 6):
        assert seen.count(("nbd_request", cookie)) == seen.count(("nbd_reply", cookie)) == 1
    assert ("nbd_request_failed", 6) in seen and ("nbd_reply", 6) not in seen
