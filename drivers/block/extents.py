"""What lies where in a node: runs of data, zeroes and nothing at all."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntFlag
from typing import NamedTuple, TypeAlias

# Guest bytes that are plain bytes of a host file: (file descriptor, offset in that file, length).
# A negative descriptor means that they read as zeroes. A bare tuple, since the hot path makes one
# for every request.
Span: TypeAlias = tuple[int, int, int]


class ExtentFlags(IntFlag):
    """`DATA`: storage is behind it. `ZERO`: it reads as zeroes. `COMPRESSED`: not plain."""

    DATA = 1 << 0
    ZERO = 1 << 1
    COMPRESSED = 1 << 2


class Extent(NamedTuple):
    """`length` bytes of one kind.

    `depth` counts the layers down to the one that decides: 0 nobody has it (it reads as zeroes),
    1 this image, 2 its backing file and so on. `host_offset` is where the bytes lie plain in the
    host file, if they do. `short`, where nobody has it: the layer that would have it, were it not too
    short for that; 0 if none would.
    """

    length: int
    flags: ExtentFlags
    depth: int = 1
    host_offset: int | None = None
    short: int = 0


def joins(first: Extent, second: Extent) -> bool:
    """Whether `second`, lying right behind `first`, merely continues it."""
    if first.flags != second.flags or first.depth != second.depth or first.short != second.short:
        return False
    if first.host_offset is None or second.host_offset is None:
        return first.host_offset is second.host_offset
    return first.host_offset + first.length == second.host_offset


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The same extents with neighbours of one kind joined."""
    out: list[Extent] = []
    for extent in extents:
        if out and joins(out[-1], extent):
            out[-1] = out[-1]._replace(length=out[-1].length + extent.length)
        else:
            out.append(extent)
    return out


def clipped(extents: Iterable[Extent], length: int) -> list[Extent]:
    """The first `length` bytes of `extents`."""
    out: list[Extent] = []
    for extent in extents:
        if length <= 0:
            break
        out.append(extent if extent.length <= length else extent._replace(length=length))
        length -= extent.length
    return out
