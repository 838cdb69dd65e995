"""The directories inside a qcow2 image: the snapshot table and the bitmap directory.

See QEMU's docs/interop/qcow2.txt, "Snapshots" and "Bitmap directory".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

from drivers.errors import ImageError
from drivers.format.qcow2.header import Header
from drivers.format.qcow2.layout import (
    MAX_BITMAP_GRANULARITY_BITS,
    MAX_BITMAP_NAME,
    MAX_BITMAP_TABLE_BYTES,
    MAX_HOST_OFFSET,
    MAX_SNAPSHOT_EXTRA,
    MIN_BITMAP_GRANULARITY_BITS,
)

# --- Snapshots ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SnapshotEntry:
    """One entry of the snapshot table. `extra` are the extra data as found, at least what is known
    of them."""

    l1_table_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date_seconds: int
    date_nanoseconds: int
    vm_clock_nanoseconds: int
    vm_state_size: int
    disk_size: int
    icount: int | None = None
    extra: bytes = b""

    FIXED = struct.Struct(">QIHHIIQII")

    def build(self) -> bytes:
        extra = bytearray(self.extra)
        extra.extend(bytes(max(0, 16 - len(extra))))
        struct.pack_into(">QQ", extra, 0, self.vm_state_size, self.disk_size)
        if len(extra) >= 24 or self.icount is not None:
            extra.extend(bytes(max(0, 24 - len(extra))))
            icount = (1 << 64) - 1 if self.icount is None else self.icount
            struct.pack_into(">Q", extra, 16, icount)
        short_size = self.vm_state_size if self.vm_state_size < 1 << 32 else 0
        fixed = self.FIXED.pack(
            self.l1_table_offset, self.l1_size, len(self.id), len(self.name), self.date_seconds,
            self.date_nanoseconds, self.vm_clock_nanoseconds, short_size, len(extra),
        )  # fmt: skip
        whole = fixed + bytes(extra) + self.id + self.name
        return whole + bytes(-len(whole) % 8)


def parse_snapshot(data: bytes | memoryview, at: int, *, image_size: int) -> tuple[SnapshotEntry, int]:
    """The entry at `at` of the snapshot table and where the next one begins. `data` may end
    anywhere. Raises ImageError."""
    if at + SnapshotEntry.FIXED.size > len(data):
        raise ImageError("Snapshot table is cut off")
    (
        l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, vm_clock, vm_state, extra_size,
    ) = SnapshotEntry.FIXED.unpack_from(data, at)  # fmt: skip
    at += SnapshotEntry.FIXED.size
    if extra_size > MAX_SNAPSHOT_EXTRA:
        raise ImageError(f"Too much extra metadata in snapshot table entry: {extra_size} bytes")
    if at + extra_size + id_size + name_size > len(data):
        raise ImageError("Snapshot table is cut off")
    extra = bytes(data[at : at + extra_size])
    at += extra_size
    disk_size, icount = image_size, None
    if extra_size >= 8:
        (vm_state,) = struct.unpack_from(">Q", extra, 0)
    if extra_size >= 16:
        (disk_size,) = struct.unpack_from(">Q", extra, 8)
    if extra_size >= 24:
        (raw_icount,) = struct.unpack_from(">Q", extra, 16)
        icount = None if raw_icount == (1 << 64) - 1 else raw_icount
    entry = SnapshotEntry(
        l1_table_offset=l1_offset,
        l1_size=l1_size,
        id=bytes(data[at : at + id_size]),
        name=bytes(data[at + id_size : at + id_size + name_size]),
        date_seconds=seconds,
        date_nanoseconds=nanoseconds,
        vm_clock_nanoseconds=vm_clock,
        vm_state_size=vm_state,
        disk_size=disk_size,
        icount=icount,
        extra=extra,
    )
    at += id_size + name_size
    return entry, at + -at % 8


# --- Bitmaps ------------------------------------------------------------------------------------


class BitmapFlags(IntFlag):
    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


DIRTY_TRACKING = 1


@dataclass(frozen=True, kw_only=True)
class BitmapEntry:
    """One entry of the bitmap directory."""

    table_offset: int
    table_size: int
    flags: int
    granularity_bits: int
    name: str
    extra: bytes = b""
    type: int = DIRTY_TRACKING

    FIXED = struct.Struct(">QIIBBHI")

    def build(self) -> bytes:
        name = self.name.encode(errors="surrogateescape")
        fixed = self.FIXED.pack(
            self.table_offset, self.table_size, self.flags, self.type, self.granularity_bits,
            len(name), len(self.extra),
        )  # fmt: skip
        whole = fixed + self.extra + name
        return whole + bytes(-len(whole) % 8)


def parse_bitmap_directory(data: bytes, header: Header) -> Sequence[BitmapEntry]:
    """The whole directory, as many entries as the extension tells. Raises ImageError."""
    assert header.bitmaps is not None
    entries: list[BitmapEntry] = []
    names: set[str] = set()
    at = 0
    while at < len(data):
        if len(entries) == header.bitmaps.count:
            raise ImageError("Bitmap directory: more entries than the header tells")
        entry, at = _parse_bitmap(data, at, header)
        if entry.name in names:
            raise ImageError(f"Bitmap directory: the name '{entry.name}' appears twice")
        names.add(entry.name)
        entries.append(entry)
    if len(entries) != header.bitmaps.count:
        raise ImageError("Bitmap directory: fewer entries than the header tells")
    return entries


def _parse_bitmap(data: bytes, at: int, header: Header) -> tuple[BitmapEntry, int]:
    if at + BitmapEntry.FIXED.size > len(data):
        raise ImageError("Bitmap directory is cut off")
    offset, size, flags, kind, granularity_bits, name_size, extra_size = BitmapEntry.FIXED.unpack_from(
        data, at
    )
    at += BitmapEntry.FIXED.size
    if at + name_size + extra_size > len(data):
        raise ImageError("Bitmap directory is cut off")
    name = data[at + extra_size : at + extra_size + name_size].decode(errors="surrogateescape")
    where = f"Bitmap '{name}'"
    if not 0 < name_size <= MAX_BITMAP_NAME:
        raise ImageError(f"Bitmap directory: a name of {name_size} bytes")
    if kind != DIRTY_TRACKING:
        raise ImageError(f"{where}: unknown type {kind}")
    if not MIN_BITMAP_GRANULARITY_BITS <= granularity_bits <= MAX_BITMAP_GRANULARITY_BITS:
        raise ImageError(f"{where}: unsupported granularity 2^{granularity_bits}")
    if flags & ~7:
        raise ImageError(f"{where}: reserved flags are set")
    if size * 8 > MAX_BITMAP_TABLE_BYTES:
        raise ImageError(f"{where}: bitmap table too large")
    if not size or offset % header.cluster_size or not 0 < offset <= MAX_HOST_OFFSET - size * 8:
        raise ImageError(f"{where}: bitmap table offset invalid")
    entry = BitmapEntry(
        table_offset=offset,
        table_size=size,
        flags=flags,
        granularity_bits=granularity_bits,
        name=name,
        extra=data[at : at + extra_size],
        type=kind,
    )
    at += extra_size + name_size
    return entry, at + -at % 8
