"""Sockets as the whole program uses them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from drivers.errors import ProtocolError
from drivers.net.stream import UNIX_SEND_BUFFER, Stream


async def test_what_is_sent_in_pieces_is_received_whole() -> None:
    left, right = map(Stream, socket.socketpair())
    data = bytes(range(256)) * 40_000  # more than the buffers hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, data)
        assert await right.receive_exactly(len(data)) == data
    left.close()
    right.close()


async def test_an_early_end_is_a_protocol_error() -> None:
    left, right = map(Stream, socket.socketpair())
    await left.send_all(b"half")
    left.close()
    with pytest.raises(ProtocolError, match="closed"):
        await right.receive_exactly(5)
    right.close()


async def test_tcp_peers_are_prompt_and_their_death_is_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stream = Stream(socket.create_connection(listener.getsockname()))
        assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        stream.close()


async def test_unix_sockets_hold_a_large_reply() -> None:
    left, right = map(Stream, socket.socketpair())
    limit = Path("/proc/sys/net/core/wmem_max").read_text()
    expected = 2 * min(int(limit), UNIX_SEND_BUFFER)  # the kernel doubles what it is told
    assert left.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == expected
    left.close()
    right.close()
