"""Census what refers to each cluster of an image: its tables, its snapshots' and its bitmaps'.

An L2 table is read once, however many L1 entries lead to it: internal snapshots share tables.
"""

from __future__ import annotations

import errno
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import islice, repeat
from operator import or_
from typing import NamedTuple

from drivers.block.image import CheckReport
from drivers.errors import ImageError
from drivers.format.qcow2.directory import BitmapEntry, SnapshotEntry, parse_bitmap_directory
from drivers.format.qcow2.inspection import MAX_MESSAGES, Inspection
from drivers.format.qcow2.layout import (
    ALL_ALLOCATED,
    ALL_ZERO,
    BITMAP_TABLE_RESERVED,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    MAX_L1_BYTES,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
    compressed_range,
)
from drivers.format.qcow2.stretches import stretch_end


class _Found(NamedTuple):
    """What one visit to an L2 table adds to a report."""

    figures: tuple[int, ...]
    messages: list[str]


class Census:
    """One pass over all tables. `all_copied`: so far every cluster of the active ones has COPIED
    set."""

    def __init__(self, inspection: Inspection, *, repair: bool) -> None:
        self.inspection = inspection
        self.repair = repair
        header = inspection.header
        self.bits = inspection.cluster_bits
        self.cluster_size = inspection.cluster_size
        self.entry_words = header.l2_entry_size // 8
        self.entries = 1 << header.l2_bits
        self.counts_data = not header.has_data_file
        self.all_copied = True
        # By L2 table: what its first visit added to the report, and visits after that.
        self.found: dict[int, _Found] = {}
        self.again: Counter[int] = Counter()

    async def run(
        self, active_l1: array[int], snapshots: Sequence[SnapshotEntry], snapshots_size: int
    ) -> None:
        """Count everything but the refcount blocks. Raises OSError."""
        inspection, header = self.inspection, self.inspection.header
        inspection.count(0, self.cluster_size)
        await self._count_l1(header.l1_table_offset, active_l1, active=True)
        if header.has_data_file and snapshots:
            inspection.corrupt(f"ERROR {len(snapshots)} snapshots in image with data file")
        for snapshot in snapshots:
            await self._count_snapshot(snapshot)
        await self._count_again()
        inspection.count(header.snapshots_offset, snapshots_size)
        inspection.count(header.refcount_table_offset, header.refcount_table_clusters << self.bits)
        if header.encryption is not None:
            inspection.count(header.encryption.offset, header.encryption.length)
        await self._count_bitmaps()

    # --- L1 -----------------------------------------------------------------------------------

    async def _count_snapshot(self, snapshot: SnapshotEntry) -> None:
        offset, size = snapshot.l1_table_offset, snapshot.l1_size
        who = f"ERROR snapshot {_text(snapshot.id)} ({_text(snapshot.name)})"
        if offset % self.cluster_size:
            self.inspection.corrupt(
                f"{who} l1_offset={offset:#x}: L1 table is not cluster aligned; "
                "snapshot table entry corrupted"
            )
            return
        if size > MAX_L1_BYTES // 8:
            self.inspection.corrupt(
                f"{who} l1_size={size:#x}: L1 table is too large; snapshot table entry corrupted"
            )
            return
        table = await self.inspection.read_table(offset, size)
        await self._count_l1(offset, table, active=False)

    async def _count_l1(self, offset: int, table: array[int], *, active: bool) -> None:
        inspection = self.inspection
        inspection.count(offset, len(table) * 8)
        for entry in filter(None, table):
            if entry & L1_RESERVED:
                inspection.corrupt(f"ERROR found L1 entry with reserved bits set: {entry:x}")
            l2_offset = entry & OFFSET_MASK
            inspection.count(l2_offset, self.cluster_size)
            if l2_offset % self.cluster_size:
                inspection.corrupt(
                    f"ERROR l2_offset={l2_offset:x}: Table is not cluster aligned; L1 entry corrupted"
                )
            if active and not entry & COPIED:
                self.all_copied = False
            if l2_offset in self.found:
                self.again[l2_offset] += 1
                self._find_again(self.found[l2_offset], active=active)
            else:
                await self._visit(l2_offset, active=active)

    async def _visit(self, offset: int, *, active: bool) -> None:
        report = self.inspection.report
        before, fixed, said = _figures(report), report.corruptions_fixed, len(report.messages)
        await self._count_l2(offset, active=active)
        if report.corruptions_fixed == fixed:  # else the next visit finds another table
            figures = tuple(new - old for new, old in zip(_figures(report), before, strict=True))
            self.found[offset] = _Found(figures, report.messages[said:])

    def _find_again(self, found: _Found, *, active: bool) -> None:
        """A table is met again: what was found in it is so once more."""
        report = self.inspection.report
        corruptions, allocated, fragmented, compressed = found.figures
        report.corruptions += corruptions
        if len(report.messages) <= MAX_MESSAGES:
            for line in found.messages:
                self.inspection.say(line)
        if active:
            report.allocated_clusters += allocated
            report.fragmented_clusters += fragmented
            report.compressed_clusters += compressed

    # --- L2 -----------------------------------------------------------------------------------

    async def _count_l2(self, offset: int, *, active: bool) -> None:
        table = await self.inspection.read_table(offset, self.cluster_size // 8)
        if self.entry_words > 1 or not self._count_plain(table, active=active):
            visit = L2Visit(self, offset, table, active=active)
            await visit.run()

    def _count_plain(self, table: array[int], *, active: bool, weight: int = 1) -> bool:
        """Count a table in which nothing is compressed, misplaced or wrong. False, and nothing is
        counted, for any other. Here is where the time goes: whole tables at a time."""
        if self._count_uniform(table, active=active, weight=weight):
            return True
        values = list(filter(None, table))
        if not values:
            return True
        misplaced = ~(COPIED | ZERO | (OFFSET_MASK & -self.cluster_size))
        if reduce(or_, values) & misplaced or not self.counts_data:
            return False
        mask, bits = OFFSET_MASK, self.bits
        clusters = [(value & mask) >> bits for value in values if value & mask]
        if not clusters:
            return True
        inspection = self.inspection
        if max(clusters) << bits >= inspection.file.size:
            return False
        runs = _runs(clusters)
        for first, count in runs:
            inspection.add(first, count, weight)
        if active:
            inspection.report.allocated_clusters += len(clusters)
            inspection.report.fragmented_clusters += len(runs) - 1
            if self.all_copied and min(values) < COPIED:
                self.all_copied = all(value & COPIED for value in values if value & mask)
        return True

    def _count_uniform(self, table: array[int], *, active: bool, weight: int) -> bool:
        """As _count_plain(), for a table of clusters of its own that follow each other."""
        first, count, size = table[0], len(table), self.cluster_size
        host = first & ~COPIED
        uniform = host and not host & ~(OFFSET_MASK & -size) and first & COPIED and self.counts_data
        if not uniform or host + count * size > self.inspection.file.size:
            return False
        if table[-1] != first + (count - 1) * size or stretch_end(table, 0, count, size) < count:
            return False
        self.inspection.add(host >> self.bits, count, weight)
        if active:
            self.inspection.report.allocated_clusters += count
        return True

    async def _count_again(self) -> None:
        """Add the references of the tables that were met more than once."""
        for offset, times in self.again.items():
            table = await self.inspection.read_table(offset, self.cluster_size // 8)
            if self.entry_words == 1 and self._count_plain(table, active=False, weight=times):
                continue
            bitmaps = islice(table, 1, None, 2) if self.entry_words > 1 else repeat(0)
            for entry, bitmap in zip(islice(table, 0, None, self.entry_words), bitmaps, strict=False):
                self._count_entry_again(entry, bitmap, times)

    def _count_entry_again(self, entry: int, bitmap: int, times: int) -> None:
        if not self.counts_data:
            return
        if not entry & COMPRESSED:
            offset, length = entry & OFFSET_MASK, self.cluster_size
            if not offset:
                return
        elif bitmap:
            return
        else:
            offset, length = compressed_range(entry, self.bits)
        # What lies outside the file was found wrong, as often as it was met, when it was first met.
        if offset + length - self.inspection.file.size < self.cluster_size:
            self.inspection.count(offset, length, times)

    # --- bitmaps ------------------------------------------------------------------------------

    async def _count_bitmaps(self) -> None:
        inspection, header = self.inspection, self.inspection.header
        if header.bitmaps is None:
            return
        size, offset = header.bitmaps.directory_size, header.bitmaps.directory_offset
        inspection.count(offset, size)
        try:
            directory = parse_bitmap_directory(bytes(await inspection.read(offset, size)), header)
        except ImageError:
            inspection.report.corruptions += 1
            raise inspection.fail(errno.EINVAL) from None
        for bitmap in directory:
            await self._count_bitmap(bitmap)

    async def _count_bitmap(self, bitmap: BitmapEntry) -> None:
        inspection = self.inspection
        inspection.count(bitmap.table_offset, bitmap.table_size * 8)
        for entry in filter(None, await inspection.read_table(bitmap.table_offset, bitmap.table_size)):
            offset = entry & OFFSET_MASK
            if entry & BITMAP_TABLE_RESERVED or offset % self.cluster_size or (offset and entry & 1):
                inspection.report.corruptions += 1
            elif offset:
                inspection.count(offset, self.cluster_size)


class L2Visit:
    """The first visit to an L2 table that is not plain, entry by entry; wrong entries that hold no
    data are repaired."""

    def __init__(self, census: Census, offset: int, table: array[int], *, active: bool) -> None:
        self.census = census
        self.inspection = census.inspection
        self.offset = offset
        self.table = table
        self.active = active
        self.expected = 0  # where the next cluster would lie, were it not for fragmentation

    async def run(self) -> None:
        words = self.census.entry_words
        for index in range(self.census.entries):
            entry = self.table[index * words]
            bitmap = self.table[index * words + 1] if words > 1 else 0
            if not entry and not bitmap:
                continue
            if entry & COMPRESSED:
                self._compressed(index, entry, bitmap)
                continue
            if entry & L2_RESERVED:
                self.inspection.corrupt(f"ERROR found l2 entry with reserved bits set: {entry:x}")
            offset = entry & OFFSET_MASK
            if offset or (entry & COPIED and not self.census.counts_data):
                await self._standard(index, entry, bitmap)
            elif bitmap & ALL_ALLOCATED:
                self.inspection.corrupt("ERROR: Unallocated cluster has non-zero subcluster allocation map")

    def _compressed(self, index: int, entry: int, bitmap: int) -> None:
        inspection = self.inspection
        if entry & COPIED:
            offset, _ = compressed_range(entry, inspection.cluster_bits)
            inspection.corrupt(
                f"ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            )
            entry &= ~COPIED
        if not self.census.counts_data:
            inspection.corrupt(f"ERROR compressed cluster {index} with data file, entry={entry:#x}")
            return
        if bitmap:
            inspection.corrupt(
                f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, "
                f"entry={entry:#x}"
            )
            return
        inspection.count(*compressed_range(entry, inspection.cluster_bits))
        if self.active:
            report = inspection.report
            report.allocated_clusters += 1
            report.compressed_clusters += 1
            report.fragmented_clusters += 1

    async def _standard(self, index: int, entry: int, bitmap: int) -> None:
        inspection, size = self.inspection, self.inspection.cluster_size
        offset = entry & OFFSET_MASK
        if bitmap >> 32 & bitmap & ALL_ALLOCATED:
            inspection.corrupt(
                f"ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            )
        if offset % size:
            empty = not bitmap & ALL_ALLOCATED if self.census.entry_words > 1 else entry & ZERO
            if empty:
                inspection.corrupt(
                    f"{'Repairing' if self.census.repair else 'ERROR'} offset={offset:x}: Preallocated "
                    "cluster is not properly aligned; L2 entry corrupted."
                )
                if self.census.repair and await self._make_zero(index, bitmap):
                    return
            else:
                inspection.corrupt(
                    f"ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
                )
        if self.active:
            inspection.report.allocated_clusters += 1
            if self.expected and offset != self.expected:
                inspection.report.fragmented_clusters += 1
            self.expected = offset + size
            if not entry & COPIED:
                self.census.all_copied = False
        if self.census.counts_data:
            inspection.count(offset, size)

    async def _make_zero(self, index: int, bitmap: int) -> bool:
        """Have the entry read as zeroes without a cluster; subclusters that are not in use stay so."""
        words = self.census.entry_words
        at = index * words
        zeroes = (bitmap | bitmap << SUBCLUSTERS) & ALL_ZERO
        new = array("Q", (0, zeroes) if words > 1 else (ZERO,))
        if self.inspection.overlaps(self.offset + at * 8, len(new) * 8):
            self.inspection.report.check_errors += 1
            self.inspection.say("ERROR: Overlap check failed")
            raise self.inspection.fail(errno.EIO)
        try:
            await self.inspection.write_table(self.offset + at * 8, new)
        except OSError as error:
            self.inspection.report.check_errors += 1
            self.inspection.say(f"ERROR: Failed to overwrite L2 table entry: {error}")
            return False
        self.table[at : at + words] = new
        self.inspection.report.corruptions -= 1
        self.inspection.report.corruptions_fixed += 1
        return True


def _runs(clusters: Iterable[int]) -> list[tuple[int, int]]:
    """(first, count) of neighbours that follow each other."""
    numbers = iter(clusters)
    start = following = next(numbers)
    runs: list[tuple[int, int]] = []
    for cluster in numbers:
        following += 1
        if cluster != following:
            runs.append((start, following - start))
            start = following = cluster
    runs.append((start, following + 1 - start))
    return runs


def _figures(report: CheckReport) -> tuple[int, ...]:
    return (
        report.corruptions,
        report.allocated_clusters,
        report.fragmented_clusters,
        report.compressed_clusters,
    )


def _text(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")
