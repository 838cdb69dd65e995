"""Metadata contexts of an export: block status in the terms of the protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.node import Node
from drivers.wire.nbd.constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    AllocationState,
)

# (length in bytes, status) of neighbouring runs.
Statuses = list[tuple[int, int]]
# Describes a range of a node; may describe less of it, never nothing.
Context = Callable[[Node, int, int], Awaitable[Statuses]]


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


async def base_allocation(node: Node, offset: int, length: int) -> Statuses:
    extents = await node.block_status(offset, length)
    return _joined((extent.length, _allocation_state(extent)) for extent in extents)


async def allocation_depth(node: Node, offset: int, length: int) -> Statuses:
    extents = await node.block_status(offset, length)
    return _joined((extent.length, extent.depth) for extent in extents)


CONTEXTS: dict[str, Context] = {
    BASE_ALLOCATION: base_allocation,
    ALLOCATION_DEPTH: allocation_depth,
}
