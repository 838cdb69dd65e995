"""Checking qcow2 images, and repairing them: see ImageNode.check()."""

from __future__ import annotations

import errno
import struct
from array import array
from dataclasses import replace

from drivers.block.image import CheckReport, Repair
from drivers.block.node import Node
from drivers.format.qcow2.census import Census
from drivers.format.qcow2.copied_check import CopiedCheck
from drivers.format.qcow2.header import Header, Incompatible
from drivers.format.qcow2.inspection import Inspection
from drivers.format.qcow2.layout import REFCOUNT_OFFSET_MASK
from drivers.format.qcow2.refcount_check import MAX_CLUSTERS, RefcountCheck
from drivers.format.qcow2.snapshot_check import SnapshotCheck

_INCOMPATIBLE_AT = 72


async def check(file: Node, header: Header, repair: Repair = Repair.NONE) -> tuple[CheckReport, Header]:
    """Check the image in `file`, of which nothing is cached or in flight, and repair it.

    `header` as parse_header(for_check=True) gives it; the result has it as it is now. Whoever calls
    reads everything anew afterwards. Raises OSError where the check cannot be finished; as
    CheckFailed with the lines up to there.
    """
    inspection = Inspection(file, header, repair)
    await _Check(inspection).run()
    return inspection.report, inspection.header


class _Check:
    def __init__(self, inspection: Inspection) -> None:
        self.inspection = inspection
        self.l1: array[int] = array("Q")
        self.snapshots = SnapshotCheck(inspection)

    async def run(self) -> None:
        inspection, report = self.inspection, self.inspection.report
        await self.snapshots.read()
        if inspection.clusters > MAX_CLUSTERS:
            report.check_errors += 1
            raise inspection.fail(errno.EFBIG)
        header = inspection.header
        report.total_clusters = -(-header.size // header.cluster_size)
        self.l1 = await inspection.read_table(header.l1_table_offset, header.l1_size)
        if inspection.fix_leaks:
            await self._find_metadata()
        census, refcounts = await self._count(repair=inspection.fix_errors)
        refcounts = await self._compare(refcounts)
        await self._check_copied(census, refcounts)
        report.image_end_offset = (refcounts.highest + 1) << header.cluster_bits
        await self.snapshots.repair(refcounts)
        if inspection.fix_leaks:
            await inspection.file.flush()
            if not report.corruptions and not report.check_errors:
                await self._mark_clean()

    async def _count(self, *, repair: bool) -> tuple[Census, RefcountCheck]:
        inspection, header = self.inspection, self.inspection.header
        census = Census(inspection, repair=repair)
        await census.run(self.l1, self.snapshots.entries, self.snapshots.size)
        entries = header.refcount_table_clusters << header.cluster_bits >> 3
        table = await inspection.read_table(header.refcount_table_offset, entries)
        refcounts = RefcountCheck(inspection, table)
        await refcounts.count_blocks(repair=repair)
        return census, refcounts

    async def _find_metadata(self) -> None:
        """What the repair of an L2 table must not overwrite."""
        inspection, header = self.inspection, self.inspection.header
        size = header.cluster_size
        entries = header.refcount_table_clusters << header.cluster_bits >> 3
        blocks = await inspection.read_table(header.refcount_table_offset, entries)
        ranges = [
            (0, size),
            (header.l1_table_offset, header.l1_size * 8),
            (header.refcount_table_offset, entries * 8),
            (header.snapshots_offset, self.snapshots.size),
            *((entry & REFCOUNT_OFFSET_MASK, size) for entry in filter(None, blocks)),
            *((entry.l1_table_offset, entry.l1_size * 8) for entry in self.snapshots.entries),
        ]
        inspection.metadata = [(offset, offset + length) for offset, length in ranges if length]

    async def _compare(self, refcounts: RefcountCheck) -> RefcountCheck:
        inspection, report = self.inspection, self.inspection.report
        before = replace(report)
        await refcounts.compare()
        if refcounts.rebuild and inspection.fix_errors:
            return await self._rebuild(refcounts)
        if not inspection.fix_leaks:
            return refcounts
        if refcounts.rebuild:
            inspection.say("ERROR need to rebuild refcount structures")
            raise inspection.fail(errno.EIO)
        if report.leaks or report.corruptions:
            report.leaks, report.corruptions = before.leaks, before.corruptions
            report.check_errors = before.check_errors
            await refcounts.compare(fix_leaks=True, fix_errors=inspection.fix_errors)
        return refcounts

    async def _rebuild(self, refcounts: RefcountCheck) -> RefcountCheck:
        """New refcount structures; what the old ones took is free then."""
        inspection, report = self.inspection, self.inspection.report
        inspection.say("Rebuilding refcount structure")
        corruptions, leaks = report.corruptions, report.leaks
        await refcounts.build_anew()
        await self._find_metadata()
        report.corruptions = report.leaks = 0
        report.allocated_clusters = report.fragmented_clusters = report.compressed_clusters = 0
        inspection.start_over()
        _, refcounts = await self._count(repair=False)
        report.corruptions_fixed += max(0, corruptions - report.corruptions)
        report.leaks_fixed += max(0, leaks - report.leaks)
        still, fixed = replace(report), (report.corruptions_fixed, report.leaks_fixed)
        refcounts.rebuild = False
        await refcounts.compare(fix_leaks=True)
        if refcounts.rebuild:
            inspection.say("ERROR rebuilt refcount structure is still broken")
        # What the rebuilding itself left over is no finding of the check.
        report.corruptions = still.corruptions
        report.corruptions_fixed, report.leaks_fixed = fixed
        return refcounts

    async def _check_copied(self, census: Census, refcounts: RefcountCheck) -> None:
        inspection, report = self.inspection, self.inspection.report
        clean = not (report.corruptions or report.leaks or report.check_errors)
        if clean and census.all_copied and not inspection.references.shared:
            return  # each cluster has one reference, and COPIED says so
        repair = inspection.fix_errors or (inspection.fix_leaks and clean)
        await CopiedCheck(inspection, refcounts, repair=repair).run(self.l1)

    async def _mark_clean(self) -> None:
        """The image is in order: neither dirty nor corrupt any more."""
        inspection, header = self.inspection, self.inspection.header
        cleared = header.incompatible & ~(Incompatible.DIRTY | Incompatible.CORRUPT)
        if header.version < 3 or cleared == header.incompatible:
            return
        await inspection.file.write(_INCOMPATIBLE_AT, struct.pack(">Q", cleared))
        await inspection.file.flush()
        inspection.header = replace(header, incompatible=cleared)
