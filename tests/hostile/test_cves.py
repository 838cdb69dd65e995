"""Lessons from other servers' vulnerabilities that no other file here has by its name already.

In tests/server: 2005-3534, 2013-7441, 2024-7409; in tests/wire: 2017-15118, 2017-15119, 2020-10761,
2022-26495; beside this file: 2015-0847, 2017-10664, 2024-7409.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from errno import EINVAL
from pathlib import Path

import pytest

from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import OPTION_MAGIC, Command, CommandFlag, Option, OptionReply
from tests.hostile.client import STYLES, Client, counted
from tests.hostile.conftest import Serve, Served

GIB = 1 << 30


@pytest.mark.parametrize("length", [(32 << 20) + 1, (1 << 31) - 1, 1 << 31, 0xFFFFFFFF])
def test_cve_2011_0530_requests_beyond_the_limit_are_refused_again(server: Served, length: int) -> None:
    """The fix of 2005-3534 was lost once; so for reads and for writes."""
    server.check()
    before = server.memory()
    with server.good() as client:
        assert client.call(Command.READ, 0, length).error == EINVAL
        client.send(client.begin(Command.WRITE, 0, length), bytes(1 << 20))
        assert server.memory() - before < 16 << 20
    server.check()


def test_cve_2011_1925_a_failed_negotiation_ends_only_itself(serve: Serve, disk: Path) -> None:
    """Not persistent: clients that never negotiated do not count as the last one."""
    server = serve("-e", "5", "-f", "raw", str(disk))
    for name in (b"", b"wrong", b"x" * 4096):
        with server.connect() as client:
            client.greet()
            client.send(messages.OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, 5), b"wrong")
            assert client.at_end()
        with server.connect() as client:
            client.greet()
            client.option(Option.GO, counted(name + b"!") + b"\0\0")
    with server.good() as client:
        assert client.read(0, 10) == bytes(10)
        client.disconnect()
    assert server.end() == ""


@pytest.mark.parametrize(
    "payload", [b"\xff\xff\xff\xff", b"\xff\xff\xff\xff" + b"x" * 100, b"\x7f\xff\xff\xff\0\0"]
)
def test_cve_2022_26496_a_name_longer_than_its_option(server: Served, payload: bytes) -> None:
    with server.connect() as client:
        client.greet()
        for option in (Option.INFO, Option.GO):
            assert client.option(option, payload)[-1][0] == OptionReply.ERR_INVALID
        for option in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
            assert client.option(option, payload)[-1][0] >> 31
        assert client.option(Option.GO, counted(b"") + b"\0\0")[-1][0] == OptionReply.ACK
    server.check()


def test_cve_2017_7539_leaving_at_any_point_of_the_negotiation(server: Served) -> None:
    with server.connect() as client:
        client.greet()
        name = counted(b"")
        stream = b"\0\0\0\3" + b"".join(
            messages.OPTION.pack(OPTION_MAGIC, number, len(payload)) + payload
            for number, payload in [
                (Option.LIST, b""),
                (Option.STRUCTURED_REPLY, b""),
                (Option.SET_META_CONTEXT, name + b"\0\0\0\1" + counted(b"base:allocation")),
                (Option.GO, name + b"\0\0"),
            ]
        )
    before = server.descriptors()
    for length in range(len(stream)):
        with server.connect() as client:
            client.send(stream[:length])
    with server.connect() as client:
        client.greet()
        assert client.option(Option.ABORT)[-1][0] == OptionReply.ACK
        assert client.at_end()
    server.check()
    server.settle(before)


def test_cve_2017_9524_a_port_scan_does_not_end_a_server_with_one_place(serve: Serve, disk: Path) -> None:
    server = serve("-t", "-f", "raw", str(disk))
    for _ in range(200):
        server.connect().socket.close()
    server.check()


def test_cve_2019_14850_nothing_happens_to_the_image_before_go(server: Served, disk: Path) -> None:
    """Whoever only connects, asks or lists costs neither a descriptor more nor a read of the image."""
    server.check()
    before = server.descriptors()
    reads = _io(server)
    with server.connect() as client:
        client.greet()
        client.option(Option.LIST)
        client.option(Option.INFO, counted(b"") + b"\0\0")
        assert server.descriptors() == before + 1
    assert _io(server) - reads < 1 << 16


def _io(server: Served) -> int:
    """Bytes that the process has read by system calls."""
    lines = Path(f"/proc/{server.pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_cve_2019_14851_options_may_come_twice_and_in_any_order(server: Served) -> None:
    """The fix of 2019-14850 let a second round of options hit an assertion."""
    name = counted(b"")
    options = [
        (Option.INFO, name + b"\0\0"),
        (Option.LIST, b""),
        (Option.STRUCTURED_REPLY, b""),
        (Option.SET_META_CONTEXT, name + b"\0\0\0\1" + counted(b"base:allocation")),
        (Option.INFO, counted(b"other") + b"\0\0"),
    ]
    for order in itertools.permutations(options, 4):
        with server.connect() as client:
            client.greet()
            for number, payload in (*order, *order):
                assert client.option(number, payload)
            assert client.option(Option.GO, name + b"\0\0")[-1][0] == OptionReply.ACK
    server.check()


def test_cve_2021_3716_starttls_without_tls_keeps_nothing_and_what_follows_is_not_trusted(
    server: Served,
) -> None:
    """It is refused, and what came behind it in the same packet is read as the options that they are."""
    with server.connect() as client:
        client.greet()
        starttls = messages.OPTION.pack(OPTION_MAGIC, Option.STARTTLS, 0)
        injected = messages.OPTION.pack(OPTION_MAGIC, Option.STRUCTURED_REPLY, 0)
        client.send(starttls + injected)
        answers = [messages.OPTION_REPLY.unpack(client.receive(20)) for _ in range(1)]
        client.receive(answers[0][3])
        answers.append(messages.OPTION_REPLY.unpack(client.receive(20)))
        assert [(option, kind) for _, option, kind, _ in answers] == [
            (Option.STARTTLS, OptionReply.ERR_POLICY),
            (Option.STRUCTURED_REPLY, OptionReply.ACK),
        ]
        client.style = "structured"
        assert client.option(Option.STARTTLS, b"data")[-1][0] >> 31
        # A TLS hello in clear, as if it had been accepted, ends the session.
        client.send(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(32))
        assert client.at_end()
    server.check()


BASE = [b"base:allocation"]


def _extents(client: Client, offset: int, length: int) -> list[tuple[int, int]]:
    reply = client.call(Command.BLOCK_STATUS, offset, length)
    assert reply.error == 0
    extents = reply.extents[1]
    assert all(extent > 0 for extent, _ in extents)
    assert sum(extent for extent, _ in extents) <= length
    return extents


@pytest.fixture
def sparse(serve: Serve, tmp_path: Path) -> Iterator[Served]:
    """5 GiB and a bit; data in the middle, across 4 GiB and in the last bytes."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(5 * GIB + 1536)
        for offset in (GIB, 4 * GIB - 65536, 4 * GIB, 5 * GIB):
            file.seek(offset)
            file.write(b"x" * (1536 if offset == 5 * GIB else 65536))
    return serve("-t", "-e", "0", "-f", "raw", str(path))


@pytest.mark.parametrize("style", STYLES[1:])
def test_cve_2025_47711_block_status_at_the_very_end(sparse: Served, style: str) -> None:
    with sparse.connect().go(style, BASE) as client:
        size = client.size
        assert size == 5 * GIB + 1536
        for length in (1, 511, 512, 1536):
            assert _extents(client, size - length, length) == [(length, 0)]
        for offset, length in [(size, 1), (size - 1, 2), (size - 512, 513), (size - 1, 0xFFFFFFFF)]:
            assert client.call(Command.BLOCK_STATUS, offset, length).error == EINVAL
        assert client.call(Command.BLOCK_STATUS, size, 0).error == EINVAL
        one = client.call(Command.BLOCK_STATUS, size - 1, 1, flags=CommandFlag.REQ_ONE)
        assert one.extents == {1: [(1, 0)]}


@pytest.mark.parametrize("style", STYLES[1:])
def test_cve_2025_47712_block_status_across_32_bit_boundaries(sparse: Served, style: str) -> None:
    with sparse.connect().go(style, BASE) as client:
        limit = client.size if style == "extended" else 0xFFFFFFFF
        for start in (0, 1, GIB, GIB + 65536, 2 * GIB - 1, 4 * GIB - 1, 4 * GIB, 4 * GIB + 1):
            at = start
            while at < client.size:
                asked = min(at + limit, client.size)
                for length, status in _extents(client, at, min(limit, client.size - at)):
                    assert status == (0 if _is_data(at) else 3), at
                    assert length == _run(at, asked)
                    at += length
            assert at == client.size


_DATA = [(GIB, GIB + 65536), (4 * GIB - 65536, 4 * GIB + 65536), (5 * GIB, 5 * GIB + 1536)]


def _is_data(at: int) -> bool:
    return any(begin <= at < end for begin, end in _DATA)


def _run(at: int, limit: int) -> int:
    edges = (edge for pair in _DATA for edge in pair if edge > at)
    return min(next(edges, limit), limit) - at


@pytest.mark.parametrize("style", STYLES[1:])
def test_cve_2025_47712_a_disk_of_several_tib(serve: Serve, style: str) -> None:
    size = 5 << 40
    server = serve("-t", "-e", "0", "--image-opts", f"driver=null-co,size={size},read-zeroes=on")
    with server.connect().go(style, BASE) as client:
        assert client.size == size
        for offset in (0, (1 << 32) - 1, 1 << 32, (1 << 41) + 1, size - 0xFFFFFFFF):
            assert _extents(client, offset, 0xFFFFFFFF)[0][0] == 0xFFFFFFFF
            assert client.read(offset, 70_000) == bytes(70_000)
            assert client.call(Command.WRITE_ZEROES, offset, 0xFFFFFFFF).error == 0
            assert client.call(Command.TRIM, offset, 0xFFFFFFFF).error == 0
        if style == "extended":
            assert _extents(client, 0, size)[0][0] == size
            assert client.call(Command.TRIM, 0, size).error == 0
            assert client.call(Command.TRIM, 1, size).error == EINVAL
            assert client.call(Command.BLOCK_STATUS, 0, (1 << 64) - 1).error == EINVAL
        assert client.call(Command.READ, size - 1, 2).error == EINVAL
