"""An open image: what reading, writing, unmapping, resizing and snapshots work on together."""

from __future__ import annotations

import errno
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from drivers.block.node import Node
from drivers.crypto.cipher import SectorCipher
from drivers.crypto.luks.layout import Header as LuksHeader
from drivers.crypto.luks.volume import Volume
from drivers.errors import RequestError
from drivers.format.qcow2.header import Header
from drivers.format.qcow2.imagefile import ImageFile
from drivers.format.qcow2.layout import compressed_range
from drivers.format.qcow2.mapping import Mapping
from drivers.format.qcow2.metadata import Metadata
from drivers.format.qcow2.options import Qcow2Options
from drivers.format.qcow2.refcounts import Refcounts

# Threads that (de)compress for one image.
WORKERS = 4


class Busy:
    """Guest clusters whose mapping is being changed: one change at a time for each."""

    def __init__(self) -> None:
        # (first, last, done): few, so that looking through them is quick.
        self._ranges: list[tuple[int, int, trio.Event]] = []

    def __contains__(self, cluster: int) -> bool:
        return any(first <= cluster <= last for first, last, _ in self._ranges)

    def __bool__(self) -> bool:
        return bool(self._ranges)

    async def idle(self, first: int, last: int) -> None:
        """Wait until nobody changes any of these clusters. Comes back without a checkpoint if so."""
        while True:
            overlapping = (done for low, high, done in self._ranges if low <= last and first <= high)
            busy = next(overlapping, None)
            if busy is None:
                return
            await busy.wait()

    @asynccontextmanager
    async def changing(self, first: int, last: int) -> AsyncIterator[None]:
        """Nobody else changes these clusters inside."""
        await self.idle(first, last)
        mine = first, last, trio.Event()
        self._ranges.append(mine)
        try:
            yield
        finally:
            self._ranges.remove(mine)
            mine[2].set()


class Image:
    """`data` holds the guest's clusters: the image file's node, or an external data file. `backing`
    shows where the image has nothing. `size` is the guest's disk in bytes."""

    def __init__(
        self,
        file: ImageFile,
        data: Node,
        options: Qcow2Options,
        *,
        l1: array[int],
        refcount_table: array[int],
    ) -> None:
        header = file.header
        self.file = file
        self.data = data
        self.options = options
        self.backing: Node | None = None
        self.crypt: SectorCipher | None = None
        # With LUKS, what has the key slots, and what their header says.
        self.volume: Volume | None = None
        self.luks: LuksHeader | None = None
        # Encrypted, and opened without the key: guest data are neither read nor written.
        self.locked = False
        # The cipher counts sectors of the guest's disk, not of the file.
        self.crypt_by_guest = False
        self.size = header.size
        self.busy = Busy()
        self.threads = trio.CapacityLimiter(WORKERS)
        self.refcounts = Refcounts(file, refcount_table, cache_size=options.refcount_cache_size)
        self.metadata = Metadata(file, lazy=options.lazy_refcounts)
        self.mapping = Mapping(
            file,
            self.refcounts,
            l1,
            slice_bytes=options.l2_cache_entry_size,
            cache_slices=options.l2_cache_size // options.l2_cache_entry_size,
            commit=self.metadata.commit,
        )
        self.metadata.refcounts = self.refcounts
        self.metadata.mapping = self.mapping
        self.metadata.flush_data = self.flush_data
        self.metadata.discard_host = self.discard_host
        self.mapping.on_free = self.refcounts.on_free = self.metadata.free
        self.mapping.on_load = self.clean_caches
        # When the caches were last cleaned.
        self._cleaned = trio.current_time()
        # Called when compressed data are freed, or written.
        self.on_changed_compressed: Callable[[], object] = lambda: None

    @property
    def header(self) -> Header:
        return self.file.header

    @property
    def external(self) -> bool:
        """The guest's clusters lie in a file of their own, each at its guest offset."""
        return self.data is not self.file.node

    def clean_caches(self) -> None:
        """Drop what the caches hold without need, where it is time to. Never waits."""
        interval = self.options.cache_clean_interval
        if interval and trio.current_time() - self._cleaned >= interval:
            self._cleaned = trio.current_time()
            self.mapping.drop_unused()
            self.refcounts.drop_unused()

    def check_writable(self) -> None:
        if self.file.corrupt:
            raise RequestError(errno.EIO, "the image is corrupt")
        self.check_unlocked()

    def check_unlocked(self) -> None:
        if self.locked:
            raise RequestError(errno.EACCES, "the image was opened without its key")

    def backing_length(self, offset: int, length: int) -> int:
        """How much of this range, from its start on, the backing file reaches."""
        return 0 if self.backing is None else max(0, min(length, self.backing.size - offset))

    async def flush_data(self) -> None:
        if self.external:
            await self.data.flush()
        await self.file.flush()

    async def discard_host(self, offset: int, length: int, why: str) -> None:
        """These bytes of the image file are of no use any more."""
        node = self.file.node
        length = min(length, max(0, node.size - offset))
        if self.external or not length:
            return
        if self.options.passes_discard[why] and node.flags.discard:
            await node.discard(offset, length)
        elif node.lent:
            # What is written there next comes to lie in other pages than those that are on their way.
            await node.write_zeroes(offset, length, may_unmap=False)

    def free_compressed(self, entry: int) -> None:
        """Drop a reference to a compressed cluster."""
        bits = self.file.cluster_bits
        offset, length = compressed_range(entry, bits)
        first, last = offset >> bits, (offset + length - 1) >> bits
        self.on_changed_compressed()
        self.metadata.free(first << bits, last - first + 1, "other")

    def crypt_sector(self, host: int, guest: int) -> int:
        """What the cipher calls the sector at these offsets."""
        return (guest if self.crypt_by_guest else host) >> 9
