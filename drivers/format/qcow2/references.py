"""All that an L1 table leads to: L2 tables and clusters, their reference counts and COPIED flags.

What is in the mapping's memory is in the file too when these are called, and nothing else is in
flight: the tables are read and changed in the file.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator

import trio

from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import COMPRESSED, COPIED, L1_RESERVED, OFFSET_MASK, compressed_range
from drivers.format.qcow2.refcounts import Counts, pack_table, unpack_table

_WITHOUT_COPIED = COPIED - 1


async def tables(image: Image, l1: array[int]) -> AsyncIterator[tuple[int, int, array[int]]]:
    """(L1 index, offset, entries) of the L2 tables of `l1`."""
    file = image.file
    for index, entry in enumerate(l1):
        if offset := entry & OFFSET_MASK:
            if entry & (L1_RESERVED | file.cluster_size - 1):
                raise await file.corruption(f"L2 table offset {offset:#x} unaligned (L1 index: {index:#x})")
            yield index, offset, unpack_table(await file.read(offset, file.cluster_size))
            await trio.lowlevel.checkpoint()  # there may be very many


def references(image: Image, entries: array[int]) -> list[tuple[int, int]]:
    """(first cluster, count) of the host clusters that the entries of an L2 table refer to; one that
    several compressed clusters share comes as often."""
    bits = image.file.cluster_bits
    runs: list[tuple[int, int]] = []
    first = count = 0
    for entry in entries[:: image.mapping.step]:
        if entry & COMPRESSED:
            offset, length = compressed_range(entry, bits)
            start, end = offset >> bits, ((offset + length - 1) >> bits) + 1
        elif entry & OFFSET_MASK:
            start = (entry & OFFSET_MASK) >> bits
            end = start + 1
        else:
            continue
        if start == first + count:
            count += end - start
            continue
        if count:
            runs.append((first, count))
        first, count = start, end - start
    if count:
        runs.append((first, count))
    return runs


async def add_references(image: Image, l1: array[int]) -> None:
    """One more reference to all of it; none where one cannot be counted, with RequestError(EINVAL).
    In memory only."""
    refcounts, bits = image.refcounts, image.file.cluster_bits
    done: list[tuple[int, int]] = []
    try:
        async for _, offset, entries in tables(image, l1):
            for first, count in ((offset >> bits, 1), *references(image, entries)):
                await refcounts.add(first, count, 1)
                done.append((first, count))
    except BaseException:
        for first, count in done:
            await refcounts.add(first, count, -1)
        raise


async def drop_references(image: Image, l1: array[int]) -> None:
    """Nothing in the file leads to this L1 table any more."""
    metadata, bits = image.metadata, image.file.cluster_bits
    async for _, offset, entries in tables(image, l1):
        for first, count in references(image, entries):
            metadata.free(first << bits, count, "snapshot")
        metadata.free(offset, 1, "snapshot")
        if metadata.many_freed:
            await metadata.commit()
    image.on_free_compressed()


async def clear_copied(image: Image, l1: array[int]) -> None:
    """Nothing that `l1` leads to may be written in place any more. Changes `l1` itself in memory."""
    async for index, offset, entries in tables(image, l1):
        l1[index] &= _WITHOUT_COPIED
        step = image.mapping.step
        cleared = entries[:]
        cleared[::step] = array("Q", [entry & _WITHOUT_COPIED for entry in entries[::step]])
        if cleared != entries:
            await image.file.write(offset, pack_table(cleared))


async def restore_copied(image: Image) -> None:
    """Let the COPIED flags of the active tables say what the refcounts say."""
    mapping, single = image.mapping, _Single(image)
    async for index, offset, entries in tables(image, mapping.l1):
        entry = offset | (COPIED if await single.has(offset) else 0)
        if mapping.l1[index] != entry:
            mapping.l1[index] = entry
            mapping.l1_dirty.add(index)
        changed = False
        for at in range(0, len(entries), mapping.step):
            entry = entries[at]
            if entry & COMPRESSED or not entry & OFFSET_MASK:
                continue
            flagged = entry & _WITHOUT_COPIED
            if await single.has(entry & OFFSET_MASK):
                flagged |= COPIED
            if flagged != entry:
                entries[at] = flagged
                changed = True
        if changed:
            await image.file.write(offset, pack_table(entries))
    mapping.drop()


class _Single:
    """Looks up whether clusters have one reference only, most of them in the same block."""

    def __init__(self, image: Image) -> None:
        self._refcounts = image.refcounts
        self._bits = image.file.cluster_bits
        self._index = -1
        self._counts: Counts | None = None

    async def has(self, offset: int) -> bool:
        cluster = offset >> self._bits
        index = cluster >> self._refcounts.block_bits
        if index != self._index:
            self._index, self._counts = index, await self._refcounts.counts(index)
        counts = self._counts
        return counts is not None and counts[cluster & ((1 << self._refcounts.block_bits) - 1)] == 1
