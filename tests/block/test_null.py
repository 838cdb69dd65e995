"""The `null-co` driver."""

from __future__ import annotations

import pytest
import trio.testing

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.graph import Graph
from drivers.catalog import Catalog
from drivers.errors import RequestError


async def test_the_default_is_one_gibibyte() -> None:
    node = await Graph(Catalog()).open({"driver": "null-co"})
    assert node.size == 1 << 30
    assert await node.block_status(0, node.size) == [Extent(1 << 30, ExtentFlags.DATA)]
    await node.aclose()


async def test_it_reads_as_zeroes_and_forgets() -> None:
    node = await Graph(Catalog()).open({"driver": "null-co", "size": "1M", "read-zeroes": "on"})
    await node.write(0, b"x" * 512, fua=True)
    await node.write_zeroes(0, 512, fast=True)
    await node.flush()
    buffer = bytearray(b"another client's data")
    await node.read_into(0, buffer)
    assert buffer == bytes(len(buffer))
    assert node.plain(5, 4096) == [(-1, 0, 4096)]
    assert node.plain_write(5, 4096) is None
    assert await node.block_status(0, 4096) == [Extent(4096, ExtentFlags.ZERO)]
    with pytest.raises(RequestError):
        await node.read_into(1 << 20, bytearray(1))
    await node.truncate(100)
    assert node.size == 100
    await node.aclose()


async def test_latency_delays_every_request(autojump_clock: trio.testing.MockClock) -> None:
    node = await Graph(Catalog()).open({"driver": "null-co", "latency-ns": "2500000000"})
    assert node.plain(0, 512) is None
    start = trio.current_time()
    await node.read_into(0, bytearray(512))
    await node.write(0, b"x")
    assert trio.current_time() - start == pytest.approx(5)
    await node.aclose()
