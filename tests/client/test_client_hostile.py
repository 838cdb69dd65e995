"""Servers that lie: the caller's memory stays whole, everything in flight fails, nothing hangs."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

import nbdclient
from drivers.errors import ProtocolError, RequestError
from drivers.net.stream import Stream
from drivers.protocol.nbd import connection as connection_module
from drivers.protocol.nbd.connection import ClientConnection, perform
from drivers.wire.nbd import messages
from drivers.wire.nbd.client_handshake import Export, ReplyMode, Wishes, open_export
from drivers.wire.nbd.constants import (
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    ReplyType,
    TransmissionFlag,
)

Operation = Callable[[ClientConnection], Awaitable[Any]]


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool = False) -> bytes:
    return messages.STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload)) + payload


async def request(server: Stream) -> tuple[Any, ...]:
    """(magic, flags, command, cookie, offset, length) of the next request."""
    return messages.REQUEST.unpack(await server.receive_exactly(messages.REQUEST.size))


async def offend(connection: ClientConnection, server: Stream, operation: Operation, answer: Any) -> None:
    """One request is answered badly: it fails, and so does one that waits beside it."""
    reasons: list[str] = []

    async def suffer(operate: Operation) -> None:
        with pytest.raises(ProtocolError) as caught:
            await operate(connection)
        reasons.append(str(caught.value))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(suffer, operation)
            _, _, _, cookie, offset, _ = await request(server)
            nursery.start_soon(suffer, ClientConnection.flush)
            await request(server)
            await server.send_all(answer(cookie, offset))
        with pytest.raises(ProtocolError):
            await connection.flush()
    assert len(set(reasons)) == 1
    await connection.aclose()


async def test_libnbd_2019_10_data_outside_the_buffer_is_never_written(script: Any) -> None:
    surroundings = bytearray(300)
    view = memoryview(surroundings)[100:200]
    await offend(
        script.connection(),
        script.server,
        lambda connection: connection.read_into(4096, view),
        lambda cookie, offset: chunk(
            cookie, ReplyType.OFFSET_DATA, messages.OFFSET.pack(offset + 60) + b"x" * 60, done=True
        ),
    )
    assert surroundings == bytes(300)


async def test_libnbd_2023_07_extents_of_length_zero_do_not_loop(script: Any) -> None:
    await offend(
        script.connection(contexts={"base:allocation": 1}),
        script.server,
        lambda connection: connection.block_status(0, 4096),
        lambda cookie, _: chunk(cookie, ReplyType.BLOCK_STATUS, bytes([0, 0, 0, 1]) + bytes(8), done=True),
    )


async def test_unexpected_cookie(script: Any) -> None:
    await offend(
        script.connection(),
        script.server,
        lambda connection: connection.read_into(0, bytearray(10)),
        lambda cookie, _: chunk(cookie + 77, ReplyType.NONE, done=True),
    )


async def test_wrong_magic(script: Any) -> None:
    await offend(
        script.connection(),
        script.server,
        lambda connection: connection.read_into(0, bytearray(10)),
        lambda *_: b"\xde\xad\xbe\xef" * 8,
    )


async def test_overlapping_chunks(script: Any) -> None:
    await offend(
        script.connection(),
        script.server,
        lambda connection: connection.read_into(0, bytearray(10)),
        lambda cookie, offset: (
            2 * chunk(cookie, ReplyType.OFFSET_DATA, messages.OFFSET.pack(offset) + b"x" * 6)
        ),
    )


@pytest.mark.parametrize("length", [1 << 20, 0xFFFFFFFF])
async def test_cve_2017_2630_a_payload_larger_than_the_request_is_not_even_received(
    script: Any, length: int
) -> None:
    header = messages.STRUCTURED_REPLY
    await offend(
        script.connection(),
        script.server,
        lambda connection: connection.read_into(0, bytearray(10)),
        lambda cookie, offset: (
            header.pack(STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length) + messages.OFFSET.pack(offset)
        ),
    )


async def test_cve_2020_10761_an_error_text_longer_than_allowed_fails_only_its_request(script: Any) -> None:
    connection = script.connection()
    async with trio.open_nursery() as nursery:

        async def suffer() -> None:
            with pytest.raises(RequestError) as caught:
                await connection.read_into(0, bytearray(10))
            assert caught.value.errno == errno.EIO and len(str(caught.value)) == 4096

        nursery.start_soon(suffer)
        cookie = (await request(script.server))[3]
        text = b"x" * 60_000
        error = messages.ERROR.pack(errno.EIO, len(text)) + text
        await script.server.send_all(chunk(cookie, ReplyType.ERROR, error, done=True))
    assert connection.failure is None
    await connection.aclose()


@pytest.mark.parametrize("sent", [0, 10, 20, 25, 28, 33])
async def test_cve_2021_20286_the_end_in_the_middle_of_a_reply_is_an_error(script: Any, sent: int) -> None:
    connection = script.connection()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def suffer() -> None:
                with pytest.raises(ProtocolError, match="closed the connection"):
                    await connection.read_into(0, bytearray(100))

            nursery.start_soon(suffer)
            cookie = (await request(script.server))[3]
            whole = chunk(cookie, ReplyType.OFFSET_DATA, messages.OFFSET.pack(0) + bytes(100), done=True)
            await script.server.send_all(whole[:sent])
            script.server.close()
    await connection.aclose()


async def test_cve_2021_20286_a_server_that_leaves_while_we_send_is_an_error(script: Any) -> None:
    connection = script.connection(size=1 << 30)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def suffer() -> None:
                with pytest.raises(ProtocolError):
                    await connection.write(0, bytes(16 << 20))

            nursery.start_soon(suffer)
            await request(script.server)
            script.server.close()
        with pytest.raises(ProtocolError):
            await connection.flush()
    await connection.aclose()


@pytest.mark.parametrize("mode", [ReplyMode.SIMPLE, ReplyMode.STRUCTURED])
async def test_a_cancelled_reads_buffer_is_left_alone_and_the_connection_lives(
    script: Any, mode: ReplyMode
) -> None:
    connection = script.connection(mode)
    server = script.server
    buffer = bytearray(1000)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await connection.read_into(0, buffer)

            nursery.start_soon(read)
            cookie = (await request(server))[3]
            head = messages.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
            if mode is ReplyMode.STRUCTURED:
                data_length = messages.OFFSET.size + 1000
                head = messages.STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, 1, 1, cookie, data_length)
                head += messages.OFFSET.pack(0)
            await server.send_all(head + b"x" * 10)
            await trio.testing.wait_all_tasks_blocked()
            assert buffer.startswith(b"x" * 10)
            nursery.cancel_scope.cancel()
        before = bytes(buffer)
        await server.send_all(b"y" * 990)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.flush)
            cookie = (await request(server))[3]
            await server.send_all(messages.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
    assert buffer == before
    buffer.clear()  # nobody holds on to it
    await connection.aclose()


async def test_a_request_cancelled_half_sent_ends_the_connection(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SEND_GRACE", 0.01)
    connection = script.connection(size=1 << 30)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.write, 0, bytes(16 << 20))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(ProtocolError, match="cancelled while it was being sent"):
            await connection.flush()
    await connection.aclose()


async def test_a_request_cancelled_half_sent_goes_out_if_the_server_takes_it(script: Any) -> None:
    connection = script.connection(size=1 << 30)
    size = 4 << 20
    with trio.fail_after(5):
        async with trio.open_nursery() as outer:
            scope = trio.CancelScope()

            async def write() -> None:
                with scope:
                    await connection.write(0, bytes(size))

            outer.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            cookie = (await request(script.server))[3]
            await script.server.receive_exactly(size)
        await script.server.send_all(chunk(cookie, ReplyType.NONE, done=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.flush)
            cookie = (await request(script.server))[3]
            await script.server.send_all(chunk(cookie, ReplyType.NONE, done=True))
    await connection.aclose()


async def test_what_the_flags_do_not_offer_is_refused_here(script: Any) -> None:
    connection = script.connection(flags=TransmissionFlag.HAS_FLAGS, minimum_block=512)
    for operation in (
        connection.flush(),
        connection.trim(0, 512),
        connection.cache(0, 512),
        connection.write_zeroes(0, 512),
        connection.write(0, bytes(512), fua=True),
        connection.block_status(0, 512),
    ):
        with pytest.raises(RequestError, match="does not offer") as caught:
            await operation
        assert caught.value.errno == errno.ENOTSUP
    for operation, code in (
        (connection.read_into(1, bytearray(512)), errno.EINVAL),
        (connection.read_into(0, bytearray(100)), errno.EINVAL),
        (connection.read_into(1 << 20, bytearray(512)), errno.EINVAL),
        (connection.write(1 << 20, bytes(512)), errno.ENOSPC),
    ):
        with pytest.raises(RequestError) as caught:
            await operation
        assert caught.value.errno == code
    await connection.aclose()
    assert (await request(script.server))[2] == Command.DISC
    assert await script.server.receive_into(memoryview(bytearray(1))) == 0


async def test_flags_mean_nothing_without_has_flags(script: Any) -> None:
    connection = script.connection(flags=TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_TRIM)
    with pytest.raises(RequestError, match="does not offer trim"):
        await connection.trim(0, 1)
    await connection.aclose()


async def test_large_requests_are_split_to_the_servers_payload(script: Any) -> None:
    connection = script.connection(ReplyMode.SIMPLE, maximum_payload=4096 + 100, minimum_block=512)
    content = bytes(range(256)) * 40
    async with trio.open_nursery() as nursery:
        buffer = bytearray(len(content))
        nursery.start_soon(connection.read_into, 512, buffer)
        ranges = []
        while sum(length for _, length in ranges) < len(content):
            _, _, _, cookie, offset, length = await request(script.server)
            ranges.append((offset, length))
            data = content[offset - 512 :][:length]
            await script.server.send_all(messages.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie) + data)
    assert ranges == [(512, 4096), (4608, 4096), (8704, 2048)]
    assert buffer == content
    await connection.aclose()


async def test_a_handshake_cut_into_single_bytes(script: Any) -> None:
    greeting = messages.GREETING.pack(NBD_MAGIC, OPTION_MAGIC, 3)
    info = messages.INFO_EXPORT.pack(0, 4096, 1)
    answers = messages.OPTION_REPLY.pack(OPTION_REPLY_MAGIC, 7, 3, len(info)) + info
    answers += messages.OPTION_REPLY.pack(OPTION_REPLY_MAGIC, 7, 1, 0)
    results: list[Export] = []

    async def shake() -> None:
        wishes = Wishes(extended=False, structured=False)
        results.append(await perform(script.stream, open_export(wishes)))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shake)
            for byte in greeting + answers:
                await script.server.send_all(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
    assert results[0].size == 4096


@pytest.mark.parametrize("greeting", [b"", b"NBD", b"SSH-2.0-OpenSSH_9.2\r\n", bytes(1000)])
async def test_something_else_than_an_nbd_server_is_one_clear_error(tmp_path: Any, greeting: bytes) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen()

    async def serve() -> None:
        await trio.lowlevel.wait_readable(listener)
        peer, _ = listener.accept()
        peer.send(greeting)
        peer.close()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with pytest.raises(ProtocolError):
                async with nbdclient.connect(f"nbd+unix:///?socket={tmp_path}/sock"):
                    pass
    listener.close()
