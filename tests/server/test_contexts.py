"""Block status in the protocol's terms: whole blocks of the size that the client was promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.block.extents import Extent, ExtentFlags
from drivers.testing.memory import MemoryNode
from nbdserve.exports.contexts import CONTEXTS

DATA, HOLE, ZERO_DATA = (
    ExtentFlags.DATA,
    ExtentFlags.ZERO,
    ExtentFlags.DATA | ExtentFlags.ZERO,
)


class Described(MemoryNode):
    def __init__(self, extents: list[Extent]) -> None:
        super().__init__(bytearray(sum(extent.length for extent in extents)))
        self.extents = extents

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        return self.extents


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([Extent(1000, DATA), Extent(24, HOLE)], [(1024, 0)]),
        ([Extent(1024, DATA), Extent(1024, HOLE)], [(1024, 0), (1024, 3)]),
        ([Extent(100, HOLE), Extent(924, ZERO_DATA), Extent(512, DATA)], [(512, 2), (512, 2), (512, 0)]),
        ([Extent(700, HOLE), Extent(10, DATA), Extent(826, HOLE)], [(512, 3), (512, 0), (512, 3)]),
    ],
)
async def test_a_block_is_only_what_all_of_it_is(
    extents: list[Extent], expected: list[tuple[int, int]]
) -> None:
    node = Described(extents)
    runs = await CONTEXTS["base:allocation"].describe(node, 0, node.size, alignment=512)
    joined: list[tuple[int, int]] = []
    for length, status in expected:
        if joined and joined[-1][1] == status:
            joined[-1] = joined[-1][0] + length, status
        else:
            joined.append((length, status))
    assert runs == joined


@given(st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([DATA, HOLE, ZERO_DATA])), min_size=1))
async def test_blocks_cover_everything_and_are_whole(runs: list[tuple[int, ExtentFlags]]) -> None:
    node = Described([Extent(length, flags) for length, flags in runs])
    described = await CONTEXTS["base:allocation"].describe(node, 0, node.size, alignment=512)
    assert sum(length for length, _ in described) == node.size
    assert all(length % 512 == 0 for length, _ in described[:-1])
