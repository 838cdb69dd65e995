"""Metadata contexts of an export: block status in the terms of the protocol."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from drivers.block.dirty import DirtyBitmap
from drivers.block.extents import Extent, ExtentFlags
from drivers.block.node import Node
from drivers.wire.nbd.constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY,
    MAX_EXTENTS,
    AllocationState,
)

# (length in bytes, status) of neighbouring runs.
Statuses = list[tuple[int, int]]


class Context(Protocol):
    async def describe(self, node: Node, offset: int, length: int, *, alignment: int = 1) -> Statuses:
        """A range of `node`: at least one run, perhaps not all of it. `alignment` is the block size
        that the client was promised: every run is a multiple of it, but for the image's end."""
        ...


@dataclass(frozen=True, slots=True)
class ExtentContext:
    """`status` says what an extent is; `combined` what a block is that two extents share."""

    status: Callable[[Extent], int]
    combined: Callable[[int, int], int]

    async def describe(self, node: Node, offset: int, length: int, *, alignment: int = 1) -> Statuses:
        extents = await node.block_status(offset, length)
        pairs = ((extent.length, self.status(extent)) for extent in extents)
        return _joined(_whole_blocks(pairs, alignment, self.combined))


@dataclass(frozen=True, slots=True)
class BitmapContext:
    """What is dirty in a bitmap, be it of the node or of one below it."""

    bitmap: DirtyBitmap

    async def describe(self, node: Node, offset: int, length: int, *, alignment: int = 1) -> Statuses:
        pairs = itertools.islice(self._runs(offset, length), MAX_EXTENTS)
        return _joined(_whole_blocks(pairs, alignment, operator.or_))

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        inside = max(0, min(length, self.bitmap.size - offset))
        for run, dirty in self.bitmap.runs(offset, inside):
            yield run, DIRTY if dirty else 0
        if inside < length:
            yield length - inside, 0  # a backing file's bitmap ends where that does


def _whole_blocks(
    pairs: Iterable[tuple[int, int]], alignment: int, combined: Callable[[int, int], int]
) -> Iterable[tuple[int, int]]:
    partial, partial_status = 0, 0
    for length, status in pairs:
        if partial:
            # The block that began with the extents before.
            filled = min(length, alignment - partial)
            partial_status = combined(partial_status, status)
            partial += filled
            length -= filled
            if partial == alignment:
                yield partial, partial_status
                partial = 0
        whole = length // alignment * alignment
        if whole:
            yield whole, status
        if length > whole:
            partial, partial_status = length - whole, status
    if partial:
        yield partial, partial_status


def _allocation_state(extent: Extent) -> int:
    state = 0
    if not extent.flags & ExtentFlags.DATA:
        state |= AllocationState.HOLE
    if extent.flags & ExtentFlags.ZERO:
        state |= AllocationState.ZERO
    return state


def _joined(pairs: Iterable[tuple[int, int]]) -> Statuses:
    out: Statuses = []
    for length, status in pairs:
        if out and out[-1][1] == status:
            out[-1] = out[-1][0] + length, status
        else:
            out.append((length, status))
    return out


CONTEXTS: Mapping[str, Context] = {
    # What one part of a block has and the other has not, the block has not.
    BASE_ALLOCATION: ExtentContext(_allocation_state, operator.and_),
    # What a layer is too short for counts as its own here.
    ALLOCATION_DEPTH: ExtentContext(lambda extent: extent.depth or extent.short, max),
}
