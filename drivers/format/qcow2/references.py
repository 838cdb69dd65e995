"""How often every cluster of an image file is referred to, in memory; and refcount blocks, decoded.

The counts stand in pages, made when they are first needed: what a sparse file does not use takes
no memory.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Iterator

from drivers.errors import RequestError

# Counts of narrower entries take a byte each.
_TYPES = ("B", "B", "B", "B", "H", "I", "Q")
_PAGE_ENTRIES = 1 << 15
# Refused beyond it: 32 TiB of 64k clusters, all in use, with 16-bit refcounts.
MAX_BYTES = 1 << 30


class References:
    """Counts from 0 to `maximum`, that of a refcount of 2^`refcount_order` bits.

    `page_entries` of them make a page, one or several of which a refcount block; `empty` is a page
    of zeroes. `shared`: some cluster was added to more than once.
    """

    def __init__(self, refcount_order: int, cluster_bits: int) -> None:
        self.order = refcount_order
        self.type = _TYPES[refcount_order]
        self.maximum = (1 << (1 << refcount_order)) - 1
        self.per_block = 8 << cluster_bits >> refcount_order
        self.page_entries = min(self.per_block, _PAGE_ENTRIES)
        self.pages: dict[int, array[int]] = {}
        self.shared = False
        self.empty = array(self.type, bytes(array(self.type).itemsize * self.page_entries))
        self._ones = array(self.type, (1,)) * self.page_entries
        self._max_pages = MAX_BYTES // (self.empty.itemsize * self.page_entries)

    def page(self, index: int) -> array[int]:
        """The counts of a page, to be changed. Raises RequestError when there are too many."""
        page = self.pages.get(index)
        if page is None:
            if len(self.pages) >= self._max_pages:
                raise RequestError(errno.ENOMEM, "the image is too large to be checked")
            page = self.pages[index] = self.empty[:]
        return page

    def look(self, index: int) -> array[int]:
        """The counts of a page, to be read."""
        return self.pages.get(index, self.empty)

    def get(self, cluster: int) -> int:
        index, at = divmod(cluster, self.page_entries)
        page = self.pages.get(index)
        return 0 if page is None else page[at]

    def set(self, cluster: int, count: int) -> None:
        index, at = divmod(cluster, self.page_entries)
        self.page(index)[at] = count

    def add(self, first: int, count: int, weight: int = 1) -> list[tuple[int, int]]:
        """One reference more, or `weight`, to each of `count` clusters. Where that is more than
        the maximum the count stays there, and the result tells: (cluster, references too many)."""
        overflows: list[tuple[int, int]] = []
        while count > 0:
            index, at = divmod(first, self.page_entries)
            part = min(count, self.page_entries - at)
            page = self.pages.get(index) or self.page(index)
            if part == 1 and weight == 1 and not page[at]:
                page[at] = 1
            elif weight == 1 and page[at : at + part] == self.empty[:part]:
                page[at : at + part] = self._ones[:part]
            else:
                overflows += self._add_each(page, first - at, range(at, at + part), weight)
            first += part
            count -= part
        return overflows

    def _add_each(self, page: array[int], first: int, where: range, weight: int) -> Iterator[tuple[int, int]]:
        self.shared = True
        for at in where:
            total = page[at] + weight
            if total > self.maximum:
                yield first + at, total - self.maximum
                total = self.maximum
            page[at] = total

    def free_run(self, count: int, start: int) -> int:
        """The first of `count` neighbouring clusters, from `start` on, that nothing refers to."""
        first = cluster = start
        while cluster - first < count:
            index, at = divmod(cluster, self.page_entries)
            page = self.pages.get(index)
            if page is None:
                cluster += self.page_entries - at
                continue
            for used in page[at:]:
                if used:
                    first = cluster + 1
                elif cluster + 1 - first >= count:
                    return first
                cluster += 1
        return first


def decode(data: bytes | bytearray | memoryview, order: int) -> array[int]:
    """The entries of (a part of) a refcount block."""
    if order >= 3:
        counts = array(_TYPES[order], bytes(data))
        if sys.byteorder == "little":
            counts.byteswap()
        return counts
    bits = 1 << order
    per_byte = 8 // bits
    out = bytearray(len(data) * per_byte)
    for slot in range(per_byte):
        out[slot::per_byte] = bytes(data).translate(_SLOTS[order][slot])
    return array("B", out)


def encode(counts: array[int], order: int) -> bytes:
    """The reverse of decode(); whole bytes."""
    if order >= 3:
        counts = counts[:]
        if sys.byteorder == "little":
            counts.byteswap()
        return counts.tobytes()
    bits = 1 << order
    per_byte = 8 // bits
    raw = counts.tobytes()
    whole = 0
    for slot in range(per_byte):
        # No carry passes from one byte to the next: the entries have their own bits.
        whole |= int.from_bytes(raw[slot::per_byte], "little") << slot * bits
    return whole.to_bytes(len(raw) // per_byte, "little")


def _slot_table(bits: int, slot: int) -> bytes:
    return bytes(byte >> slot * bits & (1 << bits) - 1 for byte in range(256))


_SLOTS = tuple(tuple(_slot_table(1 << order, slot) for slot in range(8 >> order)) for order in range(3))
