"""Garbage, floods, clients that vanish: again and again, and nothing may pile up."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from errno import EINVAL, ENOSPC
from pathlib import Path

import pytest

from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import MAX_OPTION_PAYLOAD, OPTION_MAGIC, Command, CommandFlag, Option
from tests.hostile.client import STYLES, counted
from tests.hostile.conftest import SIZE, Serve, Served, tcp_listener, until

MIB = 1 << 20
# One client may make the server hold a request's payload of 32 MiB, and its buffers.
FOR_ONE_CLIENT = 48 * MIB
# What repeating an attack may leave behind: the allocator's spare memory.
LEFT_BEHIND = 8 * MIB
REPEAT = 50

Attack = Callable[[Served], None]


def garbage(server: Served) -> None:
    random_bytes = random.Random(1).randbytes
    for client_flags in (b"", b"\0\0\0\3"):
        with server.connect() as client, contextlib.suppress(OSError):
            client.send(client_flags + random_bytes(4000))
            assert client.at_end()


def wrong_protocols(server: Served) -> None:
    for opening in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0",
        b"SSH-2.0-x\r\n",
        b"\xff" * 64,
    ):
        with server.connect() as client, contextlib.suppress(OSError):
            client.send(opening)
            assert client.at_end()


def port_scan(server: Served) -> None:
    for _ in range(5):
        server.connect().socket.close()


def reset(server: Served) -> None:
    """RST instead of FIN, on TCP; at several points of a session."""
    for stage in range(4):
        client = server.connect()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if stage:
            client.go()
        if stage == 2:
            client.send(client.header(Command.WRITE, 0, MIB), b"x" * 5000)
        if stage == 3:
            client.send(client.header(Command.READ, 0, 32 * MIB) * 10)
        client.socket.close()


def options_of_every_kind(server: Served) -> None:
    """Lengths that lie, names beyond every limit, numbers that nobody knows."""
    with server.connect() as client:
        client.greet()
        for number in (0, 4, 12, 99, 0x7FFFFFFF, 0xFFFFFFFF):
            assert client.option(number, b"x" * 100)[-1][0] >> 31
        for name in (b"x" * 4096, b"x" * 4097, b"x" * 60_000, b"\xff\xfe", b"%s%n" * 100):
            for option in (Option.INFO, Option.GO):
                assert client.option(option, counted(name) + b"\0\0")[-1][0] >> 31
        for payload in (
            b"",
            b"\0",
            b"\xff" * 4,
            b"\xff" * 100,
            b"\0\0\0\0\xff\xff",
            counted(b"") + b"\0\2\0\0",
        ):
            for option in (Option.INFO, Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
                assert client.option(option, payload)[-1][0] >> 31
        assert client.option(Option.LIST, b"x" * 65537)[-1][0] >> 31
        assert client.option(Option.ABORT)


def options_that_are_cut_off(server: Served) -> None:
    for length in (1, 100, MAX_OPTION_PAYLOAD):
        with server.connect() as client:
            client.greet()
            client.send(messages.OPTION.pack(OPTION_MAGIC, Option.GO, length), b"x" * min(length - 1, 70_000))


def bad_requests(server: Served) -> None:
    for style in STYLES:
        with server.good(style) as client:
            for offset, length in [
                (SIZE, 1),
                (SIZE - 1, 2),
                ((1 << 64) - 1, 1),
                ((1 << 64) - 4096, 4096),
                (1 << 63, 5),
                (0xFFFFFFFF, 0xFFFFFFFF),
                (1 << 32, 1),
            ]:
                for command in (Command.READ, Command.TRIM, Command.CACHE, Command.BLOCK_STATUS):
                    assert client.call(command, offset, length).error == EINVAL
                assert client.call(Command.WRITE_ZEROES, offset, length).error == ENOSPC
            for command in (8, 9, 255, 0xFFFF):
                assert client.call(command).error == EINVAL
            for flag in (1 << 6, 1 << 15):
                assert client.call(Command.READ, 0, 4096, flags=flag).error == EINVAL
            assert client.read(0, 10)


def writes_cut_off(server: Served) -> None:
    for style in STYLES:
        for length in (4096, 200_000, 32 * MIB):
            client = server.good(style)
            client.send(client.header(Command.WRITE, 0, length), b"x" * min(length - 1, 100_000))
            client.socket.close()


def reads_never_read(server: Served) -> None:
    """Far more is asked for than the socket holds; then the client is gone."""
    for style in STYLES:
        client = server.good(style)
        client.send(
            client.header(Command.READ, 0, 32 * MIB) * 100, client.header(Command.READ, 0, 65536) * 100
        )
        client.socket.close()


def killed(server: Served) -> None:
    """kill -9 while reading and writing."""
    script = (
        "import sys; from tests.hostile.client import Client; a = sys.argv[1]\n"
        "c = Client(a if a[0] == '/' else ('127.0.0.1', int(a))).go()\n"
        "block = c.header(1, 0, 100000) + bytes(100000) + c.header(0, 0, 1 << 20) * 3\n"
        "c.send(block); print(flush=True)\n"
        "while True: c.send(block)\n"
    )
    address = server.address if isinstance(server.address, str) else str(server.address[1])
    with subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.kill()


ATTACKS = [
    garbage, wrong_protocols, port_scan, reset, options_of_every_kind, options_that_are_cut_off, bad_requests,
    writes_cut_off, reads_never_read,
]  # fmt: skip


@pytest.mark.parametrize("attack", [*ATTACKS, killed])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_attacks_leave_nothing_behind(serve: Serve, attack: Attack, transport: str) -> None:
    server = serve(listener=tcp_listener() if transport == "tcp" else None)
    server.check()
    descriptors = server.descriptors()
    for _ in range(5):
        attack(server)
    server.check()
    server.settle(descriptors)
    memory = server.memory()
    for _ in range(3 if attack is killed else REPEAT):
        attack(server)
    server.check()
    server.settle(descriptors)
    assert server.memory() - memory < LEFT_BEHIND


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_client_that_asks_and_never_reads_costs_a_bounded_amount(
    serve: Serve, style: str, transport: str
) -> None:
    """Whatever it asks for. The highest the server's memory ever was is bounded, too."""
    server = serve(listener=tcp_listener() if transport == "tcp" else None)
    server.check()
    before = server.memory()
    payload = b"\xaa" * 100_000
    with contextlib.ExitStack() as cleanup:
        clients = []
        for command, length, flags in [
            (Command.READ, 32 * MIB, 0),
            (Command.READ, 65536, 0),
            (Command.READ, 0, 0),
            (Command.WRITE, 100_000, CommandFlag.FUA),
            (Command.WRITE, 100_000, 0),
            (Command.FLUSH, 0, 0),
            (Command.TRIM, 4096, CommandFlag.FUA),
            (Command.WRITE_ZEROES, 4096, 0),
            (Command.BLOCK_STATUS, SIZE, 0),
            (Command.CACHE, SIZE, 0),
            (99, 0, 0),
        ]:
            client = cleanup.enter_context(server.good(style))
            data = payload if command == Command.WRITE else b""
            block = (client.header(command, 0, length, flags=flags) + data) * (1 if data else 2000)
            client.socket.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                for _ in range(300):
                    client.socket.sendall(block)
            clients.append(client)
            with server.good() as good:
                assert len(good.read(0, 4096)) == 4096
        assert server.memory("VmHWM") - before < FOR_ONE_CLIENT * len(clients)
        assert server.memory() - before < FOR_ONE_CLIENT
    server.check()


def test_a_flood_of_reads_that_the_disk_must_answer_costs_a_bounded_amount(
    serve: Serve, tmp_path: Path
) -> None:
    """2000 reads in one packet, none of them in the page cache: 125 MiB if all were held at once."""
    image = tmp_path / "cold"
    count, length = 2000, 65536
    with image.open("wb") as file:
        for number in range(count):
            file.write(number.to_bytes(8, "big") * (length // 8))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    server = serve("-t", "-e", "0", "-f", "raw", str(image))
    with server.good() as client:
        before = server.memory()
        asked = b"".join(client.begin(Command.READ, i * length, length, cookie=i) for i in range(count))
        sender = threading.Thread(target=client.send, args=(asked,))
        sender.start()
        cookies = set()
        for _ in range(count):
            reply = client.reply()
            assert not reply.error
            assert reply.data == reply.cookie.to_bytes(8, "big") * (length // 8)
            cookies.add(reply.cookie)
        sender.join()
        assert cookies == set(range(count))
    assert server.memory("VmHWM") - before < FOR_ONE_CLIENT
    server.check()


def test_half_sent_writes_hold_what_was_sent_not_what_was_announced(server: Served) -> None:
    """100 clients each announce 32 MiB with FUA, which the server must have whole, and send a little."""
    server.check()
    before = server.memory()
    with contextlib.ExitStack() as cleanup:
        for _ in range(100):
            client = cleanup.enter_context(server.good())
            client.send(client.header(Command.WRITE, 0, 32 * MIB, flags=CommandFlag.FUA), b"x" * 10_000)
        server.check()
        assert server.memory() - before < 100 * MIB


def test_slow_loris_one_thousand_handshakes_that_never_end(serve: Serve, disk: Path) -> None:
    """Each says a little and no more. A client at work is served all the while, new ones are let in,
    and at the limit all of them are gone."""
    server = serve("-t", "-e", "0", "--handshake-limit", "5", "-f", "raw", str(disk))
    server.check()
    descriptors = server.descriptors()
    openings = [b"", b"\0", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT", b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\xffx"]
    began = time.monotonic()
    with server.good() as good, contextlib.ExitStack() as cleanup:
        longest = 0.0
        for number in range(1000):
            loris = cleanup.enter_context(server.connect())
            loris.send(openings[number % len(openings)])
            asked = time.monotonic()
            assert len(good.read(0, 4096)) == 4096
            longest = max(longest, time.monotonic() - asked)
        until(lambda: server.descriptors() > 900)
        server.check()
        assert longest < 1
        assert server.memory() < 100 * MIB
        server.settle(descriptors + 1)
        assert time.monotonic() - began < 15
        assert len(good.read(0, 4096)) == 4096


def test_cve_2017_10664_a_client_gone_before_its_answer_is_no_signal(server: Served) -> None:
    """EPIPE in all three ways of sending: the batch, the sendfile and the task."""
    for request in [
        (Command.READ, 0, 4096), (Command.READ, 0, 4 * MIB), (Command.FLUSH, 0, 0), (Command.CACHE, 0, SIZE),
    ]:  # fmt: skip
        for _ in range(20):
            client = server.good()
            client.send(client.header(*request) * 50)
            client.socket.shutdown(socket.SHUT_RD)
            client.socket.close()
    server.check()
    assert server.process.poll() is None


def test_sigterm_under_load_loses_nothing_that_was_acknowledged(serve: Serve, disk: Path) -> None:
    """Writes with FUA from four connections until the server ends: each that was answered is there."""
    server = serve()
    clients = [server.good(style) for style in (*STYLES, "structured")]
    acknowledged: dict[int, bytes] = {}
    stopped = False
    blocks = [os.urandom(8192) for _ in range(64)]
    for turn in range(10_000):
        alive = False
        for number, client in enumerate(clients):
            place = turn * 4 + number
            offset, block = place % 4000 * 8192, blocks[place % 61]
            with contextlib.suppress(OSError, EOFError):
                if client.write(offset, block, CommandFlag.FUA if turn % 2 else 0) == 0:
                    acknowledged[offset] = block
                    alive = True
        if turn == 300:
            server.process.terminate()
            stopped = True
        if stopped and not alive:
            break
    assert server.end() == ""
    for client in clients:
        client.socket.close()
    assert len(acknowledged) > 300
    content = disk.read_bytes()
    assert all(content[offset : offset + 8192] == block for offset, block in acknowledged.items())


def test_sigterm_with_a_client_that_never_reads_ends_within_the_grace(server: Served) -> None:
    with server.good() as client:
        client.send(client.header(Command.READ, 0, 32 * MIB) * 10)
        began = time.monotonic()
        server.process.terminate()
        assert server.end() == ""
        assert time.monotonic() - began < 15
