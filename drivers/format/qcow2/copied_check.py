"""The COPIED flags of the active tables: set where a cluster has exactly one reference."""

from __future__ import annotations

import errno
import os
from array import array

from drivers.format.qcow2.inspection import Inspection
from drivers.format.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, REFCOUNT_OFFSET_MASK
from drivers.format.qcow2.refcount_check import RefcountCheck
from drivers.format.qcow2.references import decode


class CopiedCheck:
    """To be run when the refcounts have been compared, and repaired if they are to be."""

    def __init__(self, inspection: Inspection, refcounts: RefcountCheck, *, repair: bool) -> None:
        self.inspection = inspection
        self.refcounts = refcounts
        self.repair = repair
        self.verb = "Repairing" if repair else "ERROR"
        header = inspection.header
        self.words = header.l2_entry_size // 8
        self.has_data_file = header.has_data_file
        self.extended = header.extended_l2
        # By L2 table: what is wrong with it.
        self.found: dict[int, int] = {}

    async def run(self, l1: array[int]) -> None:
        """Check all of the active tables; `l1` is repaired too. Raises OSError."""
        inspection = self.inspection
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            refcount = await self._refcount(offset >> inspection.cluster_bits)
            if refcount is None:
                continue
            if (refcount == 1) != bool(entry & COPIED):
                inspection.corrupt(
                    f"{self.verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} "
                    f"refcount={refcount}"
                )
                if self.repair:
                    l1[index] = entry ^ COPIED
                    at = inspection.header.l1_table_offset + index * 8
                    await inspection.write_table(at, l1[index : index + 1])
                    self._fixed(1)
            if offset not in self.found:
                self.found[offset] = await self._check_l2(offset)
            elif not self.repair:
                inspection.report.corruptions += self.found[offset]

    def _fixed(self, count: int) -> None:
        self.inspection.report.corruptions -= count
        self.inspection.report.corruptions_fixed += count

    async def _check_l2(self, offset: int) -> int:
        """The wrong flags of a table, which are repaired."""
        inspection = self.inspection
        table = await inspection.read_table(offset, inspection.cluster_size // 8)
        bits, stored, clusters = inspection.cluster_bits, self.refcounts.stored, inspection.clusters
        wrong: list[int] = []
        refcount: int | None
        for at in range(0, len(table), self.words):
            entry = table[at]
            if entry < 2 or entry & COMPRESSED:
                continue
            if self.has_data_file:
                if not entry & (OFFSET_MASK | COPIED):
                    continue
                refcount = 1
            elif not entry & OFFSET_MASK:
                continue
            else:
                cluster = (entry & OFFSET_MASK) >> bits
                refcount = stored(cluster) if cluster < clusters else await self._refcount(cluster)
            if refcount is not None and (refcount == 1) != bool(entry & COPIED):
                inspection.corrupt(
                    f"{self.verb} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"
                )
                wrong.append(at)
        if wrong and self.repair:
            await self._repair(offset, table, wrong)
        return len(wrong)

    async def _repair(self, offset: int, table: array[int], wrong: list[int]) -> None:
        inspection = self.inspection
        for at in wrong:
            table[at] ^= COPIED
        if inspection.overlaps(offset, inspection.cluster_size):
            inspection.report.check_errors += 1
            reason = os.strerror(errno.EIO)
            inspection.say(f"ERROR: Could not write L2 table; metadata overlap check failed: {reason}")
            raise inspection.fail(errno.EIO)
        try:
            await inspection.write_table(offset, table)
        except OSError as error:
            inspection.report.check_errors += 1
            inspection.say(f"ERROR: Could not write L2 table: {error.strerror}")
            raise
        self._fixed(len(wrong))

    async def _refcount(self, cluster: int) -> int | None:
        """The refcount on disk; None where it cannot be known."""
        inspection, references = self.inspection, self.inspection.references
        if cluster < inspection.clusters:
            return self.refcounts.stored(cluster)
        index, at = divmod(cluster, references.per_block)
        table = self.refcounts.table
        offset = table[index] & REFCOUNT_OFFSET_MASK if index < len(table) else 0
        if not offset:
            return 0
        if not self.refcounts.readable(offset):
            return None
        page, at = divmod(at, references.page_entries)
        size = self.refcounts.page_bytes
        return decode(await inspection.read(offset + page * size, size), references.order)[at]
