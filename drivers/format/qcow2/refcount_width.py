"""Counting references in another width: all refcount structures are made anew.

The new ones are written behind all clusters that are in use, where the old ones say nothing is; one
write of the header leads to them, and then the old ones are free. Whenever the power goes, the image
has the one or the other, and nothing leaks.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator

import trio

from drivers.errors import OptionError, RequestError
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import MAX_REFCOUNT_TABLE_BYTES, REFCOUNT_OFFSET_MASK, REFCOUNT_RESERVED
from drivers.format.qcow2.refcounts import pack_table
from drivers.format.qcow2.references import decode, encode

# Counts in memory take a byte at least.
_TYPES = ("B", "B", "B", "B", "H", "I", "Q")


async def change_refcount_width(image: Image, order: int, progress: Callable[[float], object]) -> None:
    """Count in 2^`order` bits from now on. Nothing else is in flight. Raises OptionError where a count
    is too large for that."""
    image.check_writable()
    with trio.CancelScope(shield=True):
        await image.metadata.mark_dirty()
        # Twice: what the first drops from the refcounts is written by the second.
        await image.metadata.flush()
        await image.metadata.flush(refcounts=True)
        await _Change(image, order, progress).run()


class _Change:
    def __init__(self, image: Image, order: int, progress: Callable[[float], object]) -> None:
        self._image = image
        self._file = image.file
        self._order = order
        self._progress = progress
        self._table = image.refcounts.table
        self._old_order = image.refcounts.order
        # Clusters that a block counts.
        self._old_span = self._file.cluster_size * 8 >> self._old_order
        self._span = self._file.cluster_size * 8 >> order
        header = self._file.header
        first = header.refcount_table_offset >> header.cluster_bits
        self._freed = set(range(first, first + header.refcount_table_clusters))
        self._freed |= {
            (entry & REFCOUNT_OFFSET_MASK) >> header.cluster_bits
            for entry in self._table
            if entry & REFCOUNT_OFFSET_MASK
        }
        # The last block that was read.
        self._index = -1
        self._counts = array("B")

    async def run(self) -> None:
        file, bits = self._file, self._file.cluster_bits
        used, end = await self._survey()
        blocks, table_clusters = self._lay_out(used, end)
        table = array("Q", bytes(table_clusters << bits))
        own = range(end, end + len(blocks) + table_clusters)
        await file.protect(own.start << bits, len(own) << bits)
        for number, index in enumerate(blocks):
            table[index] = (end + number) << bits
            await file.write(table[index], encode(await self._new_counts(index, own), self._order))
            self._progress((1 + (number + 1) / len(blocks)) / 2)
        table_offset = (end + len(blocks)) << bits
        await file.write(table_offset, pack_table(table))
        await file.flush()
        old_offset = file.header.refcount_table_offset
        await file.switch_header(
            refcount_table_offset=table_offset,
            refcount_table_clusters=table_clusters,
            refcount_order=self._order,
        )
        self._image.refcounts.replace(table, old_offset)

    async def _survey(self) -> tuple[list[int], int]:
        """The indices of the new blocks in which anything is counted, and where the last cluster in use
        ends."""
        used: list[int] = []
        end = 0
        whole = len(self._table) * self._old_span
        for index in self._candidates():
            await trio.lowlevel.checkpoint()  # there may be very many
            counts = await self._new_counts(index, range(0))
            if any(counts):
                used.append(index)
                last = next(at for at in range(len(counts) - 1, -1, -1) if counts[at])
                end = index * self._span + last + 1
            self._progress((index + 1) * self._span / whole / 2)
        return used, max(end, max(self._freed) + 1)

    def _candidates(self) -> Iterator[int]:
        """The indices of the new blocks for whose clusters there are old ones."""
        following = 0
        for old, entry in enumerate(self._table):
            if entry:
                first, last = old * self._old_span, (old + 1) * self._old_span - 1
                yield from range(max(following, first // self._span), last // self._span + 1)
                following = last // self._span + 1

    def _lay_out(self, used: list[int], end: int) -> tuple[list[int], int]:
        """(indices of the new blocks, clusters of the table that leads to them), where both lie from
        `end` on, and are counted too."""
        blocks, table = used, 1
        while True:
            own = range(end, end + len(blocks) + table)
            needed = sorted({*used, *range(own.start // self._span, (own.stop - 1) // self._span + 1)})
            clusters = -(-(needed[-1] + 1) * 8 // self._file.cluster_size)
            if (len(needed), clusters) == (len(blocks), table):
                break
            blocks, table = needed, clusters
        if table << self._file.cluster_bits > MAX_REFCOUNT_TABLE_BYTES:
            raise RequestError(errno.EFBIG, "the refcount table would be too large")
        return needed, table

    async def _new_counts(self, index: int, own: range) -> array[int]:
        """The counts of the new block with this index; `own` are the clusters of the new structures."""
        first, count = index * self._span, self._span
        counts = array(_TYPES[self._order])
        while count:
            old = await self._old_counts(first // self._old_span)
            at = first % self._old_span
            part = old[at : at + count]
            self._check(part, first)
            counts.extend(array(counts.typecode, part))
            first += len(part)
            count -= len(part)
        base = index * self._span
        for cluster in range(max(base, own.start), min(base + self._span, own.stop)):
            counts[cluster - base] = 1
        return counts

    def _check(self, counts: array[int], first: int) -> None:
        maximum = (1 << (1 << self._order)) - 1
        if self._order >= self._old_order or max(counts) <= maximum:
            return
        at, count = next((at, count) for at, count in enumerate(counts) if count > maximum)
        raise OptionError(
            f"Cannot decrease refcount entry width to {1 << self._order} bits: Cluster at offset "
            f"{first + at << self._file.cluster_bits:#x} has a refcount of {count}"
        )

    async def _old_counts(self, index: int) -> array[int]:
        """What the old block with this index counts, without the old structures themselves."""
        if index != self._index:
            file = self._file
            entry = self._table[index] if index < len(self._table) else 0
            data = bytearray(file.cluster_size)
            offset = entry & REFCOUNT_OFFSET_MASK
            if entry & REFCOUNT_RESERVED or offset & (file.cluster_size - 1):
                raise await file.corruption(
                    f"Refblock offset {offset:#x} unaligned (reftable index: {index:#x})"
                )
            if offset:
                data = await file.read(offset, file.cluster_size)
            counts = decode(data, self._old_order)
            base = index * self._old_span
            for at in _inside(self._freed, base, len(counts)):
                counts[at] = max(0, counts[at] - 1)
            self._index, self._counts = index, counts
        return self._counts


def _inside(clusters: set[int], base: int, length: int) -> list[int]:
    """Those of `clusters` that are among `length` from `base` on, counted from there."""
    if len(clusters) < length:
        return [cluster - base for cluster in clusters if base <= cluster < base + length]
    return [at for at in range(length) if base + at in clusters]
