"""Where a file has data and where it has holes, by SEEK_DATA and SEEK_HOLE."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from drivers.block.extents import Extent, ExtentFlags, Span
from drivers.block.node import MAX_EXTENTS

# A read that is cut into more pieces than this gains nothing from knowing the holes.
MAX_SPANS = 16


def _runs(fd: int, offset: int, end: int) -> Iterator[tuple[bool, int]]:
    """(is data, length) of the runs from `offset` to `end`; a filesystem that does not tell has
    data everywhere, and behind the end of the file all is hole."""
    while offset < end:
        try:
            hole = os.lseek(fd, offset, os.SEEK_HOLE)
            data = hole if hole > offset else os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            yield error.errno != errno.ENXIO, end - offset
            return
        # Neither a hole nor data begins here: the file is changing under us. Call it data.
        stop = min(end, max(hole, data)) if max(hole, data) > offset else end
        yield data <= hole, stop - offset
        offset = stop


def extents(fd: int, offset: int, length: int) -> list[Extent]:
    """At most MAX_EXTENTS extents from `offset` on. Blocks: call it in a thread."""
    out: list[Extent] = []
    for is_data, run in _runs(fd, offset, offset + length):
        out.append(Extent(run, ExtentFlags.DATA if is_data else ExtentFlags.ZERO, host_offset=offset))
        if len(out) == MAX_EXTENTS:
            break
        offset += run
    return out


def spans(fd: int, offset: int, length: int) -> list[Span]:
    """The range as spans, holes as zeroes; what follows MAX_SPANS of them is taken for data."""
    end = offset + length
    out: list[Span] = []
    for is_data, run in _runs(fd, offset, end):
        if len(out) == MAX_SPANS - 1:
            out.append((fd, offset, end - offset))
            break
        out.append((fd, offset, run) if is_data else (-1, 0, run))
        offset += run
    return out
