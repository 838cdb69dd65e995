"""A client that never lets the server rest must not keep the others waiting.

Each attack runs in a process of its own, as fast as it can, for as long as the test looks on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import MAX_OPTION_PAYLOAD, OPTION_MAGIC, Command, Option
from tests.hostile.client import Client
from tests.hostile.conftest import Address, Serve, Served, until

# What a good client may have to wait for one small read, seconds. A turn is a millisecond, the rest
# is a busy machine.
PATIENCE = 1

Attack = Callable[[Client], Iterator[bytes]]


def options_without_end(client: Client) -> Iterator[bytes]:
    client.greet()
    block = (messages.OPTION.pack(OPTION_MAGIC, Option.LIST, 0)) * 4096
    while True:
        yield block


def options_too_long(client: Client) -> Iterator[bytes]:
    client.greet()
    payload = bytes(MAX_OPTION_PAYLOAD)
    while True:
        yield messages.OPTION.pack(OPTION_MAGIC, 99, len(payload)) + payload


def tiny_reads(client: Client) -> Iterator[bytes]:
    client.go("simple")
    block = client.header(Command.READ, 0, 1) * 10000
    while True:
        yield block


def long_reads(client: Client) -> Iterator[bytes]:
    client.go("simple")
    block = client.header(Command.READ, 0, 32 << 20) * 9000
    while True:
        yield block


def long_writes(client: Client) -> Iterator[bytes]:
    client.go("simple")
    block = client.header(Command.WRITE, 0, 32 << 20) + bytes(32 << 20)
    while True:
        yield block


def a_write_of_4_gib(client: Client) -> Iterator[bytes]:
    """Refused, but to stay in step the server must drop all of it."""
    client.go("simple")
    piece = bytes(8 << 20)
    while True:
        yield client.header(Command.WRITE, 0, 0xFFFFFFFF)
        for _ in range(511):
            yield piece
        yield piece[:-1]


def bad_requests(client: Client) -> Iterator[bytes]:
    client.go("structured")
    block = client.header(Command.READ, 1 << 63, 1) * 9000
    while True:
        yield block


def flushes(client: Client) -> Iterator[bytes]:
    client.go("structured")
    block = client.header(Command.FLUSH) * 9000
    while True:
        yield block


ATTACKS = [
    options_without_end, options_too_long, tiny_reads, long_reads, long_writes, a_write_of_4_gib,
    bad_requests, flushes,
]  # fmt: skip


def _attack(address: Address, attack: Attack, begun: object) -> None:
    """Send all that `attack` yields, and drop the answers as fast as they come."""
    client = Client(address)
    blocks = attack(client)
    first = next(blocks)
    reader = threading.Thread(target=client.at_end, daemon=True)
    reader.start()
    with contextlib.suppress(OSError):
        client.socket.sendall(first[: 64 << 10])
        begun.set()  # type: ignore[attr-defined]
        client.socket.sendall(first[64 << 10 :])
        for block in blocks:
            client.socket.sendall(block)


@contextlib.contextmanager
def attacking(server: Served, attack: Attack) -> Iterator[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=_attack, args=(server.address, attack, begun), daemon=True)
    process.start()
    try:
        assert begun.wait(20)
        yield process  # type: ignore[misc]
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_client_that_never_rests_does_not_hold_up_the_others(server: Served, attack: Attack) -> None:
    server.check()
    with server.good() as client, attacking(server, attack) as attacker:
        longest = 0.0
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            began = time.monotonic()
            client.read(4096, 4096)
            longest = max(longest, time.monotonic() - began)
        began = time.monotonic()
        server.good().socket.close()
        longest = max(longest, time.monotonic() - began)
        assert attacker.is_alive()
        assert longest < PATIENCE
    server.check()


@pytest.mark.parametrize("attack", [options_without_end, options_too_long])
def test_cve_2024_7409_a_client_that_talks_on_meets_the_handshake_limit(
    serve: Serve, disk: Path, attack: Attack
) -> None:
    """The limit must hold for those who never pause, too."""
    server = serve("-t", "--handshake-limit", "1", "-e", "0", "-f", "raw", str(disk))
    server.check()
    before = server.descriptors()
    with attacking(server, attack):
        server.settle(before)
    until(lambda: server.descriptors() == before)
