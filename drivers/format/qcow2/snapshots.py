"""Internal snapshots: the snapshot table, and L1 tables that share clusters.

See QEMU's docs/interop/qcow2.txt, "Snapshots". The flags of the active tables have to say at every
moment what the refcounts say, so all of them change at once: see rewriting.py. L2 tables whose flags
change are copied for the image itself; a snapshot keeps its own with flags that mean nothing there.
"""

from __future__ import annotations

import errno
import struct
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, Literal, Protocol

from drivers.block.image import SnapshotInfo
from drivers.block.node import OpenFlags
from drivers.errors import ImageError, RequestError
from drivers.format.qcow2.directory import SnapshotEntry, parse_snapshot
from drivers.format.qcow2.header import check_table
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.imagefile import ImageFile
from drivers.format.qcow2.layout import (
    COPIED,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    SNAPSHOT_ENTRY_SIZE,
)
from drivers.format.qcow2.refcounts import pack_table, unpack_table
from drivers.format.qcow2.rewriting import Rewrite, rewriting
from drivers.format.qcow2.sharing import WITHOUT_COPIED, Flags, read_table, references, shared, used

# Extra data of an entry of version 3: the size of the machine's state, and that of the disk.
MIN_EXTRA = 16
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


class Qcow2Snapshots:
    """`table_length`: bytes that the snapshot table takes up in the file."""

    def __init__(self, disk: Disk, image: Image, entries: Sequence[SnapshotEntry], table_length: int) -> None:
        self._disk = disk
        self._image = image
        self._entries = tuple(entries)
        self._table_length = table_length

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
        image = self._image
        async with self._disk.alone():
            self._refuse_external()
            if len(self._entries) >= MAX_SNAPSHOTS:
                raise RequestError(errno.EFBIG, f"an image has at most {MAX_SNAPSHOTS} snapshots")
            entry = self._new_entry(name.encode(errors="surrogateescape")[:MAX_NAME])
            entries = (*self._entries, entry)
            _build(entries)  # whether it fits, before anything happens
            async with rewriting(image) as rewrite:
                snapshot_l1 = array("Q", [at & OFFSET_MASK for at in image.mapping.l1])
                l1 = await self._share(rewrite, snapshot_l1)
                if l1:
                    entry = replace(entry, l1_table_offset=await rewrite.write(pack_table(snapshot_l1)))
                entries = (*self._entries, entry)
                table = await self._write_entries(rewrite, entries)
                await rewrite.finish(**table, **await self._write_l1(rewrite, l1))
                await self._became(entries, l1)
            return _info(entry)

    def _new_entry(self, name: bytes) -> SnapshotEntry:
        now = time.time_ns()
        number = max((_leading_number(entry.id) for entry in self._entries), default=0) + 1
        return SnapshotEntry(
            l1_table_offset=0,
            l1_size=len(self._image.mapping.l1),
            id=b"%d" % number,
            name=name,
            date_seconds=now // 10**9 & 0xFFFFFFFF,
            date_nanoseconds=now % 10**9,
            vm_clock_nanoseconds=0,
            vm_state_size=0,
            disk_size=self._image.size,
            icount=0,
        )

    async def _share(self, rewrite: Rewrite, l1: array[int]) -> array[int]:
        """Another L1 table that leads to the clusters of `l1`. Each of them has one more reference now,
        so that none may be written in place: where L2 tables say otherwise, it gets its own."""
        image, bits = self._image, self._image.file.cluster_bits
        out = l1[:]
        for index, entry in used(l1):
            offset, entries = entry & OFFSET_MASK, await read_table(image, index, entry)
            for first, count in references(image, entries):
                await image.refcounts.add(first, count, 1)
            copy = shared(image, entries)
            if copy == entries:
                await image.refcounts.add(offset >> bits, 1, 1)
                out[index] = offset
            else:
                out[index] = await rewrite.write(pack_table(copy)) | COPIED
        return out

    # --- applying ---------------------------------------------------------------------------

    async def apply(self, key: str) -> None:
        image = self._image
        async with self._disk.alone():
            self._refuse_external()
            entry = self._entries[self._required(key)]
            size = entry.disk_size
            if size != image.size:
                if image.header.version < 3:
                    raise RequestError(errno.ENOTSUP, "Can't resize a v2 image which has snapshots")
                self._disk.check_resizable()
            async with rewriting(image) as rewrite:
                l1 = await self._share(rewrite, await self._read_l1(entry))
                await self._release(rewrite, image.mapping.l1)
                await rewrite.finish(size=size, **await self._write_l1(rewrite, l1))
                image.size = size
                await self._became(self._entries, l1)
                image.on_changed_compressed()
            self._disk.became(size)

    async def _read_l1(self, entry: SnapshotEntry) -> array[int]:
        """The L1 table of a snapshot, without COPIED flags. Behind what its disk needs there may be the
        state of a virtual machine, which stays readable there until the image is resized."""
        image = self._image
        needed = max(1, image.header.needed_l1_size(entry.disk_size))
        if needed * 8 > MAX_L1_BYTES:
            raise ImageError("Snapshot disk size is too large")
        l1 = array("Q", [at & WITHOUT_COPIED for at in await self._read_whole_l1(entry)])
        l1.extend([0] * (needed - len(l1)))
        return l1

    async def _read_whole_l1(self, entry: SnapshotEntry) -> array[int]:
        if not entry.l1_size:
            return array("Q")
        file = self._image.file
        _check_l1(file, entry)
        return unpack_table(await file.read(entry.l1_table_offset, entry.l1_size * 8))

    # --- deleting ---------------------------------------------------------------------------

    async def delete(self, key: str) -> None:
        image = self._image
        async with self._disk.alone():
            index = self._required(key)
            entry = self._entries[index]
            rest = (*self._entries[:index], *self._entries[index + 1 :])
            async with rewriting(image) as rewrite:
                await self._release(rewrite, await self._read_whole_l1(entry))
                await rewrite.release(entry.l1_table_offset, entry.l1_size * 8)
                l1 = await self._with_flags(rewrite, image.mapping.l1)
                table = await self._write_entries(rewrite, rest)
                await rewrite.finish(**table, **await self._write_l1(rewrite, l1))
                await self._became(rest, l1)
                image.on_changed_compressed()

    async def _release(self, rewrite: Rewrite, l1: array[int]) -> None:
        """What `l1` leads to has one reference less."""
        for index, entry in used(l1):
            offset, entries = entry & OFFSET_MASK, await read_table(self._image, index, entry)
            for first, count in references(self._image, entries):
                await rewrite.release_clusters(first, count)
            await rewrite.release(offset)

    async def _with_flags(self, rewrite: Rewrite, l1: array[int]) -> array[int]:
        """The active L1 table, with COPIED flags there and in the L2 tables as the refcounts are now."""
        image, flags = self._image, Flags(self._image)
        out = l1[:]
        for index, entry in used(l1):
            offset, entries = entry & OFFSET_MASK, await read_table(image, index, entry)
            corrected = await flags.corrected(entries)
            if corrected != entries:
                await rewrite.release(offset)
                out[index] = await rewrite.write(pack_table(corrected)) | COPIED
            else:
                out[index] = offset | (COPIED if await flags.is_single(offset) else 0)
        return out

    # --- changing all tables ----------------------------------------------------------------

    async def l1_table(self, number: int) -> array[int]:
        """The whole L1 table of the snapshot with that number in list()."""
        return await self._read_whole_l1(self._entries[number])

    @property
    def complete(self) -> bool:
        """Whether the table in the file has all that version 3 asks for."""
        return all(len(entry.extra) >= MIN_EXTRA for entry in self._entries)

    async def rewrite_table(self, **header: Any) -> None:
        """Write the snapshot table anew, complete, together with these fields of the header."""
        async with rewriting(self._image) as rewrite:
            table = await self._write_entries(rewrite, self._entries)
            await rewrite.finish(**header, **table)
            await self._became(self._entries, self._image.mapping.l1)

    def sizes(self) -> set[int]:
        """How large the disks are."""
        return {entry.disk_size for entry in self._entries}

    async def transform(
        self, rewrite: Rewrite, change: Callable[[array[int]], Awaitable[array[int]]], **header: Any
    ) -> None:
        """Let `change` make new L1 tables of those of the snapshots and of the image's own, which comes
        last; they take effect, with these fields of the header."""
        entries: list[SnapshotEntry] = []
        for entry in self._entries:
            old = await self._read_whole_l1(entry)
            l1 = await change(old)
            if l1 != old:
                await rewrite.release(entry.l1_table_offset, entry.l1_size * 8)
                entry = replace(entry, l1_table_offset=await rewrite.write(pack_table(l1)))
            entries.append(entry)
        l1 = await self._with_flags(rewrite, await change(self._image.mapping.l1))
        table = {} if tuple(entries) == self._entries else await self._write_entries(rewrite, entries)
        await rewrite.finish(**header, **table, **await self._write_l1(rewrite, l1))
        await self._became(entries, l1)

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

    def _refuse_external(self) -> None:
        if self._image.external:
            raise RequestError(errno.ENOTSUP, "images with a data file have no snapshots")

    async def _write_entries(self, rewrite: Rewrite, entries: Sequence[SnapshotEntry]) -> dict[str, int]:
        """Write the snapshot table anew; the header's fields that lead there."""
        if self._entries:
            await rewrite.release(self._image.header.snapshots_offset, self._table_length)
        offset = await rewrite.write(_build(entries)) if entries else 0
        return {"snapshots_offset": offset, "snapshot_count": len(entries)}

    async def _write_l1(self, rewrite: Rewrite, l1: array[int]) -> dict[str, int]:
        """Write the active L1 table anew, if it is another one; the header's fields that lead there."""
        old = self._image.mapping.l1
        if l1 == old:
            return {}
        await rewrite.release(self._image.header.l1_table_offset, len(old) * 8)
        return {"l1_table_offset": await rewrite.write(pack_table(l1)), "l1_size": len(l1)}

    async def _became(self, entries: Sequence[SnapshotEntry], l1: array[int]) -> None:
        self._image.mapping.replace(l1)
        self._entries = tuple(entries)
        self._table_length = len(_build(entries))
        await self.claim()

    async def claim(self) -> None:
        """Tell the overlap checks where all of it lies. What is damaged protects nothing."""
        file = self._image.file
        if self._entries:
            file.claim(file.header.snapshots_offset, self._table_length, "snapshot-table")
        for entry in self._entries:
            if not entry.l1_size or not file.checks & {"inactive-l1", "inactive-l2"}:
                continue
            try:
                _check_l1(file, entry)
            except ImageError:
                continue
            file.claim(entry.l1_table_offset, entry.l1_size * 8, "inactive-l1")
            if "inactive-l2" in file.checks:
                for offset in await self._read_whole_l1(entry):
                    if offset & OFFSET_MASK and file.overlap(offset & OFFSET_MASK, 1) is None:
                        file.claim(offset & OFFSET_MASK, 1, "inactive-l2")


def _check_l1(file: ImageFile, entry: SnapshotEntry) -> None:
    check_table(file.header, entry.l1_table_offset, entry.l1_size * 8, MAX_L1_BYTES, "Snapshot L1 table")


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
