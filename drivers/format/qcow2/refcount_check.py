"""Holding an image's refcounts against what was counted, and putting them right: in their places,
or, where those are missing or wrong themselves, as a whole new structure."""

from __future__ import annotations

import errno
import os
import struct
from array import array
from dataclasses import replace
from operator import gt, lt

from drivers.block.limits import MAX_SIZE
from drivers.format.qcow2.inspection import Inspection
from drivers.format.qcow2.layout import REFCOUNT_OFFSET_MASK, REFCOUNT_RESERVED
from drivers.format.qcow2.references import decode, encode

# As many clusters as QEMU counts.
MAX_CLUSTERS = (1 << 31) - 1
# Where the header has the refcount table's offset and clusters.
_TABLE_FIELDS = 48


class RefcountCheck:
    """`table`: the refcount table. `rebuild`: the structure is beyond repair in its place.
    `highest`: the last cluster that is in use or counted so. `wrong`: pages of refcounts on disk
    which are not what was counted, by page.
    `unreadable`: blocks, by index."""

    def __init__(self, inspection: Inspection, table: array[int]) -> None:
        self.inspection = inspection
        self.table = table
        self.rebuild = False
        self.highest = 0
        self.wrong: dict[int, array[int]] = {}
        self.unreadable: set[int] = set()
        references = inspection.references
        self.pages_per_block = references.per_block // references.page_entries
        self.page_bytes = inspection.cluster_size // self.pages_per_block

    # --- the blocks themselves -------------------------------------------------------------------

    async def count_blocks(self, *, repair: bool) -> None:
        """Count the references of the refcount table; each block may have that one alone."""
        inspection = self.inspection
        for index, entry in enumerate(self.table):
            if not entry:
                continue
            offset = entry & REFCOUNT_OFFSET_MASK
            if entry & REFCOUNT_RESERVED:
                inspection.corrupt(f"ERROR refcount table entry {index} has reserved bits set")
                self.rebuild = True
            elif offset % inspection.cluster_size:
                inspection.corrupt(
                    f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
                self.rebuild = True
            elif offset >> inspection.cluster_bits >= inspection.clusters:
                await self._beyond_end(index, offset, repair=repair)
            elif offset:
                inspection.count(offset, inspection.cluster_size)
                count = inspection.references.get(offset >> inspection.cluster_bits)
                if count != 1:
                    inspection.corrupt(f"ERROR refcount block {index} refcount={count}")
                    self.rebuild = True

    async def _beyond_end(self, index: int, offset: int, *, repair: bool) -> None:
        """A block behind the end of the file: let the file grow to have it, all zeroes."""
        inspection = self.inspection
        inspection.corrupt(f"{'Repairing' if repair else 'ERROR'} refcount block {index} is outside image")
        if not repair:
            return
        end = offset + inspection.cluster_size
        reason = ""
        if offset > MAX_SIZE - inspection.cluster_size:
            reason = os.strerror(errno.EINVAL)
        elif end >> inspection.cluster_bits > MAX_CLUSTERS:
            reason = os.strerror(errno.EFBIG)
        else:
            try:
                await inspection.file.truncate(end)
            except OSError as error:
                reason = error.strerror or str(error)
        if reason:
            self.rebuild = True
            inspection.say(f"ERROR could not resize image: {reason}")
            return
        inspection.clusters = end >> inspection.cluster_bits
        inspection.report.corruptions -= 1
        inspection.report.corruptions_fixed += 1
        inspection.count(offset, inspection.cluster_size)

    # --- comparing -------------------------------------------------------------------------------

    async def compare(self, *, fix_leaks: bool = False, fix_errors: bool = False) -> None:
        """Hold the refcounts against the references, and set right what may be."""
        inspection = self.inspection
        self.wrong.clear()
        self.unreadable.clear()
        self.highest = 0
        freed: list[tuple[int, int]] = []
        for index in self._blocks():
            offset = self.table[index] & REFCOUNT_OFFSET_MASK if index < len(self.table) else 0
            block: bytes | bytearray = b""
            if not self.readable(offset):
                self._not_readable(index)
                continue
            if offset:
                block = await inspection.read(offset, inspection.cluster_size)
            for number in range(self.pages_per_block):
                page = index * self.pages_per_block + number
                stored = memoryview(block)[number * self.page_bytes :][: self.page_bytes]
                new = self._compare_page(
                    page, stored, fix_leaks=fix_leaks, fix_errors=fix_errors, freed=freed
                )
                if new is not None and offset:
                    data = encode(new, inspection.references.order)
                    await inspection.file.write(offset + number * self.page_bytes, data)
        if freed:
            await inspection.file.flush()
            for first, end in freed:
                await inspection.file.discard(
                    first << inspection.cluster_bits,
                    min(end << inspection.cluster_bits, inspection.file.size)
                    - (first << inspection.cluster_bits),
                )

    def _blocks(self) -> list[int]:
        """The refcount blocks that count the file's clusters, there or needed."""
        references = self.inspection.references
        end = -(-self.inspection.clusters // references.per_block)
        found = {index for index, entry in enumerate(self.table[:end]) if entry & REFCOUNT_OFFSET_MASK}
        found.update(page // self.pages_per_block for page in references.pages)
        return sorted(found)

    def readable(self, offset: int) -> bool:
        """Whether a refcount block may lie there."""
        size = self.inspection.cluster_size
        return not offset % size and offset <= MAX_SIZE - size

    def _not_readable(self, index: int) -> None:
        inspection = self.inspection
        self.unreadable.add(index)
        per_block = inspection.references.per_block
        first = index * per_block
        for cluster in range(first, min(first + per_block, inspection.clusters)):
            inspection.report.check_errors += 1
            inspection.say(f"Can't get refcount for cluster {cluster}: {os.strerror(errno.EIO)}")

    def _compare_page(
        self,
        page: int,
        stored: memoryview,
        *,
        fix_leaks: bool,
        fix_errors: bool,
        freed: list[tuple[int, int]],
    ) -> array[int] | None:
        """Compare one page; what to write in the place of `stored`, if anything."""
        inspection, references = self.inspection, self.inspection.references
        first = page * references.page_entries
        size = min(references.page_entries, inspection.clusters - first)
        if size <= 0:
            return None
        whole = decode(stored, references.order) if stored else references.empty
        wanted, found = references.look(page), whole
        if size < references.page_entries:
            wanted, found = wanted[:size], found[:size]
        nothing = references.empty[:size]
        if wanted == found:
            if wanted != nothing:
                self.highest = first + _last_nonzero(wanted)
            return None
        self.highest = first + max(_last_nonzero(wanted), _last_nonzero(found))
        fixed = found[:]
        for at, (refcount, reference) in enumerate(zip(found, wanted, strict=True)):
            if refcount == reference:
                continue
            if refcount == 0:
                self.rebuild = True
                may_fix = False
            else:
                may_fix = fix_leaks if refcount > reference else fix_errors
            self._say_mismatch(first + at, refcount, reference, may_fix)
            if may_fix:
                fixed[at] = reference
                if not reference:
                    _extend(freed, first + at)
        self._tally(found, fixed, wanted)
        if fixed != wanted:
            self.wrong[page] = fixed
        if fixed == found:
            return None
        return fixed + whole[size:]

    def _say_mismatch(self, cluster: int, refcount: int, reference: int, fixing: bool) -> None:
        verb = "Repairing" if fixing else "ERROR" if refcount < reference else "Leaked"
        self.inspection.say(f"{verb} cluster {cluster} refcount={refcount} reference={reference}")

    def _tally(self, found: array[int], fixed: array[int], wanted: array[int]) -> None:
        report = self.inspection.report
        missing, leaked = sum(map(lt, fixed, wanted)), sum(map(gt, fixed, wanted))
        report.corruptions += missing
        report.leaks += leaked
        report.corruptions_fixed += sum(map(lt, found, wanted)) - missing
        report.leaks_fixed += sum(map(gt, found, wanted)) - leaked

    def stored(self, cluster: int) -> int | None:
        """The refcount on disk of a cluster of the file, as compare() found or made it; None where
        it cannot be known."""
        references = self.inspection.references
        index, at = divmod(cluster, references.page_entries)
        page = self.wrong.get(index)
        if self.unreadable and index // self.pages_per_block in self.unreadable:
            return None
        return references.get(cluster) if page is None or at >= len(page) else page[at]

    # --- a new structure -------------------------------------------------------------------------

    async def build_anew(self) -> None:
        """Write new blocks and a new table to free clusters and have the header point there. The
        old ones are left, as leaks."""
        inspection, references = self.inspection, self.inspection.references
        blocks, table_at, table_clusters = self._allocate()
        end = max((*blocks.values(), table_at + table_clusters - 1)) + 1
        if end << inspection.cluster_bits > inspection.file.size:
            await inspection.file.truncate(end << inspection.cluster_bits)
        for index, cluster in blocks.items():
            first = index * self.pages_per_block
            pages = (references.look(first + number) for number in range(self.pages_per_block))
            data = b"".join(encode(page, references.order) for page in pages)
            await inspection.file.write(cluster << inspection.cluster_bits, data)
        table = array("Q", bytes(table_clusters << inspection.cluster_bits))
        for index, cluster in blocks.items():
            table[index] = cluster << inspection.cluster_bits
        offset = table_at << inspection.cluster_bits
        await inspection.write_table(offset, table)
        await inspection.file.flush()
        await inspection.file.write(_TABLE_FIELDS, struct.pack(">QI", offset, table_clusters))
        await inspection.file.flush()
        inspection.header = replace(
            inspection.header, refcount_table_offset=offset, refcount_table_clusters=table_clusters
        )
        self.table = table

    def _allocate(self) -> tuple[dict[int, int], int, int]:
        """Clusters for the blocks, by index, and for the table: the first one and how many."""
        inspection, references = self.inspection, self.inspection.references
        blocks: dict[int, int] = {}
        table_at = table_clusters = free = 0
        while True:
            missing = [index for index in self._used_blocks() if index not in blocks]
            for index in missing:
                free = references.free_run(1, free)
                blocks[index] = free
                references.set(free, 1)
            if missing:
                continue  # their own clusters may be counted by blocks that are new, too
            needed = -(-8 * (max(blocks) + 1) // inspection.cluster_size)
            if needed <= table_clusters:
                return blocks, table_at, table_clusters
            for cluster in range(table_at, table_at + table_clusters):
                references.set(cluster, 0)
            table_clusters = needed
            table_at = references.free_run(needed, 0)
            references.add(table_at, needed)

    def _used_blocks(self) -> list[int]:
        references = self.inspection.references
        pages = (index for index, page in references.pages.items() if page != references.empty)
        return sorted({page // self.pages_per_block for page in pages})

    # --- changing counts ---------------------------------------------------------------------------

    async def take(self, count: int) -> int:
        """Neighbouring free clusters, with a reference each, on disk as well; the first one."""
        inspection, references = self.inspection, self.inspection.references
        first = references.free_run(count, 0)
        references.add(first, count)
        blocks = {cluster // references.per_block for cluster in (first, first + count - 1)}
        if all(index < len(self.table) and self.table[index] for index in blocks):
            await self.store(first, count)
        else:
            shift = inspection.cluster_bits
            old = [entry >> shift for entry in self.table if entry]
            at = inspection.header.refcount_table_offset >> shift
            old += range(at, at + inspection.header.refcount_table_clusters)
            await self.build_anew()
            for cluster in old:
                await self.drop(cluster, 1)
        await inspection.file.flush()
        return first

    async def drop(self, first: int, count: int) -> None:
        """A reference less to each of these clusters."""
        references = self.inspection.references
        for cluster in range(first, first + count):
            references.set(cluster, max(0, references.get(cluster) - 1))
        await self.store(first, count)

    async def store(self, first: int, count: int) -> None:
        """Write the refcounts of these clusters as they were counted. Their blocks exist."""
        inspection, references = self.inspection, self.inspection.references
        end = first + count
        while first < end:
            page, at = divmod(first, references.page_entries)
            part = min(end - first, references.page_entries - at)
            index, number = divmod(page, self.pages_per_block)
            offset = (self.table[index] & REFCOUNT_OFFSET_MASK) + number * self.page_bytes
            counts = decode(await inspection.read(offset, self.page_bytes), references.order)
            counts[at : at + part] = references.look(page)[at : at + part]
            await inspection.file.write(offset, encode(counts, references.order))
            first += part


def _last_nonzero(counts: array[int]) -> int:
    for at in range(len(counts) - 1, -1, -1):
        if counts[at]:
            return at
    return -1


def _extend(ranges: list[tuple[int, int]], cluster: int) -> None:
    if ranges and ranges[-1][1] == cluster:
        ranges[-1] = ranges[-1][0], cluster + 1
    else:
        ranges.append((cluster, cluster + 1))
