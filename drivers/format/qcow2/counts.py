"""The counts of a refcount block, as numbers and as they lie in the file."""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence
from typing import TypeAlias

_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


class Packed(MutableSequence[int]):
    """Counts narrower than a byte, the lowest bits first."""

    def __init__(self, data: bytes | bytearray, order: int) -> None:
        self.data = bytearray(data)
        self._order = order
        self._mask = (1 << (1 << order)) - 1
        self._per_byte = 3 - order

    def __len__(self) -> int:
        return len(self.data) << self._per_byte

    def _place(self, index: int) -> tuple[int, int]:
        return index >> self._per_byte, (index & ((1 << self._per_byte) - 1)) << self._order

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return array("B", [self[at] for at in range(*index.indices(len(self)))])
        byte, shift = self._place(index)
        return self.data[byte] >> shift & self._mask

    def __setitem__(self, index, value) -> None:  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            for at, single in zip(range(*index.indices(len(self))), value, strict=True):
                self[at] = single
            return
        byte, shift = self._place(index)
        self.data[byte] = self.data[byte] & ~(self._mask << shift) | value << shift

    def __delitem__(self, index) -> None:  # type: ignore[no-untyped-def]
        raise TypeError("a refcount block has a fixed length")

    def insert(self, index: int, value: int) -> None:
        raise TypeError("a refcount block has a fixed length")


Counts: TypeAlias = "array[int] | Packed"


def unpack_counts(data: bytes | bytearray, order: int) -> Counts:
    """The counts of a refcount block."""
    if order < 3:
        return Packed(data, order)
    counts = array(_TYPECODES[order], bytes(data))
    counts.byteswap()
    return counts


def pack_counts(counts: Counts) -> bytes:
    if isinstance(counts, Packed):
        return bytes(counts.data)
    swapped = counts[:]
    swapped.byteswap()
    return swapped.tobytes()


def uniform(counts: array[int]) -> int | None:
    """The value that all of `counts`, at least one, have; None if they differ."""
    return counts[0] if counts == counts[:1] * len(counts) else None


def changed(counts: array[int], delta: int, maximum: int) -> tuple[array[int], int | None]:
    """`counts` with `delta` added, and where the first is that this takes out of its range."""
    value = uniform(counts)
    if value is not None and 0 <= value + delta <= maximum:
        return array(counts.typecode, (value + delta,)) * len(counts), None
    for at, value in enumerate(counts):
        if not 0 <= value + delta <= maximum:
            return counts, at
    return array(counts.typecode, [value + delta for value in counts]), None
