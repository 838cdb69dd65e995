"""Finding the zeroes in what was read."""

from __future__ import annotations

from collections.abc import Iterator

# Compared with so many at once.
_ZEROES = bytes(64 << 10)


def data_runs(
    buffer: bytearray, length: int, *, granule: int, minimum: int, phase: int = 0
) -> Iterator[tuple[int, int]]:
    """(start, end) of what in the first `length` bytes is worth writing: everything but runs of at
    least `minimum` zero bytes that are made of whole granules.

    `granule` is a power of two; granules begin where position + `phase` is a multiple of it, and the
    last may be cut short. Zeroes up to the end count, however few they are.
    """
    start = 0
    for zero_start, zero_end in _zero_runs(buffer, length, granule, phase):
        if zero_end - zero_start < minimum and zero_end < length:
            continue
        if zero_start > start:
            yield start, zero_start
        start = zero_end
    if start < length:
        yield start, length


def _zero_runs(buffer: bytearray, length: int, granule: int, phase: int) -> Iterator[tuple[int, int]]:
    """The maximal runs of zero granules, or of all that there is."""
    if _zero_end(buffer, 0, length) == length:
        yield 0, length
        return
    needle = bytes(granule) if granule > len(_ZEROES) else _ZEROES[:granule]
    first = -phase % granule
    last = length - (length + phase) % granule
    # A word of each granule tells for most of them that they are not zero.
    words = memoryview(buffer)[first:last].cast("Q")[:: granule // 8].tolist() if first < last else []
    position = first
    while (index := _index(words, (position - first) // granule)) >= 0:
        start = first + index * granule
        position = start + granule
        if buffer[start:position] == needle:
            position = end = _zero_end(buffer, start, length)
            if end < length:
                position = end = end - (end + phase) % granule
            yield start, end
    if position < length and 0 < last < length and _zero_end(buffer, last, length) == length:
        yield last, length


def _index(words: list[int], start: int) -> int:
    """The first zero from `start` on, or -1."""
    try:
        return words.index(0, start)
    except ValueError:
        return -1


def _zero_end(buffer: bytearray, start: int, length: int) -> int:
    """Where the zeroes that begin at `start` end."""
    while start < length:
        part = buffer[start : min(length, start + len(_ZEROES))]
        if part != _ZEROES[: len(part)]:
            return start + len(part) - len(part.lstrip(b"\0"))
        start += len(part)
    return length
