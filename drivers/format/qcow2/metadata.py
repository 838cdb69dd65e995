"""When metadata is written: the order that keeps an image whole, whatever moment the power goes.

1. Refcounts, and L2 tables that nothing on disk refers to yet; then a flush, which covers the
   guest's data too.
2. L2 tables and L1 entries that refer to all that.
3. Once this is durable, references that were dropped are subtracted from the refcounts, and their
   clusters may be used again.

So a reference on disk never leads to a cluster that is free, or not written; at worst a cluster
is in use that nobody refers to.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from drivers.block.requests import RequestTracker
from drivers.format.qcow2.counts import pack_counts
from drivers.format.qcow2.header import Incompatible
from drivers.format.qcow2.imagefile import ImageFile
from drivers.format.qcow2.mapping import Mapping
from drivers.format.qcow2.refcounts import Block, Refcounts, neighbours

# So many dropped references wait at most before they are dealt with.
MAX_FREED = 4096
# Where so many wait for a request to end, they are sorted and joined.
COMPACT = 16384


class Freed(NamedTuple):
    """`clusters` from `offset` on lost a reference while the requests up to `number` were in flight:
    those may still read what lies there. `why` says whether the host is told (pass-discard-WHY)."""

    offset: int
    clusters: int
    why: str
    number: int


class Metadata:
    """The metadata of an open image and the order in which it is written."""

    def __init__(self, file: ImageFile, *, lazy: bool) -> None:
        self.file = file
        # Refcounts are written at the close only; the dirty bit tells that they may be wrong.
        self.lazy = lazy
        self._dirty_marked = False
        # Awaited before the first write of anything; None once that is done, or if there is nothing.
        self.before_writing: Callable[[], Awaitable[None]] | None = None
        self._lock = trio.Lock()
        self._preparing = trio.Lock()
        # What lost a reference since the last commit began; and before, the oldest first.
        self._freed: list[Freed] = []
        self._dropped: deque[Freed] = deque()
        self._compact_at = COMPACT
        self._requests = RequestTracker()

    refcounts: Refcounts
    mapping: Mapping
    # Flushes what holds the guest's data.
    flush_data: Callable[[], Awaitable[None]]
    # The host is told that these bytes are of no use.
    discard_host: Callable[[int, int, str], Awaitable[None]]

    def watch(self, requests: RequestTracker) -> None:
        """`requests` are those that read and write the image."""
        self._requests = requests

    def free(self, offset: int, clusters: int, why: str) -> None:
        """A reference to these clusters was dropped."""
        freed = self._freed
        number = self._requests.newest
        if freed:
            last = freed[-1]
            if last.offset + (last.clusters << self.file.cluster_bits) == offset and last.why == why:
                freed[-1] = Freed(last.offset, last.clusters + clusters, why, number)
                return
        freed.append(Freed(offset, clusters, why, number))

    @property
    def many_freed(self) -> bool:
        return len(self._freed) > MAX_FREED

    async def commit(self) -> None:
        """Write all metadata that is ahead of the file."""
        await self._commit(durable=False)

    async def flush(self, *, refcounts: bool = False) -> None:
        """Every request that was answered is durable, with its metadata; `refcounts`: with the
        refcounts even where they are lazy."""
        await self._commit(durable=True, refcounts=refcounts)

    async def _commit(self, *, durable: bool, refcounts: bool = False) -> None:
        with trio.CancelScope(shield=True):
            async with self._lock:
                freed, self._freed = self._freed, []
                blocks: list[Block] = [] if self.lazy and not refcounts else self.refcounts.take_dirty()
                new, old = self.mapping.take_dirty()
                failed = True
                try:
                    await self._write_blocks(blocks)
                    for write in new:
                        await self.file.write(write.offset, write.data)
                    if old:
                        await self.flush_data()
                        for write in old:
                            await self.file.write(write.offset, write.data)
                    if durable or freed:
                        await self.flush_data()
                    failed = False
                finally:
                    self.mapping.written((*new, *old), failed=failed)
                    for block in blocks:
                        block.pins -= 1
                        block.dirty |= failed
                    if failed:
                        self._freed[:0] = freed
                self._dropped.extend(freed)
                await self._drop()

    async def _write_blocks(self, blocks: list[Block]) -> None:
        for block in blocks:
            await self.file.write(block.offset, pack_counts(block.counts))

    async def _drop(self) -> None:
        """Subtract the references of which nothing on disk is left. Those that a request may still
        be reading wait for the next time."""
        oldest = self._requests.oldest_active
        while self._dropped and self._dropped[0].number < oldest:
            await self._subtract(self._dropped[0])
            self._dropped.popleft()
        if len(self._dropped) > self._compact_at:
            self._compact()

    async def _subtract(self, item: Freed) -> None:
        bits, refcounts = self.file.cluster_bits, self.refcounts
        first = item.offset >> bits
        last_reference: list[int] = []
        for cluster in range(first, first + item.clusters):
            if await refcounts.get(cluster) == 1:
                last_reference.append(cluster)
                # Nothing may be added to it any more.
                refcounts.close(cluster)
        # Before they are free: afterwards they may be somebody else's at once.
        for start, count in neighbours(last_reference):
            self.file.release(start << bits, count << bits)
            with contextlib.suppress(OSError):  # it is advice
                await self.discard_host(start << bits, count << bits, item.why)
        await refcounts.add(first, item.clusters, -1)

    def _compact(self) -> None:
        """One long request can drop any number of references, and keeps all of them waiting. In the
        order of the file most are neighbours."""
        joined: list[Freed] = []
        bits = self.file.cluster_bits
        for item in sorted(self._dropped, key=lambda item: (item.why, item.offset)):
            last = joined[-1] if joined else None
            if last and last.why == item.why and last.offset + (last.clusters << bits) == item.offset:
                number = max(last.number, item.number)
                joined[-1] = Freed(last.offset, last.clusters + item.clusters, item.why, number)
            else:
                joined.append(item)
        joined.sort(key=lambda item: item.number)
        self._dropped = deque(joined)
        self._compact_at = max(COMPACT, 2 * len(joined))

    async def mark_dirty(self) -> None:
        """Before the first write: what the file has to tell is told. With lazy refcounts those on
        disk are stale from now on."""
        if self.before_writing is not None:
            async with self._preparing:
                if self.before_writing is not None:
                    await self.before_writing()
                    self.before_writing = None
        if self.lazy and not self._dirty_marked:
            async with self._lock:
                if not self._dirty_marked:
                    header = self.file.header
                    await self.file.update_header(incompatible=header.incompatible | Incompatible.DIRTY)
                    await self.file.flush()
                    self._dirty_marked = True

    @property
    def writable_now(self) -> bool:
        """Whether nothing has to be told to the file before a write."""
        return self.before_writing is None and (self._dirty_marked or not self.lazy)

    async def finish(self) -> None:
        """Write all, the refcounts too. No request is in flight."""
        await self._commit(durable=True)
        # Now the references are dropped; these last refcounts need no order.
        was_lazy, self.lazy = self.lazy, False
        if was_lazy or self._dropped or any(block.dirty for block in self.refcounts.blocks.values()):
            await self._commit(durable=True)
        if was_lazy and self._dirty_marked:
            header = self.file.header
            await self.file.update_header(incompatible=header.incompatible & ~Incompatible.DIRTY)
            await self.file.flush()
            self._dirty_marked = False
        self.lazy = was_lazy
