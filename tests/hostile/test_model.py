"""Random valid requests, many in flight at once, against a bytearray: the whole way from the socket to
the file and back, in every style of reply."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivers.wire.nbd.constants import Command, CommandFlag
from tests.hostile.client import STYLES, Client
from tests.hostile.conftest import SIZE, Serve, Served

# Lengths around every threshold of the server's: inline, sendfile, streaming, the receive buffer.
EDGES = [1, 511, 4096, 65535, 65536, 65537, 131072, 131073, 262115, 262144, 262145, 1 << 20, 5 << 20]
LENGTHS = st.one_of(st.sampled_from(EDGES), st.integers(1, 300_000))
COMMANDS = st.sampled_from(
    [Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM, Command.BLOCK_STATUS, Command.CACHE]
)
# One request: what, how long, how far behind the one before, with FUA, what it writes.
STEPS = st.tuples(COMMANDS, LENGTHS, st.integers(0, 100_000), st.booleans(), st.integers(0, 1 << 32))
# Requests of a batch lie one behind the other, so that their order does not matter.
BATCHES = st.lists(st.lists(STEPS, min_size=1, max_size=24), min_size=1, max_size=4)


@pytest.fixture(params=["raw", "probed", "writethrough"])
def served(serve: Serve, disk: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """The fast path; one that must look at some writes; every write made durable."""
    options = {"raw": ["-f", "raw"], "probed": [], "writethrough": ["-f", "raw", "--cache=writethrough"]}
    server = serve("-t", "-e", "0", "--discard=unmap", *options[request.param], str(disk))
    yield server
    said = server.end()
    assert not said or said.startswith("WARNING: Image format was not specified")


@pytest.mark.parametrize("style", STYLES)
@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batches=BATCHES, begin=st.integers(0, SIZE - 1))
def test_requests_in_flight_together_agree_with_the_model(
    served: Served, style: str, batches: list[list[tuple[Command, int, int, bool, int]]], begin: int
) -> None:
    contexts = () if style == "simple" else (b"base:allocation",)
    with served.connect().go(style, contexts) as client:
        assert client.call(Command.WRITE_ZEROES, 0, SIZE).error == 0
        model = bytearray(SIZE)
        for batch in batches:
            _run_batch(client, model, batch, begin)
        for offset in range(0, SIZE, 16 << 20):
            assert client.read(offset, 16 << 20) == model[offset : offset + (16 << 20)]
        assert client.flush() == 0


def _run_batch(
    client: Client, model: bytearray, batch: list[tuple[Command, int, int, bool, int]], begin: int
) -> None:
    expected: dict[int, tuple[Command, bytes, int]] = {}
    message = []
    trimmed = []
    at = begin
    for cookie, (command, length, gap, fua, seed) in enumerate(batch):
        at = (at + gap) % SIZE
        if at + length > SIZE:
            break  # what follows might lie over what came before
        if command == Command.BLOCK_STATUS and client.style == "simple":
            command = Command.CACHE
        data = random.Random(seed).randbytes(length) if command == Command.WRITE else b""
        flags = CommandFlag.FUA if fua else CommandFlag(0)
        message.append(client.begin(command, at, length, data=data, flags=flags, cookie=cookie))
        expected[cookie] = command, bytes(model[at : at + length]), length
        if command == Command.WRITE:
            model[at : at + length] = data
        elif command == Command.TRIM:
            trimmed.append((at, length))
        elif command == Command.WRITE_ZEROES:
            model[at : at + length] = bytes(length)
        at += length
    # Meanwhile answers are taken, or both sides would wait for the other to read.
    sender = threading.Thread(target=client.send, args=message)
    sender.start()
    while expected:
        reply = client.reply()
        command, content, length = expected.pop(reply.cookie)
        assert reply.error == 0
        if command == Command.READ:
            assert reply.data == content
        elif command == Command.BLOCK_STATUS:
            extents = reply.extents[1]
            assert all(extent for extent, _ in extents)
            assert sum(extent for extent, _ in extents) <= length
            position = 0
            for extent, status in extents:
                if status & 2:
                    assert not any(content[position : position + extent])
                position += extent
    sender.join()
    for at, length in trimmed:
        # Of each discarded byte the server chooses: it is kept, or it is zero from now on.
        content = client.read(at, length)
        assert not content.strip(b"\0") or all(
            new in (0, old) for new, old in zip(content, model[at : at + length], strict=True)
        )
        model[at : at + length] = content
