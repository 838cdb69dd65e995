"""Where the fields of a qcow2 image lie; see QEMU's docs/interop/qcow2.txt."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from drivers.format.qcow2 import layout
from tests.fuzz.mutate import Field, Format

# name, offset, bytes
_HEADER = (
    ("magic", 0, 4), ("version", 4, 4), ("backing_file_offset", 8, 8), ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4), ("size", 24, 8), ("crypt_method", 32, 4), ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8), ("refcount_table_offset", 48, 8), ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4), ("snapshots_offset", 64, 8),
)  # fmt: skip
_HEADER_3 = (
    ("incompatible_features", 72, 8), ("compatible_features", 80, 8), ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4), ("header_length", 100, 4),
)  # fmt: skip
_SNAPSHOT = (
    ("l1_table_offset", 0, 8), ("l1_size", 8, 4), ("id_size", 12, 2), ("name_size", 14, 2),
    ("date_sec", 16, 4), ("date_nsec", 20, 4), ("vm_clock", 24, 8), ("vm_state_size", 32, 4),
    ("extra_data_size", 36, 4), ("vm_state_size_large", 40, 8), ("disk_size", 48, 8),
)  # fmt: skip
_BITMAP = (
    ("bitmap_table_offset", 0, 8), ("bitmap_table_size", 8, 4), ("flags", 12, 4), ("type", 16, 1),
    ("granularity_bits", 17, 1), ("name_size", 18, 2), ("extra_data_size", 20, 4),
)  # fmt: skip
_BITMAPS_EXTENSION = (
    ("nb_bitmaps", 0, 4), ("reserved", 4, 4), ("directory_size", 8, 8), ("directory_offset", 16, 8)
)  # fmt: skip
_LUKS = (("version", 6, 2), ("payload_offset", 104, 4), ("key_bytes", 108, 4), ("iterations", 164, 4))
_LUKS_SLOT = (("active", 0, 4), ("iterations", 4, 4), ("key_offset", 40, 4), ("stripes", 44, 4))
_BACKING_FORMAT, _BITMAPS, _ENCRYPTION, _DATA_FILE = 0xE2792ACA, 0x23852875, 0x0537BE77, 0x44415441
# So many entries of a table are fields; the chances for others to matter are the same.
_ENTRIES = 256


class _Image:
    """A good image, whose numbers are believed."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.version = self.number(4, 4)
        self.cluster_size = 1 << self.number(20, 4)
        self.extended = self.version >= 3 and bool(self.number(72, 8) & 1 << 4)
        self.header_length = self.number(100, 4) if self.version >= 3 else 72

    def number(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "big")

    def fields(self) -> Iterator[Field]:
        yield from _group("header", "header", 0, _HEADER)
        if self.version >= 3:
            yield from _group("header v3", "header", 0, _HEADER_3)
            if self.header_length > 104:
                yield Field("header v3", "compression_type", 104, 1)
        yield from self.extensions()
        yield from self.refcounts()
        yield from self.l1("L1", self.number(40, 8), self.number(36, 4))
        yield from self.snapshots()
        if length := self.number(16, 4):
            yield Field("names", "backing file name", self.number(8, 8), length, text=True)

    def extensions(self) -> Iterator[Field]:
        at = self.header_length
        while at + 8 <= self.cluster_size:
            kind, length = struct.unpack_from(">II", self.data, at)
            name = f"extension {kind:#x}"
            yield Field("extensions", f"{name} type", at, 4)
            yield Field("extensions", f"{name} length", at + 4, 4)
            if not kind:
                return
            if kind in (_BACKING_FORMAT, _DATA_FILE):
                yield Field("names", name, at + 8, length, text=True)
            elif kind == _BITMAPS:
                yield from _group("bitmaps", name, at + 8, _BITMAPS_EXTENSION)
                yield from self.bitmaps(at + 8)
            elif kind == _ENCRYPTION:
                yield from _group("encryption", name, at + 8, (("offset", 0, 8), ("length", 8, 8)))
                yield from self.luks(self.number(at + 8, 8))
            at += 8 + length + -length % 8

    def luks(self, offset: int) -> Iterator[Field]:
        fields = (
            ("version", 6, 2),
            ("payload_offset", 104, 4),
            ("key_bytes", 108, 4),
            ("iterations", 164, 4),
        )
        yield from _group("encryption", "luks", offset, fields)
        for name, at in (("cipher", 8), ("mode", 40), ("hash", 72)):
            yield Field("encryption", f"luks {name}", offset + at, 32, text=True)
        for slot in range(8):
            yield from _group("encryption", f"luks slot {slot}", offset + 208 + 48 * slot, _LUKS_SLOT)

    def bitmaps(self, extension: int) -> Iterator[Field]:
        at = self.number(extension + 16, 8)
        for index in range(self.number(extension, 4)):
            yield from _group("bitmaps", f"bitmap {index}", at, _BITMAP)
            name_size, extra_size = self.number(at + 18, 2), self.number(at + 20, 4)
            yield Field("names", f"bitmap {index} name", at + 24 + extra_size, name_size, text=True)
            table, count = self.number(at, 8), self.number(at + 8, 4)
            yield from self.table("bitmap tables", f"bitmap {index} table", table, count)
            at += 24 + extra_size + name_size + -(extra_size + name_size) % 8

    def snapshots(self) -> Iterator[Field]:
        at = self.number(64, 8)
        for index in range(self.number(60, 4)):
            yield from _group("snapshots", f"snapshot {index}", at, _SNAPSHOT)
            sizes = self.number(at + 12, 2) + self.number(at + 14, 2) + self.number(at + 36, 4)
            yield from self.l1(f"snapshot {index} L1", self.number(at, 8), self.number(at + 8, 4))
            at += 40 + sizes + -(40 + sizes) % 8

    def refcounts(self) -> Iterator[Field]:
        table = self.number(48, 8)
        count = self.number(56, 4) * self.cluster_size // 8
        yield from self.table("refcount table", "refcount table", table, count)
        for index in range(min(count, _ENTRIES)):
            if block := self.number(table + 8 * index, 8):
                entries = min(self.cluster_size // 8, 64)
                yield from self.table("refcount blocks", f"refcount block {index}", block, entries)

    def l1(self, name: str, offset: int, count: int) -> Iterator[Field]:
        yield from self.table("L1", name, offset, count)
        for index in range(min(count, _ENTRIES)):
            l2 = self.number(offset + 8 * index, 8) & layout.OFFSET_MASK
            if l2:
                entries = min(self.cluster_size // 8, _ENTRIES)
                yield from self.table("L2", f"{name} {index} L2", l2, entries)

    def table(self, group: str, name: str, offset: int, count: int) -> Iterator[Field]:
        for index in range(min(count, _ENTRIES)):
            yield Field(group, f"{name} [{index}]", offset + 8 * index, 8)


def _group(group: str, name: str, at: int, fields: tuple[tuple[str, int, int], ...]) -> Iterator[Field]:
    for field, offset, size in fields:
        yield Field(group, f"{name} {field}", at + offset, size)


def _fields(data: bytes) -> list[Field]:
    """Those with a value come twice: they are what the rest hangs on."""
    found = [field for field in _Image(data).fields() if field.offset + field.size <= len(data)]
    return found + [field for field in found if any(data[field.offset : field.offset + field.size])]


QCOW2 = Format(
    name="qcow2",
    fields=_fields,
    limits=(
        layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS, layout.MIN_EXTENDED_CLUSTER_BITS,
        layout.MAX_L1_BYTES // 8, layout.MAX_REFCOUNT_TABLE_BYTES >> 16, layout.MAX_SNAPSHOTS,
        layout.MAX_SNAPSHOT_EXTRA, layout.MAX_BACKING_NAME, layout.MAX_BITMAPS, layout.MAX_BITMAP_NAME,
        layout.MAX_BITMAP_DIRECTORY_BYTES, layout.MAX_BITMAP_TABLE_BYTES // 8, layout.MAX_HOST_OFFSET,
        layout.MIN_BITMAP_GRANULARITY_BITS, layout.MAX_BITMAP_GRANULARITY_BITS, 6, 72, 104, 1 << 61, 1 << 63,
    ),
    mask=layout.OFFSET_MASK,
)  # fmt: skip
