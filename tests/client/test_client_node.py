"""The block driver `nbd`."""

from __future__ import annotations

import errno
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.errors import Error, OptionError, RequestError
from drivers.options.nbd_uri import parse_nbd_uri
from drivers.protocol.nbd.reconnect import difference
from drivers.wire.nbd.client_handshake import Export
from drivers.wire.nbd.constants import TransmissionFlag

MiB = 1 << 20


@asynccontextmanager
async def opened(uri: str, flags: OpenFlags | None = None, **options: Any) -> AsyncIterator[Node]:
    tree = parse_nbd_uri(uri).to_options() | options
    node = await Graph(Catalog()).open(tree, flags or OpenFlags(discard=True))
    try:
        yield node
    finally:
        await node.aclose()


@asynccontextmanager
async def lost_at_close(uri: str, **options: Any) -> AsyncIterator[Node]:
    """opened() for a server that does not live to see the flush at the end."""
    with pytest.raises(RequestError):
        async with opened(uri, **options) as node:
            yield node


@pytest.mark.peer("qemu-nbd")
async def test_reads_writes_zeroes_and_extents(peers: Any, image: Path) -> None:
    content = bytearray(await trio.Path(image).read_bytes())
    async with opened(peers.qemu_nbd(image, "--discard=unmap")) as node:
        buffer = bytearray(MiB)
        await node.read_into(0, buffer)
        assert buffer == content
        await node.write(100, b"text", fua=True)
        await node.write_zeroes(512 << 10, 4096, fua=True)
        await node.discard(768 << 10, 4096)
        await node.flush()
        await node.cache(0, 4096)
        await node.read_into(0, memoryview(buffer)[:1000])
        content[100:104] = b"text"
        assert buffer == content
        extents = await node.block_status(0, MiB)
        assert sum(extent.length for extent in extents) == MiB
        assert extents[0].flags == ExtentFlags.DATA
        assert ExtentFlags.ZERO in [extent.flags for extent in extents]


@pytest.mark.peer("nbdkit")
async def test_block_sizes_become_limits_and_smaller_requests_work(peers: Any) -> None:
    uri = peers.nbdkit(
        "--filter=blocksize-policy",
        "memory",
        "1M",
        "blocksize-minimum=4096",
        "blocksize-preferred=65536",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    )
    async with opened(uri) as node:
        assert (node.limits.request_alignment, node.limits.max_transfer) == (4096, MiB)
        await node.write(5, b"unaligned")
        buffer = bytearray(11)
        await node.read_into(4, buffer)
        assert buffer == b"\0unaligned\0"


@pytest.mark.peer("nbdkit")
async def test_a_server_without_zeroing_and_status_is_good_enough(peers: Any) -> None:
    filters = ("--filter=nozero", "--filter=noextents")
    async with opened(peers.nbdkit("--no-sr", *filters, "memory", "1M")) as node:
        await node.write(0, b"x" * 8192, fua=True)
        await node.write_zeroes(0, 4096)
        buffer = bytearray(8192)
        await node.read_into(0, buffer)
        assert buffer == bytes(4096) + b"x" * 4096
        assert await node.block_status(0, MiB) == [Extent(MiB, ExtentFlags.DATA, host_offset=0)]


@pytest.mark.peer("nbd-server")
async def test_a_server_without_fua_is_flushed_instead(peers: Any, image: Path) -> None:
    async with opened(peers.nbd_server(image, "flush = true")) as node:
        await node.write(0, b"durable", fua=True)
    assert (await trio.Path(image).read_bytes()).startswith(b"durable")


@pytest.mark.peer("qemu-nbd")
async def test_a_read_only_export(peers: Any, image: Path) -> None:
    uri = peers.qemu_nbd(image, "-r")
    with pytest.raises(OptionError, match="write access denied"):
        async with opened(uri):
            pass
    async with opened(uri, OpenFlags(auto_read_only=True)) as node:
        assert node.flags.read_only
        with pytest.raises(RequestError):
            await node.write(0, b"x")


@pytest.mark.peer("qemu-nbd")
async def test_options(peers: Any, image: Path) -> None:
    uri = peers.qemu_nbd(image, "-x", "disk")
    async with opened(uri, export="disk") as node:
        assert node.size == MiB
    for options, reason in (
        ({}, "not available"),
        ({"export": "x" * 4097}, "too long"),
        ({"export": "disk", "x-dirty-bitmap": "qemu:dirty-bitmap:b"}, "not found"),
        ({"export": "disk", "tls-creds": "tls0"}, "TLS is not supported yet"),
        ({"export": "disk", "nonsense": "1"}, "nonsense"),
    ):
        with pytest.raises(Error, match=reason):
            async with opened(uri, **options):
                pass


@pytest.mark.peer("qemu-nbd")
async def test_without_reconnect_delay_a_loss_is_eio_and_the_next_request_tries_again(
    peers: Any, image: Path
) -> None:
    async with lost_at_close(peers.qemu_nbd(image)) as node:
        peers.stop(signal.SIGKILL)
        with pytest.raises(RequestError) as caught:
            await node.read_into(0, bytearray(512))
        assert caught.value.errno == errno.EIO
        with pytest.raises(RequestError, match=r"reset|refused|closed"):
            await node.read_into(0, bytearray(512))


@pytest.mark.peer("qemu-nbd", "nbdkit")
async def test_requests_in_flight_survive_a_restart(peers: Any, image: Path) -> None:
    uri = peers.nbdkit("--filter=delay", "file", str(image), "delay-read=60", "delay-write=60")
    async with opened(uri, **{"reconnect-delay": 10}) as node:
        buffer = bytearray(4096)
        with trio.fail_after(9):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.read_into, 0, buffer)
                nursery.start_soon(node.write, 8192, b"new" * 100)
                await trio.testing.wait_all_tasks_blocked()
                peers.stop(signal.SIGKILL)
                (peers.directory / "0.sock").unlink()
                peers.pid_files.clear()
                await trio.to_thread.run_sync(peers.qemu_nbd, image)
        now = await trio.Path(image).read_bytes()
        assert buffer == now[:4096]
        assert now[8192:8492] == b"new" * 100


@pytest.mark.peer("nbdkit")
async def test_reconnect_delay_ends(peers: Any) -> None:
    async with lost_at_close(peers.nbdkit("memory", "1M"), **{"reconnect-delay": 1}) as node:
        peers.stop(signal.SIGKILL)
        started = trio.current_time()
        with pytest.raises(RequestError):
            await node.read_into(0, bytearray(512))
        assert 0.9 < trio.current_time() - started < 5


@pytest.mark.peer("nbdkit")
async def test_a_server_that_comes_back_with_another_size_is_refused(peers: Any) -> None:
    async with lost_at_close(peers.nbdkit("memory", "1M"), **{"reconnect-delay": 1}) as node:
        peers.stop(signal.SIGKILL)
        (peers.directory / "0.sock").unlink(missing_ok=True)
        peers.pid_files.clear()
        peers.nbdkit("memory", "2M")
        with pytest.raises(RequestError, match="size is 2097152 instead of 1048576"):
            await node.read_into(0, bytearray(512))


@pytest.mark.peer("nbdkit")
async def test_open_timeout_waits_for_the_server(peers: Any) -> None:
    uri = f"nbd+unix:///?socket={peers.directory}/0.sock"
    with pytest.raises(RequestError, match="No such file"):
        async with opened(uri):
            pass
    async with trio.open_nursery() as nursery:

        async def use() -> None:
            async with opened(uri, **{"open-timeout": 10}) as node:
                assert node.size == MiB

        nursery.start_soon(use)
        await trio.testing.wait_all_tasks_blocked()
        await trio.to_thread.run_sync(peers.nbdkit, "memory", "1M")


def test_what_a_returning_server_may_change() -> None:
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FUA
    before = Export("", MiB, flags, contexts={"a:b": 1})
    same = replace(before, flags=flags | TransmissionFlag.SEND_FLUSH, contexts={"a:b": 2, "c:d": 1})
    assert difference(before, same) == ""
    for change in (
        {"size": MiB - 1},
        {"flags": TransmissionFlag.HAS_FLAGS},
        {"flags": flags | TransmissionFlag.READ_ONLY},
        {"minimum_block": 512},
        {"maximum_payload": 4096},
        {"contexts": {}},
    ):
        assert difference(before, replace(before, **change))  # type: ignore[arg-type]
