"""An image whose length is no multiple of 512 bytes is shown with zeroes behind its end."""

from __future__ import annotations

import errno

import pytest

from drivers.block.extents import ExtentFlags
from drivers.errors import RequestError
from drivers.filter.pad import PadNode
from drivers.testing.memory import MemoryNode


async def padded(size: int) -> tuple[PadNode, MemoryNode]:
    child = MemoryNode(bytearray(b"x" * size))
    return await PadNode.over(child), child


@pytest.mark.parametrize(("size", "shown"), [(1000, 1024), (1, 512), (1024, 1024), (1025, 1536)])
async def test_the_size_is_rounded_up_and_the_rest_is_zero(size: int, shown: int) -> None:
    node, child = await padded(size)
    assert node.size == shown
    buffer = bytearray(shown)
    await node.read_into(0, buffer)
    assert buffer == b"x" * size + bytes(shown - size)
    await node.aclose()
    assert child.closed


async def test_the_last_bytes_can_be_written_and_zeroes_behind_them_too() -> None:
    node, child = await padded(1000)
    await node.write(990, b"y" * 10 + bytes(24), fua=True)
    await node.write(1010, bytes(14))
    assert child.content == b"x" * 990 + b"y" * 10
    await node.write_zeroes(900, 124)
    assert child.content == b"x" * 900 + bytes(100)
    await node.aclose()


@pytest.mark.parametrize("offset", [990, 1000, 1023])
async def test_data_behind_the_end_is_refused_whole(offset: int) -> None:
    node, child = await padded(1000)
    with pytest.raises(RequestError) as caught:
        await node.write(offset, b"y" * (1024 - offset))
    assert caught.value.errno == errno.ENOSPC
    assert child.content == b"x" * 1000
    await node.aclose()


async def test_status_ends_in_a_hole() -> None:
    node, _ = await padded(1000)
    extents = await node.block_status(0, 1024)
    assert [(extent.length, extent.flags) for extent in extents] == [
        (1000, ExtentFlags.DATA),
        (24, ExtentFlags.ZERO),
    ]
    (tail,) = await node.block_status(1010, 14)
    assert (tail.length, tail.flags) == (14, ExtentFlags.ZERO)
    await node.aclose()
