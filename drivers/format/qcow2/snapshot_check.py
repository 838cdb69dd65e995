"""The snapshot table under a check: read as far as it goes, and written again if it was wrong."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace

from drivers.errors import ImageError
from drivers.format.qcow2.directory import SnapshotEntry, parse_snapshot
from drivers.format.qcow2.header import check_snapshot_table
from drivers.format.qcow2.inspection import Inspection
from drivers.format.qcow2.layout import MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS
from drivers.format.qcow2.refcount_check import RefcountCheck

# Where the header has the number of snapshots and the table's offset.
_HEADER_FIELDS = 60
_KNOWN_EXTRA = 24
# The table is read in pieces of this many bytes.
_WINDOW = 1 << 16
# Version 3 requires these: the size of the VM state and of the disk.
_REQUIRED_EXTRA = 16


class SnapshotCheck:
    """`entries`, as they should be, and the `size` in bytes of the table that holds them."""

    def __init__(self, inspection: Inspection) -> None:
        self.inspection = inspection
        self.entries: list[SnapshotEntry] = []
        self.size = 0
        self.corruptions = 0
        self._window = 0, bytearray()

    async def read(self) -> None:
        """Raises CheckFailed where the table is beyond use, or only -r all makes it usable."""
        inspection, header = self.inspection, self.inspection.header
        count = header.snapshot_count
        surplus = count - MAX_SNAPSHOTS
        if surplus > 0 and inspection.fix_errors:
            inspection.say(f"Discarding {surplus} overhanging snapshots")
            self.corruptions += surplus
            count = MAX_SNAPSHOTS
        try:
            check_snapshot_table(replace(header, snapshot_count=count))
        except ImageError as error:
            reason = f"ERROR s{str(error)[1:]}"
            if surplus > 0:
                reason += (
                    f"\nYou can force-remove all {surplus} overhanging snapshots with qemu-img check -r all"
                )
            raise inspection.fail(errno.EFBIG if surplus > 0 else errno.EINVAL, reason) from None
        at = header.snapshots_offset
        for index in range(count):
            entry, end = await self._read_entry(index, at)
            if end - header.snapshots_offset > MAX_SNAPSHOT_TABLE_BYTES:
                self._discard(count - index)
                break
            self.entries.append(entry)
            at = end
        self.size = at - header.snapshots_offset if count else 0
        self._find_incomplete()

    async def _read_entry(self, index: int, at: int) -> tuple[SnapshotEntry, int]:
        """An entry, without what is too much of it, and where the next one begins."""
        inspection = self.inspection
        fixed = SnapshotEntry.FIXED
        head = await self._bytes(at, fixed.size)
        *fields, extra_size = fixed.unpack(head)
        id_size, name_size = fields[2:4]
        extra_at = at + fixed.size
        strings_at = extra_at + extra_size
        if extra_size > MAX_SNAPSHOT_EXTRA:
            if not inspection.fix_errors:
                raise inspection.fail(
                    errno.EFBIG,
                    "ERROR failed to read the snapshot table: Too much extra metadata in snapshot table "
                    f"entry {index}\nYou can force-remove this extra metadata with qemu-img check -r all",
                )
            inspection.say(
                f"Discarding too much extra metadata in snapshot table entry {index} "
                f"({extra_size} > {MAX_SNAPSHOT_EXTRA})"
            )
            self.corruptions += 1
            extra_size = _KNOWN_EXTRA
            head = bytearray(fixed.pack(*fields, extra_size))
        extra = await self._bytes(extra_at, extra_size)
        strings = await self._bytes(strings_at, id_size + name_size)
        entry, _ = parse_snapshot(bytes(head + extra + strings), 0, image_size=inspection.header.size)
        end = strings_at + len(strings)
        return entry, end + -end % 8

    async def _bytes(self, at: int, length: int) -> bytearray:
        """Bytes of the file, of which the next ones will be asked for."""
        start, data = self._window
        if not start <= at <= at + length <= start + len(data):
            start, data = self._window = at, await self.inspection.read(at, max(length, _WINDOW))
        return data[at - start : at - start + length]

    def _discard(self, count: int) -> None:
        if not self.inspection.fix_errors:
            raise self.inspection.fail(
                errno.EFBIG,
                "ERROR failed to read the snapshot table: Snapshot table is too big\n"
                f"You can force-remove all {count} overhanging snapshots with qemu-img check -r all",
            )
        self.inspection.say(f"Discarding {count} overhanging snapshots (snapshot table is too big)")
        self.corruptions += count

    def _find_incomplete(self) -> None:
        if self.inspection.header.version < 3:
            return
        verb = "Repairing" if self.inspection.fix_errors else "ERROR"
        for index, entry in enumerate(self.entries):
            if len(entry.extra) < _REQUIRED_EXTRA:
                self.corruptions += 1
                self.inspection.say(f"{verb} snapshot table entry {index} is incomplete")

    async def repair(self, refcounts: RefcountCheck) -> None:
        """Write the table anew, if something was wrong with it and may be repaired."""
        inspection = self.inspection
        if not self.corruptions or not inspection.fix_errors:
            inspection.report.corruptions += self.corruptions
            return
        try:
            await self._write(refcounts)
        except OSError as error:
            inspection.report.check_errors += 1
            inspection.report.corruptions += self.corruptions
            inspection.say(f"ERROR failed to update snapshot table: {error.strerror}")
            return
        inspection.report.corruptions_fixed += self.corruptions

    async def _write(self, refcounts: RefcountCheck) -> None:
        inspection, header = self.inspection, self.inspection.header
        bits, size = inspection.cluster_bits, inspection.cluster_size
        table = b"".join(
            replace(entry, extra=entry.extra.ljust(_KNOWN_EXTRA, b"\0")).build() for entry in self.entries
        )
        offset = 0
        if table:
            count = -(-len(table) // size)
            offset = await refcounts.take(count) << bits
            if offset + (count << bits) > inspection.file.size:
                await inspection.file.truncate(offset + (count << bits))
            await inspection.file.write(offset, table)
            await inspection.file.flush()
        await inspection.file.write(_HEADER_FIELDS, struct.pack(">IQ", len(self.entries), offset))
        await inspection.file.flush()
        inspection.header = replace(
            inspection.header, snapshot_count=len(self.entries), snapshots_offset=offset
        )
        if self.size:
            await refcounts.drop(header.snapshots_offset >> bits, -(-self.size // size))
            await inspection.file.flush()
