"""Internal snapshots: the snapshot table, and L1 tables that share clusters.

See QEMU's docs/interop/qcow2.txt, "Snapshots". Each change is complete with one write of the header:
until then the image is what it was, from then on what it shall be; references are counted before it
and dropped after it. Where the power goes in between, some clusters are in use that nobody refers to.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Literal, Protocol

import trio

from drivers.block.image import SnapshotInfo
from drivers.block.node import OpenFlags
from drivers.errors import ImageError, RequestError
from drivers.format.qcow2.directory import SnapshotEntry, parse_snapshot
from drivers.format.qcow2.header import check_table
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.imagefile import ImageFile
from drivers.format.qcow2.layout import (
    MAX_L1_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    SNAPSHOT_ENTRY_SIZE,
)
from drivers.format.qcow2.refcounts import Run, pack_table, unpack_table
from drivers.format.qcow2.references import add_references, clear_copied, drop_references, restore_copied

# Bytes of a name at most; the rest is cut off, as QEMU does it.
MAX_NAME = 255
_READ_SIZE = 64 << 10


class Disk(Protocol):
    """The node that shows the image."""

    flags: OpenFlags

    def alone(self) -> AbstractAsyncContextManager[None]:
        """Inside, no request is in flight."""
        ...

    def check_resizable(self) -> None:
        """Raises RequestError where something speaks against another size."""
        ...

    def became(self, size: int) -> None:
        """The disk is another one now, of `size` bytes."""
        ...


async def read_snapshots(file: ImageFile) -> tuple[list[SnapshotEntry], int]:
    """The snapshot table and its length in bytes; what is read is hardly more. Raises ImageError."""
    header = file.header
    data = bytearray()

    async def have(length: int) -> None:
        if length > MAX_SNAPSHOT_TABLE_BYTES:
            raise ImageError("Snapshot table is too large")
        if length > len(data):
            more = max(_READ_SIZE, length - len(data))
            data.extend(await file.read(header.snapshots_offset + len(data), more))

    entries: list[SnapshotEntry] = []
    at = 0
    for _ in range(header.snapshot_count):
        await have(at + SNAPSHOT_ENTRY_SIZE)
        id_size, name_size = struct.unpack_from(">HH", data, at + 12)
        (extra_size,) = struct.unpack_from(">I", data, at + 36)
        await have(at + SNAPSHOT_ENTRY_SIZE + extra_size + id_size + name_size)
        entry, at = parse_snapshot(memoryview(data), at, image_size=header.size)
        entries.append(entry)
    return entries, at


Runs = list[Run]


class Qcow2Snapshots:
    """`table_length`: bytes that the snapshot table takes up in the file."""

    def __init__(self, disk: Disk, image: Image, entries: Sequence[SnapshotEntry], table_length: int) -> None:
        self._disk = disk
        self._image = image
        self._entries = tuple(entries)
        self._table_length = table_length
        self._claim_table()

    # --- looking ----------------------------------------------------------------------------

    def list(self) -> Sequence[SnapshotInfo]:
        return [_info(entry) for entry in self._entries]

    def find(self, key: str, *, by: Literal["any", "id", "name"] = "any") -> SnapshotInfo | None:
        index = self._index(key, by)
        return None if index is None else _info(self._entries[index])

    def _index(self, key: str, by: Literal["any", "id", "name"] = "any") -> int | None:
        wanted = key.encode(errors="surrogateescape")
        kinds = ("id", "name") if by == "any" else (by,)
        for kind in kinds:
            for index, entry in enumerate(self._entries):
                if wanted == (entry.id if kind == "id" else entry.name):
                    return index
        return None

    def _required(self, key: str) -> int:
        index = self._index(key)
        if index is None:
            raise RequestError(errno.ENOENT, "Can't find snapshot")
        return index

    # --- creating ---------------------------------------------------------------------------

    async def create(self, name: str) -> SnapshotInfo:
        async with self._changing():
            if len(self._entries) >= MAX_SNAPSHOTS:
                raise RequestError(errno.EFBIG, f"an image has at most {MAX_SNAPSHOTS} snapshots")
            return _info(await self._create(name.encode(errors="surrogateescape")[:MAX_NAME]))

    async def _create(self, name: bytes) -> SnapshotEntry:
        image, l1 = self._image, self._image.mapping.l1
        now = time.time_ns()
        entry = SnapshotEntry(
            l1_table_offset=0,
            l1_size=len(l1),
            id=self._new_id(),
            name=name,
            date_seconds=now // 10**9,
            date_nanoseconds=now % 10**9,
            vm_clock_nanoseconds=0,
            vm_state_size=0,
            disk_size=image.size,
            icount=0,
        )
        _build([*self._entries, entry])  # whether it fits, before anything happens
        await add_references(image, l1)
        runs: Runs = []
        try:
            if l1:
                runs.append(await self._allocate(len(l1) * 8))
                entry = replace(entry, l1_table_offset=runs[0].offset)
            await image.metadata.flush(refcounts=True)
            # What two tables share is written in place by neither, from before there are two.
            await self._share_active()
            copy = array("Q", [offset & OFFSET_MASK for offset in l1])
            if l1:
                await _write_table(image, runs[0], pack_table(copy))
            table = await self._write_entries([*self._entries, entry], runs)
        except BaseException:
            await self._undo(l1, runs)
            raise
        await self._switch([*self._entries, entry], table)
        self._claim_l1(entry, copy)
        return entry

    def _new_id(self) -> bytes:
        return b"%d" % (max((_leading_number(entry.id) for entry in self._entries), default=0) + 1)

    async def _share_active(self) -> None:
        mapping = self._image.mapping
        mapping.l1_dirty.update(index for index, entry in enumerate(mapping.l1) if entry)
        mapping.drop()
        await clear_copied(self._image, mapping.l1)
        await self._image.metadata.flush()

    # --- applying ---------------------------------------------------------------------------

    async def apply(self, key: str) -> None:
        async with self._changing():
            await self._apply(self._entries[self._required(key)])

    async def _apply(self, entry: SnapshotEntry) -> None:
        image = self._image
        size = entry.disk_size
        if size != image.size:
            if image.header.version < 3:
                raise RequestError(errno.ENOTSUP, "Can't resize a v2 image which has snapshots")
            self._disk.check_resizable()
        l1 = await self._read_l1(entry)
        old, old_offset = image.mapping.l1, image.header.l1_table_offset
        await add_references(image, l1)
        runs: Runs = []
        try:
            runs.append(await self._allocate(len(l1) * 8))
            await image.metadata.flush(refcounts=True)
            await clear_copied(image, l1)
            await _write_table(image, runs[0], pack_table(l1))
            await image.file.flush()
        except BaseException:
            await self._undo(l1, runs)
            raise
        await image.file.update_header(l1_table_offset=runs[0].offset, l1_size=len(l1), size=size)
        image.size = size
        image.file.release(old_offset, max(1, len(old) * 8))
        image.mapping.replace(l1)
        self._disk.became(size)
        await image.file.flush()
        await drop_references(image, old)
        if old:
            self._free(old_offset, len(old) * 8)
        await image.metadata.commit()
        await image.metadata.flush(refcounts=True)

    async def _read_l1(self, entry: SnapshotEntry) -> array[int]:
        """The L1 table of a snapshot, as long as its disk needs it: behind that may be the state of a
        virtual machine. Without COPIED flags."""
        image = self._image
        needed = max(1, image.header.needed_l1_size(entry.disk_size))
        if needed * 8 > MAX_L1_BYTES:
            raise ImageError("Snapshot disk size is too large")
        whole = await self._read_whole_l1(entry)
        l1 = array("Q", [offset & ~(1 << 63) for offset in whole[:needed]])
        l1.extend([0] * (needed - len(l1)))
        return l1

    async def _read_whole_l1(self, entry: SnapshotEntry) -> array[int]:
        if not entry.l1_size:
            return array("Q")
        file = self._image.file
        check_table(file.header, entry.l1_table_offset, entry.l1_size * 8, MAX_L1_BYTES, "Snapshot L1 table")
        return unpack_table(await file.read(entry.l1_table_offset, entry.l1_size * 8))

    # --- deleting ---------------------------------------------------------------------------

    async def delete(self, key: str) -> None:
        async with self._changing(external=True):
            index = self._required(key)
            entry = self._entries[index]
            image = self._image
            l1 = await self._read_whole_l1(entry)
            rest = (*self._entries[:index], *self._entries[index + 1 :])
            table = await self._write_entries(rest, [])
            await self._switch(rest, table)
            await drop_references(image, l1)
            if l1:
                image.file.release(entry.l1_table_offset, len(l1) * 8)
                self._free(entry.l1_table_offset, len(l1) * 8)
            # The references are dropped in memory; then the flags are set, then the counts written.
            await image.metadata.commit()
            await restore_copied(image)
            await image.metadata.flush(refcounts=True)

    # --- reading ----------------------------------------------------------------------------

    async def load(self, key: str) -> None:
        image = self._image
        if not self._disk.flags.read_only:
            raise RequestError(errno.EINVAL, "Device is not readonly")
        async with self._disk.alone():
            entry = self._entries[self._required(key)]
            image.mapping.replace(await self._read_l1(entry))
            image.size = entry.disk_size
            self._disk.became(image.size)

    # --- parts ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _changing(self, *, external: bool = False) -> AsyncIterator[None]:
        """Nothing else happens, and nothing in memory is ahead of the file. What has begun is ended."""
        image = self._image
        if image.external and not external:
            raise RequestError(errno.ENOTSUP, "images with a data file have no snapshots")
        async with self._disk.alone():
            image.check_writable()
            with trio.CancelScope(shield=True):
                await image.metadata.mark_dirty()
                await image.metadata.flush()
                yield

    async def _allocate(self, length: int) -> Run:
        return await self._image.refcounts.allocate(-(-length // self._image.file.cluster_size))

    def _free(self, offset: int, length: int) -> None:
        self._image.metadata.free(offset, -(-length // self._image.file.cluster_size), "snapshot")

    async def _write_entries(self, entries: Sequence[SnapshotEntry], runs: Runs) -> Run | None:
        """Write the snapshot table to a new place, durably, which is added to `runs`; None for none."""
        image = self._image
        run: Run | None = None
        if entries:
            data = _build(entries)
            run = await self._allocate(len(data))
            runs.append(run)
            await _write_table(image, run, data)
        await image.metadata.flush(refcounts=True)
        return run

    async def _switch(self, entries: Sequence[SnapshotEntry], table: Run | None) -> None:
        """Let the header lead to the new table, and free the old one."""
        image = self._image
        old, old_length = image.header.snapshots_offset, self._table_length
        await image.file.update_header(
            snapshots_offset=table.offset if table else 0, snapshot_count=len(entries)
        )
        await image.file.flush()
        if self._entries:
            image.file.release(old, old_length)
            self._free(old, old_length)
        self._entries = tuple(entries)
        self._table_length = sum(len(entry.build()) for entry in entries)
        self._claim_table()
        await image.metadata.commit()

    async def _undo(self, l1: array[int], runs: Runs) -> None:
        """The header was not switched: give up what was counted for it. Where even that fails, it
        stays counted."""
        image = self._image
        with contextlib.suppress(OSError):
            for run in runs:
                await image.refcounts.give_back(run)
            await drop_references(image, l1)
            await image.metadata.commit()
            await restore_copied(image)
            await image.metadata.flush(refcounts=True)

    # --- claims -----------------------------------------------------------------------------

    def _claim_table(self) -> None:
        if self._entries:
            file = self._image.file
            file.claim(file.header.snapshots_offset, self._table_length, "snapshot-table")

    def _claim_l1(self, entry: SnapshotEntry, l1: array[int]) -> None:
        file = self._image.file
        if l1:
            file.claim(entry.l1_table_offset, len(l1) * 8, "inactive-l1")

    async def claim_all(self) -> None:
        """Tell the overlap checks where the snapshots' tables lie."""
        file = self._image.file
        for entry in self._entries:
            if "inactive-l1" in file.checks and entry.l1_size:
                length = entry.l1_size * 8
                check_table(file.header, entry.l1_table_offset, length, MAX_L1_BYTES, "Snapshot L1 table")
                file.claim(entry.l1_table_offset, length, "inactive-l1")
            if "inactive-l2" in file.checks:
                for offset in await self._read_whole_l1(entry):
                    if offset & OFFSET_MASK and file.overlap(offset & OFFSET_MASK, 1) is None:
                        file.claim(offset & OFFSET_MASK, 1, "inactive-l2")


async def _write_table(image: Image, run: Run, data: bytes) -> None:
    await image.file.write(run.offset, data + bytes(-len(data) % image.file.cluster_size))


def _build(entries: Sequence[SnapshotEntry]) -> bytes:
    data = b"".join(entry.build() for entry in entries)
    if len(data) > MAX_SNAPSHOT_TABLE_BYTES:
        raise RequestError(errno.EFBIG, "the snapshot table would be too large")
    return data


def _info(entry: SnapshotEntry) -> SnapshotInfo:
    return SnapshotInfo(
        id=entry.id.decode(errors="surrogateescape"),
        name=entry.name.decode(errors="surrogateescape"),
        disk_size=entry.disk_size,
        vm_state_size=entry.vm_state_size,
        date_seconds=entry.date_seconds,
        date_nanoseconds=entry.date_nanoseconds,
        vm_clock_nanoseconds=entry.vm_clock_nanoseconds,
        icount=entry.icount,
    )


def _leading_number(text: bytes) -> int:
    digits = text[: len(text) - len(text.lstrip(b"0123456789"))]
    return int(digits or b"0")
