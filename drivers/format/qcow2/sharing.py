"""All that an L1 table leads to: L2 tables and clusters, their reference counts and COPIED flags.

What is in the mapping's memory is in the file too when these are called, and nothing else is in
flight: the tables are read from the file.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import trio

from drivers.format.qcow2.counts import Counts, uniform
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import COMPRESSED, COPIED, L1_RESERVED, OFFSET_MASK, compressed_range
from drivers.format.qcow2.refcounts import unpack_table
from drivers.format.qcow2.stretches import ramp, stretch_end

WITHOUT_COPIED = COPIED - 1


def used(l1: array[int]) -> Iterator[tuple[int, int]]:
    """(L1 index, entry) where there is an L2 table."""
    return ((index, entry) for index, entry in enumerate(l1) if entry & OFFSET_MASK)


async def read_table(image: Image, index: int, entry: int) -> array[int]:
    """The L2 table that an L1 entry leads to."""
    file, offset = image.file, entry & OFFSET_MASK
    if entry & (L1_RESERVED | file.cluster_size - 1):
        raise await file.corruption(f"L2 table offset {offset:#x} unaligned (L1 index: {index:#x})")
    await trio.lowlevel.checkpoint()  # there may be very many
    return unpack_table(await file.read(offset, file.cluster_size))


def references(image: Image, entries: array[int]) -> list[tuple[int, int]]:
    """(first cluster, count) of the host clusters that the entries of an L2 table refer to; one that
    several compressed clusters share comes as often."""
    bits, step = image.file.cluster_bits, image.mapping.step
    runs: list[tuple[int, int]] = []
    first = count = 0
    at, total = 0, len(entries)
    while at < total:
        entry = entries[at]
        at += step
        if entry & COMPRESSED:
            offset, length = compressed_range(entry, bits)
            start, end = offset >> bits, ((offset + length - 1) >> bits) + 1
        elif entry & OFFSET_MASK:
            start = (entry & OFFSET_MASK) >> bits
            end = start + 1
            if step == 1 and start + total < OFFSET_MASK >> bits:
                end += stretch_end(entries, at - 1, total, 1 << bits) - at
                at += end - start - 1
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


def shared(image: Image, entries: array[int]) -> array[int]:
    """The entries of an L2 table of whose clusters none may be written in place."""
    step, first, count = image.mapping.step, entries[0], len(entries)
    size = image.file.cluster_size
    alike = step == 1 and first & COPIED and not first & COMPRESSED
    if alike and entries[-1] == first + (count - 1) * size and stretch_end(entries, 0, count, size) == count:
        return ramp(first & WITHOUT_COPIED, count, size)
    out = entries[:]
    out[::step] = array(
        "Q", [entry if entry & COMPRESSED else entry & WITHOUT_COPIED for entry in entries[::step]]
    )
    return out


class Flags:
    """Tells what the COPIED flags ought to be."""

    def __init__(self, image: Image) -> None:
        self._refcounts = image.refcounts
        self._bits = image.file.cluster_bits
        self._step = image.mapping.step

    async def corrected(self, entries: array[int]) -> array[int]:
        """The entries of an active L2 table, with the flags as the refcounts demand them."""
        out = entries[:]
        bits, block_bits = self._bits, self._refcounts.block_bits
        mask = (1 << block_bits) - 1
        block, counts = -1, None
        at = -self._step
        while (at := at + self._step) < len(entries):
            entry = entries[at]
            if entry & COMPRESSED or not entry & OFFSET_MASK:
                continue
            cluster = (entry & OFFSET_MASK) >> bits
            if cluster >> block_bits != block:
                # Most of them are in the same block.
                block = cluster >> block_bits
                counts = await self._refcounts.counts(block)
            single = counts is not None and counts[cluster & mask] == 1
            out[at] = entry & WITHOUT_COPIED | (COPIED if single else 0)
            if counts is not None and self._step == 1:
                more = self._followers(entries, at, counts, cluster & mask)
                if more and out[at] != entry:
                    out[at : at + 1 + more] = ramp(out[at], 1 + more, 1 << bits)
                at += more
        return out

    def _followers(self, entries: array[int], at: int, counts: Counts, first: int) -> int:
        """How many entries go on from the one at `at`, whose cluster's count is at `first`, with the
        same flag, and have the same count."""
        limit = min(len(entries), at + len(counts) - first)
        count = stretch_end(entries, at, limit, 1 << self._bits) - at
        return count - 1 if count > 1 and uniform(counts[first : first + count]) is not None else 0

    async def is_single(self, offset: int) -> bool:
        return await self._refcounts.get(offset >> self._bits) == 1
