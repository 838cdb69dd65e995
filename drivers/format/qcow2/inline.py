"""Writing without waiting: into the page cache, with clusters that are free at hand."""

from __future__ import annotations

import os
from collections.abc import Sequence

from drivers.block.extents import Span
from drivers.block.inline import read_now
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from drivers.format.qcow2.mapping import Slice

# What write_now() allocates at once, in clusters and bytes.
MAX_CLUSTERS = 64
MAX_BYTES = 4 << 20


class InlineWriter:
    def __init__(self, image: Image) -> None:
        self._image = image
        self._mapping = image.mapping
        self._bits = image.mapping.cluster_bits
        self._mask = image.mapping.cluster_size - 1
        self._data_plain_write = image.data.plain_write

    # --- where to write ---------------------------------------------------------------------

    def plain_write(self, offset: int, length: int) -> Sequence[Span] | None:
        """See Node.plain_write(). Where the range reads as zeroes, and only then, clusters are
        allocated: if their data never come, nothing has changed."""
        image, mapping = self._image, self._mapping
        if image.crypt is not None or mapping.extended or image.file.corrupt:
            return None
        bits = self._bits
        first, last = offset >> bits, (offset + length - 1) >> bits
        found = mapping.pin_now(first >> mapping.slice_bits)
        if found is None or last >> mapping.slice_bits != first >> mapping.slice_bits:
            return None
        entries = found.entries
        at = first & mapping.slice_mask
        entry = entries[at]
        host = entry & OFFSET_MASK
        if entry & COPIED and host and not entry & (COMPRESSED | ZERO | self._mask & OFFSET_MASK):
            step = self._mask + 1
            wanted = entry
            for index in range(at + 1, at + 1 + last - first):
                wanted += step
                if entries[index] != wanted:
                    return None
            host += offset & self._mask
        else:
            allocated = self._allocate_now(found, first, last)
            if allocated is None:
                return None
            host = allocated + (offset & self._mask)
        if host + length > image.data.size or (not image.external and image.file.overlap(host, length)):
            return None
        return self._data_plain_write(host, length)

    def _allocate_now(self, found: Slice, first: int, last: int) -> int | None:
        """Allocate neighbouring clusters for guest clusters that read as zeroes; their host offset."""
        image, mapping = self._image, self._mapping
        if image.busy or image.external or not image.metadata.writable_now:
            return None
        at = first & mapping.slice_mask
        for index in range(at, at + last - first + 1):
            entry = found.entries[index]
            if entry and entry != mapping.zero_flag:
                return None
            if not entry and image.backing_length((first + index - at) << self._bits, self._mask + 1):
                return None
        run = image.refcounts.allocate_now(last - first + 1, virgin=True)
        if run is None:
            return None
        for number, index in enumerate(range(at, at + run.clusters)):
            found.entries[index] = run.offset + (number << self._bits) | COPIED
        found.dirty = True
        return run.offset

    # --- writing with what is around --------------------------------------------------------

    def write_now(self, offset: int, data: memoryview) -> bool:
        """See Node.write_now(): for clusters that are in the backing file until now, which are filled
        up from its page cache. Every cluster of the range is of that kind, or nothing is done."""
        image, mapping, bits = self._image, self._mapping, self._bits
        if image.crypt is not None or mapping.extended or image.external or image.file.corrupt:
            return False
        end = offset + len(data)
        first, last = offset >> bits, (end - 1) >> bits
        count = last - first + 1
        if image.busy or not image.metadata.writable_now or count > MAX_CLUSTERS or count << bits > MAX_BYTES:
            return False
        found = mapping.pin_now(first >> mapping.slice_bits)
        if found is None or last >> mapping.slice_bits != first >> mapping.slice_bits:
            return False
        at = first & mapping.slice_mask
        if any(entry and entry != mapping.zero_flag for entry in found.entries[at : at + count]):
            return False
        head = self._before(found, first << bits, offset)
        tail = self._before(found, end, (last + 1) << bits)
        if head is None or tail is None:
            return False
        run = image.refcounts.allocate_now(count)
        if run is None:
            return False
        spans = self._data_plain_write(run.offset, count << bits)
        if spans is None or len(spans) != 1 or not _write(spans[0], (head, data, tail)):
            image.refcounts.give_back_now(run)
            return False
        for number in range(count):
            found.entries[at + number] = run.offset + (number << bits) | COPIED
        found.dirty = True
        return True

    def _before(self, found: Slice, start: int, end: int) -> bytearray | None:
        """What a part of a cluster that is not allocated reads as; None if that is not at hand."""
        image = self._image
        part = bytearray(end - start)
        entry = found.entries[start >> self._bits & self._mapping.slice_mask] if part else ZERO
        reach = 0 if entry else image.backing_length(start, min(end, image.size) - start)
        if reach > 0:
            assert image.backing is not None
            if not read_now(image.backing, start, memoryview(part)[:reach]):
                return None
        return part


def _write(span: Span, parts: Sequence[bytearray | memoryview]) -> bool:
    fd, position, length = span
    try:
        return os.pwritev(fd, [part for part in parts if len(part)], position) == length
    except OSError:
        return False
