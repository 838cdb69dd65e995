"""Damaging qcow2 images field by field, from a seed: the same seed does the same damage."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from drivers.format.qcow2.directory import BitmapEntry, SnapshotEntry, parse_bitmap_directory, parse_snapshot
from drivers.format.qcow2.header import Header, parse_header
from drivers.format.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO


class Damage:
    """The image in `path`, to be damaged in place."""

    def __init__(self, path: Path, seed: int | str) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.data = bytearray(path.read_bytes())
        self.header: Header = parse_header(bytes(self.data), for_check=True)
        self.size = self.header.cluster_size
        self.log: list[str] = []
        self.first_snapshots = self._find_snapshots()
        self.first_bitmaps: Sequence[BitmapEntry] = ()
        if self.header.bitmaps is not None:
            start, size = self.header.bitmaps.directory_offset, self.header.bitmaps.directory_size
            self.first_bitmaps = parse_bitmap_directory(bytes(self.data[start : start + size]), self.header)

    def word(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 8].ljust(8, b"\0"), "big")

    def put(self, at: int, value: int, what: str) -> None:
        if at + 8 > len(self.data):
            self.data.extend(bytes(at + 8 - len(self.data)))
        self.log.append(f"{what} at {at:#x}: {self.word(at):x} -> {value:x}")
        struct.pack_into(">Q", self.data, at, value & (1 << 64) - 1)

    def save(self) -> list[str]:
        self.path.write_bytes(self.data)
        return self.log

    # --- what there is -------------------------------------------------------------------------

    def words(self, offset: int, count: int) -> list[int]:
        """Where the numbers of a table are, those that are not zero before the others."""
        inside = [at for at in range(offset, offset + 8 * count, 8) if at + 8 <= len(self.data)]
        return [at for at in inside if self.word(at)] or inside

    def l1_words(self) -> list[int]:
        return self.words(self.header.l1_table_offset, self.header.l1_size)

    def _find_snapshots(self) -> list[tuple[int, SnapshotEntry]]:
        at, found = self.header.snapshots_offset, []
        for _ in range(self.header.snapshot_count):
            entry, end = parse_snapshot(bytes(self.data), at, image_size=self.header.size)
            found.append((at, entry))
            at = end
        return found

    def snapshot_l1_words(self) -> list[int]:
        return [at for _, s in self.first_snapshots for at in self.words(s.l1_table_offset, s.l1_size)]

    def l2_words(self) -> list[int]:
        tables = [self.word(at) & OFFSET_MASK for at in (*self.l1_words(), *self.snapshot_l1_words())]
        step = self.header.l2_entry_size // 8
        return [
            at
            for table in set(filter(None, tables))
            for at in self.words(table, self.size // 8)
            if (at - table) // 8 % step == 0
        ]

    def reftable_words(self) -> list[int]:
        return self.words(self.header.refcount_table_offset, self.size // 8)

    # --- what is done to it --------------------------------------------------------------------

    def _entry(self, value: int) -> int:
        """A table entry in the place of `value`."""
        pick = self.random
        clusters = len(self.data) // self.size + 1
        return (
            pick.choice(
                [
                    0,
                    value ^ COPIED,
                    value ^ ZERO,
                    value ^ COMPRESSED,
                    value ^ 1 << pick.randrange(64),
                    value + self.size,
                    value + 512,
                    pick.randrange(clusters) * self.size,
                    pick.randrange(clusters) * self.size | COPIED,
                    pick.randrange(2 * clusters) * self.size | COPIED,
                    pick.randrange(clusters * self.size) // 512 * 512 | COPIED,
                    pick.randrange(clusters) * self.size | COPIED | ZERO,
                ]
            )
            & (1 << 64) - 1
        )

    def _change(self, words: list[int], what: str) -> None:
        if words:
            at = self.random.choice(words)
            self.put(at, self._entry(self.word(at)), what)

    def l1(self) -> None:
        self._change(self.l1_words(), "L1")

    def snapshot_l1(self) -> None:
        self._change(self.snapshot_l1_words(), "snapshot's L1")

    def l2(self) -> None:
        self._change(self.l2_words(), "L2")

    def l2_bitmap(self) -> None:
        if self.header.extended_l2 and (words := self.l2_words()):
            at = self.random.choice(words) + 8
            self.put(at, self.random.getrandbits(64) >> self.random.choice((0, 20, 32)), "L2 bitmap")

    def reftable(self) -> None:
        self._change(self.reftable_words(), "refcount table")

    def refblock(self) -> None:
        offset = self.word(self.header.refcount_table_offset) & OFFSET_MASK
        if not self.size <= offset <= len(self.data) - self.size:
            return
        used = (len(self.data) // self.size + 2) * self.header.refcount_bits // 8
        at = offset + self.random.randrange(min(self.size, used + 1))
        self.log.append(f"refcount block at {at:#x}")
        self.data[at] = self.random.choice((0, 1, 2, 255, self.data[at] ^ 1, self.random.randrange(256)))

    def snapshot(self) -> None:
        found = self.first_snapshots
        if not found:
            return
        at, entry = self.random.choice(found)
        if at + SnapshotEntry.FIXED.size > len(self.data):
            return
        if self.random.random() < 0.5:
            self.put(at, self._entry(entry.l1_table_offset) & OFFSET_MASK, "snapshot's L1 offset")
        else:
            size = self.random.choice((0, 1, entry.l1_size + 1, self.random.randrange(64)))
            self.log.append(f"snapshot's L1 size {size}")
            struct.pack_into(">I", self.data, at + 8, size)

    def snapshots_offset(self) -> None:
        if self.header.snapshot_count:
            clusters = len(self.data) // self.size
            self.put(64, self.random.randrange(1, clusters + 1) * self.size, "snapshot table offset")

    def bitmap(self) -> None:
        if self.header.bitmaps is None:
            return
        bitmap = self.random.choice(self.first_bitmaps)
        self._change(self.words(bitmap.table_offset, bitmap.table_size), "bitmap table")

    def cut(self) -> None:
        keep = self.random.randrange(max(self.size * 3, len(self.data) // 2), len(self.data) + 1)
        self.log.append(f"cut at {keep:#x}")
        del self.data[keep:]

    def append(self) -> None:
        self.log.append("a longer file")
        self.data.extend(b"x" * self.random.randrange(1, 3 * self.size))

    def do(self, times: int) -> None:
        """Do `times` different things, those of which there is most more often."""
        for _ in range(times):
            self.random.choice(self._kinds())()

    def _kinds(self) -> list[Callable[[], None]]:
        return [
            *[self.l2] * 5,
            *[self.refblock] * 5,
            *[self.l1] * 2,
            *[self.l2_bitmap] * 2,
            *[self.snapshot_l1] * 2,
            self.reftable,
            self.snapshot,
            self.bitmap,
            self.cut,
            self.append,
        ]
