"""Stretches of table entries that can be dealt with at once: those of sequential writes, and holes."""

from __future__ import annotations

from array import array


def stretch_end(entries: array[int], at: int, end: int, step: int) -> int:
    """Up to where, `end` at most, each entry from `at` on is its predecessor plus `step`: the least that
    can be said, since the search does not look at single entries where it can help it."""
    at, value = at + 1, entries[at] + step
    if at >= end or entries[at] != value:
        return at
    size, growing = 1, True
    while at < end and size:
        size = min(size, end - at)
        if entries[at : at + size] == ramp(value, size, step):
            at += size
            value += size * step
            size = size * 4 if growing else size // 2
        else:
            growing = False
            size //= 2
    return at


def ramp(first: int, count: int, step: int) -> array[int]:
    """`count` entries, each its predecessor plus `step`."""
    if not step:
        return array("Q", (first,)) * count
    return array("Q", range(first, first + count * step, step))
