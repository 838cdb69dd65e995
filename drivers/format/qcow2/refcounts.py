"""Reference counts of the host clusters, and the allocation of free ones.

See QEMU's docs/interop/qcow2.txt, "Host cluster management". Counts change in memory; metadata.py
decides when the blocks are written.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import trio

from drivers.errors import RequestError
from drivers.format.qcow2.counts import Counts, changed, pack_counts, uniform, unpack_counts
from drivers.format.qcow2.imagefile import ImageFile
from drivers.format.qcow2.layout import (
    MAX_HOST_OFFSET,
    MAX_REFCOUNT_TABLE_BYTES,
    REFCOUNT_OFFSET_MASK,
    REFCOUNT_RESERVED,
)

# A stretch of free clusters that is taken in hand at once ends after so many.
MAX_WINDOW = 8192


class Block:
    """A refcount block in memory."""

    __slots__ = ("counts", "dirty", "offset", "pins", "used")

    def __init__(self, offset: int, counts: Counts) -> None:
        self.offset = offset
        self.counts = counts
        self.dirty = False
        self.used = True
        # Being written: not to be dropped, since the file has not got it yet.
        self.pins = 0


class Run(NamedTuple):
    """`clusters` neighbouring host clusters from `offset` on; `virgin`: they read as zeroes."""

    offset: int
    clusters: int
    virgin: bool


class Rewritten(NamedTuple):
    """Refcounts in a new place: the blocks `moved` (index to offset) and the `table` in `run`. `free`:
    clusters that are free as soon as the header leads there."""

    table: array[int]
    run: Run
    moved: dict[int, int]
    free: list[int]


class Refcounts:
    """The counts of `file`, at most `cache_size` bytes of them in memory (and as much as is not
    written yet)."""

    def __init__(self, file: ImageFile, table: array[int], *, cache_size: int) -> None:
        self._file = file
        self.table = table
        self._follow_width()
        self.blocks: dict[int, Block] = {}
        self._cache_blocks = max(4, cache_size >> file.cluster_bits)
        self._lock = trio.Lock()
        # Where the search for free clusters goes on.
        self._cursor = 0
        # Clusters that are known to be free, in the order in which they are handed out. Before the
        # cursor there is none but these.
        self._window, self._window_end = 0, 0
        # From here on the file was never written: it reads as zeroes.
        self.virgin = -(-file.node.size // file.cluster_size)
        # The cluster that compressed data are being packed into; None once it is free again.
        self.open_cluster: int | None = None
        self._claim_table()

    # Told of clusters that lost a reference: when that is durable, they are free.
    on_free: Callable[[int, int, str], None]

    def _follow_width(self) -> None:
        file = self._file
        self.order = file.header.refcount_order
        self.maximum = (1 << (1 << self.order)) - 1
        # log2 of the clusters that a block covers.
        self.block_bits = file.cluster_bits + 3 - self.order
        self._block_mask = (1 << self.block_bits) - 1

    def _claim_table(self) -> None:
        file, header = self._file, self._file.header
        length = header.refcount_table_clusters << file.cluster_bits
        file.claim(header.refcount_table_offset, length, "refcount-table")
        for entry in self.table:
            if offset := entry & REFCOUNT_OFFSET_MASK:
                file.claim(offset, 1, "refcount-block")

    # --- all at once ------------------------------------------------------------------------

    async def rewrite(self, freed: Sequence[tuple[int, int]]) -> Rewritten:
        """Write every block that changed to a new place, and a table that leads there; the file's own
        table is not touched. `freed`, (first cluster, count) pairs, and what the old blocks and the
        old table took up, have lost a reference in it."""
        file = self._file
        moved: dict[int, int] = {}
        table_run: Run | None = None
        for first, count in freed:
            await self._touch(first, count)
        while True:
            todo = [index for index, block in self.blocks.items() if block.dirty and index not in moved]
            for index in todo:
                await self._touch(self.blocks[index].offset >> file.cluster_bits, 1)
                moved[index] = (await self.allocate(1)).offset
            clusters = file.header.refcount_table_clusters
            if table_run is not None and table_run.clusters != clusters:
                # Making room for all this, the table has grown.
                await self.give_back(table_run)
                table_run = None
            if table_run is None:
                table_run = await self.allocate(clusters)
                await self._touch(file.header.refcount_table_offset >> file.cluster_bits, clusters)
            elif not todo:
                break
        lost = [*freed, (file.header.refcount_table_offset >> file.cluster_bits, table_run.clusters)]
        lost += [(self.blocks[index].offset >> file.cluster_bits, 1) for index in moved]
        # From here on nothing is allocated: what is free now is not free in the file yet.
        free = [cluster for run in lost for cluster in await self.add(*run, -1)]
        table = self.table[:]
        for index, offset in moved.items():
            table[index] = offset
            await file.write(offset, pack_counts(self.blocks[index].counts))
        await file.write(table_run.offset, pack_table(table))
        return Rewritten(table, table_run, moved, sorted(free))

    async def _touch(self, cluster: int, count: int) -> None:
        """The blocks of these clusters are going to change."""
        for index in range(cluster >> self.block_bits, (cluster + count - 1 >> self.block_bits) + 1):
            block = await self._block(index)
            if block is None:
                raise await self._out_of_range(index << self.block_bits, 0, -1)
            block.dirty = True

    def adopt(self, rewritten: Rewritten) -> None:
        """The header leads to what rewrite() made."""
        file = self._file
        for index, offset in rewritten.moved.items():
            block = self.blocks[index]
            file.release(block.offset, 1)
            block.offset, block.dirty = offset, False
        for cluster in rewritten.free:
            file.release(cluster << file.cluster_bits, 1)
        self.table = rewritten.table
        self._claim_table()

    # --- blocks -----------------------------------------------------------------------------

    def _block_now(self, index: int) -> Block | None:
        block = self.blocks.get(index)
        if block is not None:
            block.used = True
        return block

    async def _block(self, index: int) -> Block | None:
        """The block with that index of the table; None where there is none."""
        block = self._block_now(index)
        if block is not None:
            return block
        entry = self.table[index] if index < len(self.table) else 0
        offset = entry & REFCOUNT_OFFSET_MASK
        if not offset:
            return None
        if entry & REFCOUNT_RESERVED or offset & (self._file.cluster_size - 1) or offset >= MAX_HOST_OFFSET:
            raise await self._file.corruption(
                f"Refblock offset {offset:#x} unaligned (reftable index: {index:#x})"
            )
        if offset >= self._file.node.size:
            # What is written there would make the file so long that it cannot be flushed.
            raise await self._file.corruption(
                f"Refblock offset {offset:#x} behind the end of the file (reftable index: {index:#x})"
            )
        counts = unpack_counts(await self._file.read(offset, self._file.cluster_size), self.order)
        block = self.blocks.get(index)  # somebody else may have been faster
        if block is None:
            self._make_room()
            block = self.blocks[index] = Block(offset, counts)
        return block

    def _make_room(self) -> None:
        """Drop what is clean; what is dirty stays until the next commit."""
        for _ in range(2 * len(self.blocks)):
            if len(self.blocks) < self._cache_blocks:
                return
            index, block = next(iter(self.blocks.items()))
            del self.blocks[index]
            if block.dirty or block.pins or block.used:
                block.used = False
                self.blocks[index] = block

    def drop_unused(self) -> None:
        """Drop the clean blocks that were not used since this was last called."""
        for index, block in list(self.blocks.items()):
            if not (block.dirty or block.pins or block.used):
                del self.blocks[index]
            block.used = False

    def take_dirty(self) -> list[Block]:
        """The blocks to write, pinned until written() or failed()."""
        dirty = [block for block in self.blocks.values() if block.dirty]
        for block in dirty:
            block.dirty = False
            block.pins += 1
        return dirty

    def drop(self) -> None:
        """Forget all that is in memory, since the file was changed behind it."""
        self.blocks.clear()
        self._window = self._window_end = self._cursor = 0
        self.open_cluster = None

    def replace(self, table: array[int], table_offset: int) -> None:
        """Another table, which the header names already and whose counts may have another width, takes
        the place of the one at `table_offset`."""
        file = self._file
        file.release(table_offset, max(1, len(self.table) * 8))
        for entry in self.table:
            if offset := entry & REFCOUNT_OFFSET_MASK:
                file.release(offset, 1)
        self.read_anew(table)

    def read_anew(self, table: array[int]) -> None:
        """The file was changed: this is its table now, and nobody has claimed any metadata."""
        self.drop()
        self.table = table
        self._follow_width()
        self.virgin = max(self.virgin, -(-self._file.node.size // self._file.cluster_size))
        self._claim_table()

    # --- counting ---------------------------------------------------------------------------

    async def get(self, cluster: int) -> int:
        block = await self._block(cluster >> self.block_bits)
        return 0 if block is None else block.counts[cluster & self._block_mask]

    async def counts(self, index: int) -> Counts | None:
        """The counts of the block with that index. Good until the next await."""
        block = await self._block(index)
        return None if block is None else block.counts

    async def in_use(self, count: int) -> bool:
        """Whether so many clusters of the file are in use."""
        for index in range(len(self.table)):
            counts = await self.counts(index)
            if counts is not None:
                count -= len(counts) - counts.count(0)
            if count <= 0:
                return True
        return False

    async def add(self, cluster: int, count: int, delta: int) -> list[int]:
        """Change the counts of `count` clusters by `delta`; the clusters that are free now. All or,
        with RequestError, none."""
        done: list[tuple[Block, int, array[int]]] = []
        freed: list[int] = []
        try:
            for first, where in self._by_block(cluster, count):
                block = await self._block(first >> self.block_bits)
                if block is None:
                    raise await self._out_of_range(first, 0, delta)
                before = block.counts[where.start : where.stop]
                after, wrong = changed(before, delta, self.maximum)
                if wrong is not None:
                    raise await self._out_of_range(first + wrong, before[wrong], delta)
                done.append((block, where.start, before))
                block.pins += 1  # it stays the one that is known, if all this must be undone
                block.dirty = True
                block.counts[where.start : where.stop] = after
                if delta < 0 and -delta in before:
                    freed += [first + at for at, value in enumerate(after) if not value]
        except BaseException:
            for block, start, before in done:
                block.dirty = True
                block.counts[start : start + len(before)] = before
            raise
        finally:
            for block, _, _ in done:
                block.pins -= 1
        if freed:
            # The lowest free clusters are used first, so that the file stays small.
            if self._window < self._window_end:
                self._cursor = min(self._cursor, self._window)
            self._cursor = min(self._cursor, freed[0])
            self._window = self._window_end = self._cursor
            if self.open_cluster in freed:
                self.open_cluster = None
        return freed

    def close(self, cluster: int) -> None:
        """No more compressed data are packed into this cluster."""
        if self.open_cluster == cluster:
            self.open_cluster = None

    async def lower(self, cluster: int, count: int) -> list[int]:
        """One reference less to each of these clusters that has several; the others."""
        others: list[int] = []
        for first, where in self._by_block(cluster, count):
            block = await self._block(first >> self.block_bits)
            if block is None:
                raise await self._out_of_range(first, 0, -1)
            block.dirty = True
            before = block.counts[where.start : where.stop]
            value = uniform(before)
            if value is not None and value > 1:
                block.counts[where.start : where.stop] = changed(before, -1, self.maximum)[0]
                continue
            others += [first + at for at, value in enumerate(before) if value <= 1]
            lowered = array(before.typecode, [value - (value > 1) for value in before])
            block.counts[where.start : where.stop] = lowered
        return others

    def _by_block(self, cluster: int, count: int) -> Iterator[tuple[int, range]]:
        """These clusters, cut where another block begins: the first of each part, and where it is in
        its block."""
        end = cluster + count
        while cluster < end:
            at = cluster & self._block_mask
            stop = min(at + end - cluster, self._block_mask + 1)
            yield cluster, range(at, stop)
            cluster += stop - at

    async def _out_of_range(self, cluster: int, value: int, delta: int) -> RequestError:
        if delta > 0 and value:
            return RequestError(errno.EINVAL, "a reference count would exceed its width")
        return await self._file.corruption(
            f"Reference count of cluster {cluster} is {value}, which cannot be changed by {delta:+d}"
        )

    # --- allocating -------------------------------------------------------------------------

    def allocate_now(self, count: int, *, fewer: bool = False, virgin: bool = False) -> Run | None:
        """`count` neighbouring free clusters, the caller's from now on, or None if they are not at
        hand without waiting. `fewer`: at least one will do. `virgin`: they must read as zeroes."""
        start = self._window
        available = self._window_end - start
        if available < count:
            if not fewer or available <= 0:
                return None
            count = available
        is_virgin = start >= self.virgin
        block = self.blocks.get(start >> self.block_bits)
        if block is None or (virgin and not is_virgin):
            return None
        if not self._file.node.grow((start + count) << self._file.cluster_bits):
            return None
        counts = block.counts
        first = start & self._block_mask
        for index in range(first, first + count):
            counts[index] = 1
        block.dirty = True
        self._window = start + count
        if start + count > self.virgin:
            self.virgin = start + count
        return Run(start << self._file.cluster_bits, count, is_virgin)

    async def allocate(self, count: int, *, fewer: bool = False) -> Run:
        """Like allocate_now(); waits for what it takes. RequestError(ENOSPC) where there is none."""
        async with self._lock:
            if count > 1 << self.block_bits and not fewer:
                return await self._allocate_long(count)
            run = self.allocate_now(count, fewer=fewer)
            while run is None:
                # What is left of the window is too short, or its block was dropped.
                await self._find_window(1 if fewer else count)
                run = self.allocate_now(count, fewer=fewer)
                end = self._window + (1 if fewer else count)
                if run is None and not self._file.node.grow(end << self._file.cluster_bits):
                    raise RequestError(errno.ENOSPC)
            return run

    async def _allocate_long(self, count: int) -> Run:
        """Neighbours that one block does not cover: behind all that is covered already, and behind the
        blocks that cover them."""
        file = self._file
        blocks = -(-count // ((1 << self.block_bits) - 1))
        first = _behind_last(self.table)
        while first + blocks > len(self.table):
            await self._grow_table(first + blocks - 1)
            first = _behind_last(self.table)
        start = first << self.block_bits
        end = start + blocks + count
        if end << file.cluster_bits > MAX_HOST_OFFSET or not file.node.grow(end << file.cluster_bits):
            raise RequestError(errno.ENOSPC)
        offsets = [(start + number) << file.cluster_bits for number in range(blocks)]
        await file.protect(offsets[0], (end - start) << file.cluster_bits)
        new: dict[int, Block] = {}
        for number, offset in enumerate(offsets):
            counts = unpack_counts(bytes(file.cluster_size), self.order)
            for index in range(min(len(counts), max(0, blocks - number * len(counts)))):
                counts[index] = 1
            await file.write(offset, pack_counts(counts))
            new[first + number] = Block(offset, counts)
        await file.flush()
        entries = array("Q", offsets)
        await file.write(file.header.refcount_table_offset + 8 * first, pack_table(entries))
        self.table[first : first + blocks] = entries
        self.blocks.update(new)
        self._claim_table()
        is_virgin = start + blocks >= self.virgin
        await self.add(start + blocks, count, 1)
        self.virgin = max(self.virgin, end)
        return Run((start + blocks) << file.cluster_bits, count, is_virgin)

    def give_back_now(self, run: Run) -> None:
        """Undo what allocate_now() has just done."""
        first = run.offset >> self._file.cluster_bits
        block = self.blocks[first >> self.block_bits]
        for index in range(first & self._block_mask, (first & self._block_mask) + run.clusters):
            block.counts[index] = 0
        self._cursor = min(self._cursor, first)
        self._window = self._window_end = self._cursor

    async def give_back(self, run: Run) -> None:
        """Undo an allocation that nothing refers to."""
        with trio.CancelScope(shield=True):
            await self.add(run.offset >> self._file.cluster_bits, run.clusters, -1)

    async def _find_window(self, count: int) -> None:
        """Look for `count` free neighbours; makes a new block where none covers what follows."""
        at = self._cursor
        if self._window < self._window_end and self._window >> self.block_bits not in self.blocks:
            at = min(at, self._window)
        while True:
            index = at >> self.block_bits
            if (at << self._file.cluster_bits) + (count << self._file.cluster_bits) > MAX_HOST_OFFSET:
                raise RequestError(errno.ENOSPC)
            block = await self._block(index)
            if block is None:
                await self._new_block(index)
                continue
            start, end = _free_run(block.counts, at & self._block_mask, count)
            base = index << self.block_bits
            if end - start >= count:
                if not self._file.owners.keys().isdisjoint(range(base + start, base + end)):
                    raise await self._file.corruption("Preventing invalid allocation of clusters in use")
                self._window, self._window_end = base + start, base + end
                self._cursor = base + end
                return
            at = base + len(block.counts)

    async def _new_block(self, index: int) -> None:
        """Make the block with that index; it lies in the first cluster that it covers. It is in the
        table, durably, before anything relies on it."""
        file = self._file
        if index >= len(self.table):
            await self._grow_table(index)
            return
        cluster = index << self.block_bits
        offset = cluster << file.cluster_bits
        await file.protect(offset, file.cluster_size)
        counts = unpack_counts(bytes(file.cluster_size), self.order)
        counts[0] = 1
        await file.write(offset, pack_counts(counts))
        await file.flush()
        entry = offset.to_bytes(8, "big")
        await file.write(file.header.refcount_table_offset + 8 * index, entry)
        self.table[index] = offset
        file.claim(offset, 1, "refcount-block")
        self._make_room()
        self.blocks[index] = Block(offset, counts)
        self.virgin = max(self.virgin, cluster + 1)

    async def _grow_table(self, index: int) -> None:
        """Move the table to where there is room for a block with that index and half as many
        again. Blocks for the new table's own clusters come with it, at the start of what the old
        table does not cover."""
        file = self._file
        start = len(self.table) << self.block_bits
        start = max(start, self.virgin + self._block_mask & ~self._block_mask, index << self.block_bits)
        first = start >> self.block_bits
        entries_per_cluster = file.cluster_size // 8
        blocks = 1
        while True:
            entries = max((first + blocks) * 3 // 2, first + blocks + 1)
            clusters = -(-entries // entries_per_cluster)
            needed = -(-(blocks + clusters) // (1 << self.block_bits))
            if needed <= blocks:
                break
            blocks = needed
        if clusters * file.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise RequestError(errno.ENOSPC, "the refcount table cannot grow any more")
        table = self.table[:]
        table.extend([0] * (clusters * entries_per_cluster - len(table)))
        new: dict[int, Block] = {}
        used = blocks + clusters
        for number in range(blocks):
            counts = unpack_counts(bytes(file.cluster_size), self.order)
            for cluster in range(min(len(counts), max(0, used - (number << self.block_bits)))):
                counts[cluster] = 1
            offset = (start + number) << file.cluster_bits
            await file.write(offset, pack_counts(counts))
            table[first + number] = offset
            new[first + number] = Block(offset, counts)
        table_offset = (start + blocks) << file.cluster_bits
        await file.write(table_offset, pack_table(table))
        await file.flush()
        old_offset, old_clusters = file.header.refcount_table_offset, file.header.refcount_table_clusters
        await file.switch_header(refcount_table_offset=table_offset, refcount_table_clusters=clusters)
        file.release(old_offset, old_clusters << file.cluster_bits)
        self.table = table
        self.blocks.update(new)
        self.virgin = max(self.virgin, start + used)
        self._claim_table()
        self.on_free(old_offset, old_clusters, "other")


def _behind_last(table: array[int]) -> int:
    """The index behind the last entry that is used."""
    return max((index + 1 for index, entry in enumerate(table) if entry), default=0)


def _free_run(counts: Counts, start: int, wanted: int) -> tuple[int, int]:
    """The first stretch of at least `wanted` zeroes from `start` on; an empty one if there is none."""
    length = len(counts)
    while start < length:
        try:
            start = counts.index(0, start)
        except ValueError:
            break
        end = start + 1
        limit = min(length, start + max(MAX_WINDOW, wanted))
        while end < limit and not counts[end]:
            end += 1
        if end - start >= wanted:
            return start, end
        start = end
    return length, length


def neighbours(clusters: list[int]) -> list[tuple[int, int]]:
    """Ascending cluster numbers as (first, count)."""
    runs: list[tuple[int, int]] = []
    for cluster in clusters:
        if runs and sum(runs[-1]) == cluster:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((cluster, 1))
    return runs


def pack_table(table: array[int]) -> bytes:
    """A table of 64-bit entries as it lies in the file."""
    swapped = table[:]
    swapped.byteswap()
    return swapped.tobytes()


def unpack_table(data: bytes | bytearray) -> array[int]:
    table = array("Q", bytes(data))
    table.byteswap()
    return table
