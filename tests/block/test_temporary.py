"""The temporary overlay's copying up, block status and fast path."""

from __future__ import annotations

import os

import pytest
import trio

from drivers.block.extents import ExtentFlags
from drivers.block.node import OpenFlags
from drivers.errors import OptionError
from drivers.filter.temporary import CLUSTER_SIZE, TemporaryOverlay
from drivers.testing.memory import MemoryNode

SIZE = 5 * CLUSTER_SIZE + 700


async def overlay() -> tuple[TemporaryOverlay, MemoryNode]:
    below = MemoryNode(bytearray(os.urandom(SIZE)), flags=OpenFlags(read_only=True))
    return await TemporaryOverlay.over(below, OpenFlags()), below


async def test_depth_tells_what_was_written() -> None:
    node, _ = await overlay()
    await node.write(CLUSTER_SIZE + 5, b"x")
    found, offset = [], 0
    while offset < SIZE:
        for extent in await node.block_status(offset, SIZE - offset):
            found.append((extent.length, extent.depth, extent.flags))
            offset += extent.length
    assert found == [
        (CLUSTER_SIZE, 2, ExtentFlags.DATA),
        (CLUSTER_SIZE, 1, ExtentFlags.DATA),
        (SIZE - 2 * CLUSTER_SIZE, 2, ExtentFlags.DATA),
    ]
    await node.aclose()


async def test_only_written_clusters_may_be_written_in_place() -> None:
    node, _ = await overlay()
    assert node.plain_write(0, 512) is None
    await node.write(100, b"x")
    (span,) = node.plain_write(0, CLUSTER_SIZE) or ()
    assert span[1:] == (0, CLUSTER_SIZE)
    assert node.plain_write(CLUSTER_SIZE - 512, 1024) is None
    await node.aclose()


async def test_writes_side_by_side_into_one_cluster_all_survive() -> None:
    node, below = await overlay()
    model = bytearray(below.content)
    async with trio.open_nursery() as nursery:
        for number in range(64):
            offset = number * 1000 + 7
            model[offset : offset + 500] = bytes([number]) * 500
            nursery.start_soon(node.write, offset, bytes([number]) * 500)
    buffer = bytearray(SIZE)
    await node.read_into(0, buffer)
    assert buffer == model
    await node.aclose()


async def test_a_directory_that_does_not_exist_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    below = MemoryNode(bytearray(512), flags=OpenFlags(read_only=True))
    with pytest.raises(OptionError, match="Could not create a temporary file in '/nonexistent'"):
        await TemporaryOverlay.over(below, OpenFlags())
