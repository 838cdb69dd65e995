"""Writing zeroes and discarding: by the mapping alone where whole clusters are concerned."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import trio

from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import (
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
)
from drivers.format.qcow2.mapping import HOLE, RESERVED, RESERVED_ZERO, ZEROED
from drivers.format.qcow2.writing import Writer

# (old L2 entry, old subcluster bitmap) -> the new ones.
Change = Callable[[int, int], tuple[int, int]]


_ZEROES = bytes(1 << 20)


class Unmapper:
    def __init__(self, image: Image, writer: Writer) -> None:
        self._image = image
        self._mapping = image.mapping
        self._writer = writer
        self._bits = image.mapping.cluster_bits
        self._mask = image.mapping.cluster_size - 1

    @property
    def _v3(self) -> bool:
        return self._image.header.version >= 3

    # --- zeroes -----------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        image = self._image
        image.check_writable()
        await image.metadata.mark_dirty()
        end = offset + length
        if image.header.raw_data_file:
            image.data.grow(end)
            await image.data.write_zeroes(offset, length, may_unmap=may_unmap)
        unit = (1 << self._mapping.sub_bits) - 1
        if not self._v3 and image.backing is not None:
            # Version 2 has no zero clusters that would hide the backing file.
            await self._write_out(offset, end)
            return
        # The image's end counts as the end of a cluster.
        start = min(end, (offset + unit) & ~unit)
        stop = end if end == image.size else max(start, end & ~unit)
        await self._zero_edge(offset, start)
        await self._zero_units(start, stop, may_unmap=may_unmap)
        await self._zero_edge(stop, end)

    async def _write_out(self, start: int, end: int) -> None:
        for at in range(start, end, len(_ZEROES)):
            await self._writer.write(at, memoryview(_ZEROES)[: end - at])

    async def _zero_edge(self, start: int, end: int) -> None:
        """A part of a unit: zeroes are written, unless it reads so already."""
        if start < end and not await self._reads_zero(start, end):
            await self._writer.write(start, memoryview(bytes(end - start)))

    async def _reads_zero(self, start: int, end: int) -> bool:
        for piece in await self._mapping.describe(start, end, most=SUBCLUSTERS):
            hole = piece.kind in (HOLE, RESERVED) and not self._image.backing_length(start, piece.length)
            if not hole and piece.kind not in (ZEROED, RESERVED_ZERO):
                return False
            start += piece.length
        return True

    async def _zero_units(self, start: int, stop: int, *, may_unmap: bool) -> None:
        """Whole clusters, with extended entries perhaps beginning and ending with subclusters."""
        first = (start + self._mask) >> self._bits
        last = -(-stop // (self._mask + 1)) if stop == self._image.size else stop >> self._bits
        if first > last:  # within one cluster
            await self._zero_subclusters(start, stop)
            return
        await self._zero_subclusters(start, min(stop, first << self._bits))
        await self._change(first, last, self._zeroed(may_unmap=may_unmap), "request")
        if last << self._bits < stop:
            await self._zero_subclusters(last << self._bits, stop)

    def _zeroed(self, *, may_unmap: bool) -> Change:
        external, extended, v3 = self._image.external, self._mapping.extended, self._v3
        keep_host = external or not may_unmap or self._image.options.discard_no_unref

        def change(entry: int, bitmap: int) -> tuple[int, int]:
            if not v3:
                return 0, 0
            host = 0 if entry & COMPRESSED or not keep_host else entry & (OFFSET_MASK | COPIED)
            return (host, ALL_ZERO) if extended else (host | ZERO, 0)

        return change

    async def _zero_subclusters(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        image, mapping = self._image, self._mapping
        cluster = start >> self._bits
        async with image.busy.changing(cluster, cluster):
            found = await mapping.pin(cluster >> mapping.slice_bits)
            try:
                index = (cluster & mapping.slice_mask) * 2
                compressed = bool(found.entries[index] & COMPRESSED)
                if not compressed:
                    low = (start & self._mask) >> mapping.sub_bits
                    high = ((stop - 1) & self._mask) >> mapping.sub_bits
                    bits = ((2 << high) - 1) & ~((1 << low) - 1)
                    found.entries[index + 1] = (found.entries[index + 1] & ~bits) | bits << SUBCLUSTERS
                    found.dirty = True
            finally:
                found.pins -= 1
        if compressed:
            await self._zero_edge(start, stop)

    # --- discard ----------------------------------------------------------------------------

    async def discard(self, offset: int, length: int) -> None:
        """Whole clusters are freed and read as zeroes afterwards (in version 2 as the backing file);
        parts of clusters stay."""
        image = self._image
        image.check_writable()
        first = (offset + self._mask) >> self._bits
        end = offset + length
        last = -(-end // (self._mask + 1)) if end == image.size else end >> self._bits
        if first < last:
            await image.metadata.mark_dirty()
            if image.header.raw_data_file:
                inside = min(end, last << self._bits) - (first << self._bits)
                await image.data.write_zeroes(first << self._bits, inside, may_unmap=True)
            elif image.external and image.options.passes_discard["request"]:
                inside = min(end, last << self._bits) - (first << self._bits)
                await image.data.discard(first << self._bits, inside)
            await self._change(first, last, self._discarded, "request")

    def _discarded(self, entry: int, bitmap: int) -> tuple[int, int]:
        image, extended = self._image, self._mapping.extended
        allocated = bool(entry & (COMPRESSED | OFFSET_MASK)) or (image.external and bool(entry & COPIED))
        if not allocated and image.backing is None:
            return entry, bitmap
        if not self._v3:
            return 0, 0
        host = 0
        if not entry & COMPRESSED and image.options.discard_no_unref:
            host = entry & (OFFSET_MASK | COPIED)
        return (host, ALL_ZERO) if extended else (host | ZERO, 0)

    async def forget(self, first: int, last: int) -> None:
        """Guest clusters from `first` up to `last` (exclusive) have nothing of their own any more: the
        backing file shows."""
        await self._change(first, last, lambda entry, bitmap: (0, 0), "snapshot")

    # --- the mapping ------------------------------------------------------------------------

    async def _change(self, first: int, last: int, change: Change, why: str) -> None:
        """Apply `change` to the entries of the guest clusters from `first` up to `last`."""
        image, mapping = self._image, self._mapping
        untouched = change(0, 0) == (0, 0)
        while first < last:
            if untouched:
                # A huge disk has almost nothing but tables that do not exist.
                first = mapping.next_mapped(first, last)
                if first == last:
                    break
            stop = min(last, (first | mapping.slice_mask) + 1)
            async with image.busy.changing(first, stop - 1):
                await self._change_slice(first, stop, change, why)
            if image.metadata.many_freed:
                await image.metadata.commit()
            await trio.lowlevel.checkpoint()  # there may be very many slices
            first = stop

    async def _change_slice(self, first: int, last: int, change: Change, why: str) -> None:
        mapping, step = self._mapping, self._mapping.step
        index = first >> mapping.slice_bits
        start = (first & mapping.slice_mask) * step
        stop = start + (last - first) * step
        old = (await mapping.load(index)).entries[start:stop]
        new = self._changed(old, change)
        if new == old:
            return  # in particular, no L2 table is made for what has none
        found = await mapping.pin(index)
        try:
            found.entries[start:stop] = new
            found.dirty = True
        finally:
            found.pins -= 1
        if any(old[::step]):
            for entry, changed in zip(old[::step], new[::step], strict=True):
                if not changed & OFFSET_MASK:
                    self._writer.drop(entry, why)

    def _changed(self, entries: array[int], change: Change) -> array[int]:
        step = self._mapping.step
        if step == 1:
            if entries.count(entries[0]) == len(entries):  # as in a stretch that was never written
                return array("Q", (change(entries[0], 0)[0],)) * len(entries)
            return array("Q", (change(entry, 0)[0] for entry in entries))
        pairs = zip(entries[::2], entries[1::2], strict=True)
        return array("Q", (value for pair in pairs for value in change(*pair)))
