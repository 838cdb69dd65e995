"""Who is let in, and what happens where nobody can be."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from drivers.testing.memory import MemoryNode
from drivers.wire.nbd.constants import Command
from nbdserve.exports.nbd import NbdExport
from nbdserve.server import Server
from tests.hostile.client import Client
from tests.hostile.conftest import Serve, tcp_listener, unix_listener, until
from tests.server.rawclient import QuietLog, RawClient, connect


def waits(client: Client) -> bool:
    """Whether the server leaves the client without a greeting."""
    client.socket.settimeout(0.1)
    try:
        return not client.socket.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        client.socket.settimeout(20)


async def test_a_place_that_becomes_free_is_free_for_every_socket(tmp_path: Path) -> None:
    """With one place and two sockets, clients of both wait; each must get in when its turn comes."""
    export = await NbdExport.open("", MemoryNode(bytearray(4096)))
    server = Server([export], log=QuietLog(), max_clients=1, persistent=True)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    with unix_listener(Path(paths[0])) as a, unix_listener(Path(paths[1])) as b, trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, [a, b])
            first = await connect(paths[0])
            await first.go()
            await trio.testing.wait_all_tasks_blocked()
            one, other = await connect(paths[0]), await connect(paths[1])
            await trio.testing.wait_all_tasks_blocked()
            served = []

            async def use(client: RawClient) -> None:
                await client.go()
                served.append(client)
                client.stream.close()

            first.stream.close()
            nursery.start_soon(use, one)
            nursery.start_soon(use, other)
            while len(served) < 2:
                await trio.lowlevel.checkpoint()
            server.stop()
    await export.aclose()


def test_places_are_given_back_whatever_happened(serve: Serve, disk: Path) -> None:
    """-e 3: after many clients who failed in every way, there are three places still, and not four."""
    server = serve("-t", "-e", "3", "-f", "raw", str(disk))
    for turn in range(60):
        client = server.connect()
        if turn % 3 == 0:
            client.socket.sendall(b"garbage" * 100)
        elif turn % 3 == 1:
            client.go()
            client.send(client.header(Command.WRITE, 0, 1 << 20), b"x" * 1000)
        client.socket.close()
    with contextlib.ExitStack() as cleanup:
        clients = [cleanup.enter_context(server.good()) for _ in range(3)]
        fourth = cleanup.enter_context(server.connect())
        assert waits(fourth)
        clients[0].socket.close()
        fourth.go()
        assert fourth.read(0, 10) == b"x" * 10


def test_without_descriptors_those_inside_are_served_and_later_ones_when_there_is_room(
    serve: Serve, disk: Path
) -> None:
    """EMFILE in accept."""
    limit = 40
    server = serve(
        "-t", "-e", "0", "-f", "raw", str(disk),
        setup=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )  # fmt: skip
    server.check()
    before = server.descriptors()
    with server.good() as good:
        with contextlib.ExitStack() as cleanup:
            crowd = [cleanup.enter_context(server.connect()) for _ in range(100)]
            until(lambda: server.descriptors() >= limit - 1)
            for _ in range(100):
                assert good.read(0, 4096) == bytes(4096)
            assert waits(crowd[-1])
        server.check()
    server.settle(before)


async def test_a_listening_socket_that_fails_for_ever_does_not_stop_the_loop() -> None:
    """Whoever handed the socket over may shut it down; accept() then fails each time at once."""
    export = await NbdExport.open("", MemoryNode(bytearray(4096)))
    server = Server([export], log=QuietLog())
    with tcp_listener() as listener, trio.fail_after(10):
        listener.shutdown(socket.SHUT_RDWR)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, [listener])
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            server.stop()
    await export.aclose()


def test_one_thousand_clients_at_once(serve: Serve, disk: Path) -> None:
    server = serve(
        "-t", "-e", "0", "-f", "raw", str(disk),
        setup=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)),
    )  # fmt: skip
    server.check()
    descriptors, idle = server.descriptors(), server.memory()
    assert idle < 60 << 20
    with contextlib.ExitStack() as cleanup:
        clients = [cleanup.enter_context(server.good()) for _ in range(1000)]
        for number, client in enumerate(clients):
            client.send(client.begin(Command.WRITE, 512 * number, data=number.to_bytes(512, "big")))
        for client in clients:
            assert client.reply().error == 0
        for number, client in enumerate(reversed(clients)):
            assert client.read(512 * number, 512) == number.to_bytes(512, "big")
        each = (server.memory("VmHWM") - idle) / 1000
        assert each < 64 << 10, f"{each:.0f} bytes for each client"
        assert server.descriptors() >= 1000
    server.settle(descriptors)
    server.check()


def test_an_idle_server_is_small(serve: Serve, disk: Path) -> None:
    server = serve("-t", "-e", "0", "-f", "raw", str(disk), listener=tcp_listener())
    server.check()
    assert server.memory() < 60 << 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_cve_2015_0847_a_storm_of_signals_ends_it_cleanly(serve: Serve, number: int) -> None:
    """A signal only says that it came: however many come while clients are at work."""
    server = serve()
    with server.good() as client:
        client.send(*(client.begin(Command.WRITE, 0, data=b"x" * 4096, cookie=i) for i in range(500)))
        for _ in range(50):
            server.process.send_signal(number)
        assert client.at_end()
        assert server.end() == ""


async def test_a_client_accepted_while_the_server_stops_does_not_hold_it_up() -> None:
    export = await NbdExport.open("", MemoryNode(bytearray(4096)))
    server = Server([export], log=QuietLog(), max_clients=0, handshake_limit=0)
    ours, theirs = socket.socketpair()
    with ours, theirs, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            server.stop()
            nursery.start_soon(server._client, theirs)
    await export.aclose()
