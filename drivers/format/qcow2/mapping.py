"""From guest clusters to host clusters: the L1 table, and the L2 tables in slices.

See QEMU's docs/interop/qcow2.txt, "Cluster mapping" and "Extended L2 Entries". Entries change in
memory; metadata.py decides when they are written.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import trio

from drivers.format.qcow2.imagefile import ImageFile
from drivers.format.qcow2.layout import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
)
from drivers.format.qcow2.refcounts import Refcounts, pack_table, unpack_table
from drivers.format.qcow2.stretches import stretch_end

# What a run of guest bytes is. HOLE: the backing file shows, or zeroes. RESERVED: a hole, too, with
# a host cluster of its own (extended entries only). ZEROED: zeroes; RESERVED_ZERO: with a cluster.
# INVALID: the entry is damaged.
HOLE, RESERVED, ZEROED, RESERVED_ZERO, DATA, DEFLATED, INVALID = range(7)
WITH_HOST = (RESERVED, RESERVED_ZERO, DATA)


class Piece(NamedTuple):
    """`length` guest bytes of one `kind`; `host` is where they lie in the host file. Of compressed
    data it is the L2 entry, and the piece never reaches out of its cluster."""

    kind: int
    host: int
    length: int


class Slice:
    """A part of an L2 table in memory; with extended entries two numbers for each cluster."""

    __slots__ = ("dirty", "entries", "pins", "used")

    def __init__(self, entries: array[int]) -> None:
        self.entries = entries
        self.dirty = False
        self.used = True
        # Somebody relies on it staying in memory.
        self.pins = 0


class TableWrite(NamedTuple):
    """Bytes of a table as they were when the commit began."""

    offset: int
    data: bytes
    slice: Slice | None


class Mapping:
    """At most `cache_slices` slices are in memory; `commit` is awaited where none of them is clean."""

    def __init__(
        self,
        file: ImageFile,
        refcounts: Refcounts,
        l1: array[int],
        *,
        slice_bytes: int,
        cache_slices: int,
        commit: Callable[[], Awaitable[None]],
    ) -> None:
        header = file.header
        self._file = file
        self._refcounts = refcounts
        self.l1 = l1
        # Entries that the file has not got yet.
        self.l1_dirty: set[int] = set()
        self.extended = header.extended_l2
        self.follow_version()
        # With a data file a host offset of 0 is valid.
        self._data_file = header.has_data_file
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.sub_bits = header.cluster_bits - (5 if self.extended else 0)
        self.step = 2 if self.extended else 1
        self._slice_bytes = slice_bytes
        # log2 of the guest clusters that a slice and a table describe.
        self.slice_bits = (slice_bytes // header.l2_entry_size).bit_length() - 1
        self.slice_mask = (1 << self.slice_bits) - 1
        self.l2_bits = header.l2_bits
        self._table_shift = self.l2_bits - self.slice_bits
        self.slices: dict[int, Slice] = {}
        self.cache_slices = max(2, cache_slices)
        self._commit = commit
        self._loading: dict[int, trio.Event] = {}
        self._tables = trio.Lock()
        # What is read of an L2 table that does not exist. Never changed.
        self.empty = Slice(array("Q", bytes(slice_bytes)))
        self._claim()

    def follow_version(self) -> None:
        """Take from the header whether there are zero clusters."""
        # What marks one in an L2 entry; extended entries have a bitmap instead.
        self.zero_flag = ZERO if self._file.header.version >= 3 and not self.extended else 0

    def _claim(self) -> None:
        header = self._file.header
        if header.l1_size:
            self._file.claim(header.l1_table_offset, header.l1_size * 8, "active-l1")
        for entry in self.l1:
            if offset := entry & OFFSET_MASK:
                self._file.claim(offset, 1, "active-l2")

    # --- slices -----------------------------------------------------------------------------

    def slice_now(self, index: int) -> Slice | None:
        """The slice with that index, if it is in memory or can be had from the page cache."""
        found = self.slices.get(index)
        if found is not None:
            found.used = True
            return found
        l1_index = index >> self._table_shift
        entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
        if not entry & OFFSET_MASK:
            return self.empty
        self.on_load()
        if len(self.slices) >= self.cache_slices and not self._drop_one():
            return None
        if index in self._loading or entry & (L1_RESERVED | self.cluster_size - 1):
            return None
        node, offset = self._file.node, self._slice_offset(index)
        if offset + self._slice_bytes > node.size:
            return None
        spans = node.plain(offset, self._slice_bytes)
        if spans is None or len(spans) != 1 or spans[0][0] < 0:
            return None
        data = bytearray(self._slice_bytes)
        try:
            if os.preadv(spans[0][0], (data,), spans[0][1], os.RWF_NOWAIT) != len(data):
                return None
        except OSError:
            return None
        found = self.slices[index] = Slice(unpack_table(data))
        return found

    def _slice_offset(self, index: int) -> int:
        table = self.l1[index >> self._table_shift] & OFFSET_MASK
        return table + (index & ((1 << self._table_shift) - 1)) * self._slice_bytes

    async def load(self, index: int) -> Slice:
        """The slice with that index. It may be dropped at the next await, unless it is pinned."""
        while True:
            found = self.slice_now(index)
            if found is not None:
                return found
            if index in self._loading:
                await self._loading[index].wait()
                continue
            loaded = self._loading[index] = trio.Event()
            try:
                await self._make_room()
                await self._check_table(index >> self._table_shift)
                data = await self._file.read(self._slice_offset(index), self._slice_bytes)
                self.slices[index] = Slice(unpack_table(data))
            finally:
                del self._loading[index]
                loaded.set()

    async def _check_table(self, l1_index: int) -> None:
        entry = self.l1[l1_index]
        offset = entry & OFFSET_MASK
        if entry & (L1_RESERVED | self.cluster_size - 1):
            raise await self._file.corruption(
                f"L2 table offset {offset:#x} unaligned (L1 index: {l1_index:#x})"
            )
        if offset >= self._file.node.size and not await self._refcounts.get(offset >> self.cluster_bits):
            raise await self._file.corruption(
                f"L2 table offset {offset:#x} behind the end of the file (L1 index: {l1_index:#x})"
            )

    def _drop_one(self) -> bool:
        """Drop a clean slice that was not used for a while; False if all are dirty or pinned."""
        for _ in range(2 * len(self.slices)):
            index, candidate = next(iter(self.slices.items()))
            del self.slices[index]
            if not (candidate.dirty or candidate.pins or candidate.used):
                return True
            candidate.used = False
            self.slices[index] = candidate
        return False

    def drop_unused(self) -> None:
        """Drop the clean slices that were not used since this was last called."""
        for index, found in list(self.slices.items()):
            if not (found.dirty or found.pins or found.used):
                del self.slices[index]
            found.used = False

    async def _make_room(self) -> None:
        if len(self.slices) >= self.cache_slices and not self._drop_one():
            await self._commit()
            self._drop_one()  # else all are pinned: a few more than the limit, for a moment

    async def pin(self, index: int) -> Slice:
        """The slice with that index in a table that may be written to, kept in memory until the
        caller takes one from its `pins`."""
        await self._own_table(index >> self._table_shift)
        found = await self.load(index)
        found.pins += 1
        return found

    def pin_now(self, index: int) -> Slice | None:
        """Like pin() for one that can be changed at once, and nothing pinned."""
        l1_index = index >> self._table_shift
        if l1_index >= len(self.l1) or not self.l1[l1_index] & COPIED:
            return None
        return self.slice_now(index)

    async def _own_table(self, l1_index: int) -> None:
        """Make the L2 table there, or a copy of it where snapshots share it."""
        if self.l1[l1_index] & COPIED:
            return
        async with self._tables:
            entry = self.l1[l1_index]
            if entry & COPIED:
                return
            old = entry & OFFSET_MASK
            await self._check_table(l1_index)
            run = await self._refcounts.allocate(1)
            try:
                if old:
                    await self._file.write(run.offset, await self._file.read(old, self.cluster_size))
                elif not run.virgin:
                    await self._file.node.write_zeroes(run.offset, self.cluster_size, may_unmap=False)
            except BaseException:
                await self._refcounts.give_back(run)
                raise
            self.l1[l1_index] = run.offset | COPIED
            self.l1_dirty.add(l1_index)
            self._file.claim(run.offset, 1, "active-l2")
            if old:
                self._file.release(old, 1)
                self._file.claim(old, 1, "inactive-l2")
                self.on_free(old, 1, "snapshot")

    on_free: Callable[[int, int, str], None]
    # Called before a slice is loaded: others may go.
    on_load: Callable[[], None]

    def take_dirty(self) -> tuple[list[TableWrite], list[TableWrite]]:
        """What to write: first what nothing on disk refers to yet, then, when that is durable, the
        rest. Slices are pinned until done() or failed()."""
        new: list[TableWrite] = []
        old: list[TableWrite] = []
        for index, dirty in self.slices.items():
            if dirty.dirty:
                dirty.dirty = False
                dirty.pins += 1
                fresh = index >> self._table_shift in self.l1_dirty
                write = TableWrite(self._slice_offset(index), pack_table(dirty.entries), dirty)
                (new if fresh else old).append(write)
        base = self._file.header.l1_table_offset
        old.extend(
            TableWrite(base + sector * 512, pack_table(self.l1[sector * 64 :][:64]), None)
            for sector in sorted({index >> 6 for index in self.l1_dirty})
        )
        self.l1_dirty.clear()
        return new, old

    def written(self, writes: Iterable[TableWrite], *, failed: bool) -> None:
        """What take_dirty() gave is in the file; or, `failed`, it has to be taken again."""
        base = self._file.header.l1_table_offset
        for write in writes:
            if write.slice is not None:
                write.slice.pins -= 1
                write.slice.dirty |= failed
            elif failed:
                first = (write.offset - base) // 8
                self.l1_dirty.update(range(first, first + len(write.data) // 8))

    def next_mapped(self, first: int, last: int) -> int:
        """The first guest cluster from `first` on in an L2 table that exists; `last` if there is none
        before it."""
        index, end = first >> self.l2_bits, (last - 1 >> self.l2_bits) + 1
        if index < end and self.l1[index]:
            return first
        found = next((i for i in range(index, end) if self.l1[i]), None)
        return last if found is None else max(first, found << self.l2_bits)

    def forget_table(self, l1_index: int) -> None:
        """The guest clusters of this L1 entry have no L2 table any more."""
        self.l1[l1_index] = 0
        self.l1_dirty.add(l1_index)
        first = l1_index << self._table_shift
        for index in range(first, first + (1 << self._table_shift)):
            self.slices.pop(index, None)

    def drop(self) -> None:
        """Forget the slices, since the tables are others now."""
        self.slices.clear()

    def replace(self, l1: array[int]) -> None:
        """Another L1 table, which the header names already, is the active one. All is in the file."""
        for entry in self.l1:
            if offset := entry & OFFSET_MASK:
                self._file.release(offset, 1)
        self.read_anew(l1)

    def read_anew(self, l1: array[int]) -> None:
        """The file was changed: this is its L1 table now, and nobody has claimed any metadata."""
        self.l1 = l1
        self.l1_dirty.clear()
        self.slices.clear()
        self._claim()

    # --- reading the map --------------------------------------------------------------------

    def pieces(self, offset: int, end: int, out: list[Piece]) -> int:
        """Append what the guest bytes from `offset` to `end` are, neighbours of one kind and with
        neighbouring host bytes joined. Returns how far that got: to `end`, or to where a slice is
        not in memory."""
        bits, mask = self.cluster_bits, self.cluster_size - 1
        while offset < end:
            cluster = offset >> bits
            found = self.slice_now(cluster >> self.slice_bits)
            if found is None:
                return offset
            entries = found.entries
            stop = min(end, ((cluster | self.slice_mask) + 1) << bits)
            if found is self.empty:
                _append(out, HOLE, 0, stop - offset)
                offset = stop
                continue
            while offset < stop:
                inside, index = offset & mask, offset >> bits & self.slice_mask
                length = self.cluster_size - inside
                if self.extended:
                    length = min(stop - offset, length)
                    self._extended(entries, index, inside, length, out)
                else:
                    if offset + length < stop:
                        last = stop - 1 >> bits & self.slice_mask
                        length += self._followers(entries, index, last + 1) << bits
                    length = min(stop - offset, length)
                    self._standard(entries, index, inside, length, out)
                offset += length
        return end

    def _followers(self, entries: array[int], index: int, end: int) -> int:
        """How many entries, up to `end`, certainly go on where this one ends."""
        entry = entries[index]
        host = entry & OFFSET_MASK
        if entry & COMPRESSED or host + (end - index << self.cluster_bits) > OFFSET_MASK:
            return 0
        has_host = host or (self._data_file and entry & COPIED)
        return stretch_end(entries, index, end, self.cluster_size if has_host else 0) - index - 1

    def _standard(self, entries: array[int], index: int, inside: int, length: int, out: list[Piece]) -> None:
        entry = entries[index]
        host = entry & OFFSET_MASK
        if host & (self.cluster_size - 1) and not entry & COMPRESSED:
            out.append(Piece(INVALID, host, length))
        elif entry & COMPRESSED:
            out.append(Piece(DEFLATED, entry, length))
        elif entry & self.zero_flag:
            if host or (self._data_file and entry & COPIED):
                _append(out, RESERVED_ZERO, host + inside, length)
            else:
                _append(out, ZEROED, 0, length)
        elif host or (self._data_file and entry & COPIED):
            _append(out, DATA, host + inside, length)
        else:
            _append(out, HOLE, 0, length)

    def _extended(self, entries: array[int], index: int, inside: int, length: int, out: list[Piece]) -> None:
        entry, bitmap = entries[2 * index], entries[2 * index + 1]
        host = entry & OFFSET_MASK
        if entry & COMPRESSED or host & (self.cluster_size - 1):
            out.append(Piece(DEFLATED if entry & COMPRESSED else INVALID, entry, length))
            return
        if bitmap & bitmap >> SUBCLUSTERS & ALL_ALLOCATED:
            out.append(Piece(INVALID, host, length))  # a subcluster both allocated and zeroes
            return
        has_host = bool(host) or (self._data_file and bool(entry & COPIED))
        end = inside + length
        while inside < end:
            sub = inside >> self.sub_bits
            stop = min(end, (sub + 1) << self.sub_bits)
            if bitmap >> sub & 1:
                _append(out, DATA, host + inside, stop - inside)
            elif bitmap >> sub >> SUBCLUSTERS & 1:
                if has_host:
                    _append(out, RESERVED_ZERO, host + inside, stop - inside)
                else:
                    _append(out, ZEROED, 0, stop - inside)
            elif has_host:
                _append(out, RESERVED, host + inside, stop - inside)
            else:
                _append(out, HOLE, 0, stop - inside)
            inside = stop

    async def describe(self, offset: int, end: int, *, most: int) -> list[Piece]:
        """What the guest bytes from `offset` on are: at least one piece, and no more than about
        `most`. Reads what it needs."""
        out: list[Piece] = []
        while offset < end and len(out) < most:
            # A slice at a time, so that the answer stays bounded.
            stop = min(end, ((offset >> self.cluster_bits | self.slice_mask) + 1) << self.cluster_bits)
            await self.load(offset >> self.cluster_bits >> self.slice_bits)
            offset = self.pieces(offset, stop, out)
        for piece in out:
            if piece.kind == INVALID:
                raise await self._file.corruption(f"Cluster allocation offset {piece.host:#x} unaligned")
        return out


def _append(out: list[Piece], kind: int, host: int, length: int) -> None:
    if out:
        last = out[-1]
        if last.kind == kind and (kind not in WITH_HOST or last.host + last.length == host):
            out[-1] = Piece(kind, last.host, last.length + length)
            return
    out.append(Piece(kind, host, length))
