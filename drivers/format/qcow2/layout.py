"""Limits, and the entries of the tables: refcount table, L1, L2; see QEMU's docs/interop/qcow2.txt.

Nothing here reads a file or decides anything. All numbers of the format are big-endian.
"""

from __future__ import annotations

# --- limits (those of QEMU, so that each side opens what the other makes) ------------------------

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_CLUSTER_BITS = 14
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
# The fixed part of a snapshot table entry, in bytes.
SNAPSHOT_ENTRY_SIZE = 40
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_SNAPSHOT_EXTRA = 1024
MAX_BACKING_NAME = 1023
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = MAX_BITMAPS * 1024
MAX_BITMAP_TABLE_BYTES = 0x8000000 * 8 // 64
MAX_BITMAP_NAME = 1023
MIN_BITMAP_GRANULARITY_BITS = 9
MAX_BITMAP_GRANULARITY_BITS = 31
# Host offsets have 56 bits.
MAX_HOST_OFFSET = 1 << 56
MAX_HEADER_EXTENSIONS = 1024

# --- Refcount table, L1, L2 entries -------------------------------------------------------------

OFFSET_MASK = 0x00FFFFFFFFFFFE00
REFCOUNT_OFFSET_MASK = 0xFFFFFFFFFFFFFE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
REFCOUNT_RESERVED = 0x1FF
BITMAP_TABLE_RESERVED = 0xFF000000000001FE

SUBCLUSTERS = 32
# The lower half of an extended entry's bitmap: allocated; the upper half: reads as zeroes.
ALL_ALLOCATED = (1 << SUBCLUSTERS) - 1
ALL_ZERO = ALL_ALLOCATED << SUBCLUSTERS


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, bytes) of a compressed cluster descriptor: the sectors that hold the data."""
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = (entry >> shift & ((1 << (62 - shift)) - 1)) + 1
    return offset, sectors * 512 - (offset & 511)


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry for `length` bytes of compressed data at `offset` of the file."""
    shift = 62 - (cluster_bits - 8)
    sectors = ((offset + length - 1) >> 9) - (offset >> 9)
    return COMPRESSED | sectors << shift | offset
