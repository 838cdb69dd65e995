"""Writing: in place where the image alone has the cluster, else into newly allocated clusters,
filled up with what they read as before; and compressed.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import NamedTuple

import trio

from drivers.block.inline import write_now
from drivers.crypto.cipher import in_turns
from drivers.errors import RequestError
from drivers.format.qcow2.compress import compress
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    compressed_entry,
)
from drivers.format.qcow2.mapping import HOLE, RESERVED, RESERVED_ZERO, ZEROED, Slice
from drivers.format.qcow2.reading import Reader
from drivers.format.qcow2.refcounts import Run

# An allocation is at most so many bytes (or one cluster), since they are in memory while they are
# filled up.
MAX_ALLOCATION = 4 << 20


class Target(NamedTuple):
    """Where `clusters` neighbouring guest clusters from `first` on are written: to `host` on.

    `run` is what was allocated for them, None where they had host clusters of their own. `virgin`:
    all there reads as zeroes. `whole`: the clusters have content elsewhere, so all of them is copied;
    else units that are not touched stay what they are.
    """

    first: int
    clusters: int
    host: int
    run: Run | None
    virgin: bool
    whole: bool


class Writer:
    def __init__(self, image: Image, reader: Reader) -> None:
        self._image = image
        self._mapping = image.mapping
        self._reader = reader
        self._bits = image.mapping.cluster_bits
        self._mask = image.mapping.cluster_size - 1
        # Where the next compressed cluster goes, if it goes on in refcounts.open_cluster.
        self._compressed_end = 0
        self._packing = trio.Lock()

    # --- writing ----------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview) -> None:
        image, mapping = self._image, self._mapping
        image.check_writable()
        await image.metadata.mark_dirty()
        done = 0
        while done < len(data):
            at, end = offset + done, offset + len(data)
            cluster = at >> self._bits
            await image.busy.idle(cluster, cluster)
            found = await mapping.load(cluster >> mapping.slice_bits)
            if cluster in image.busy:
                continue
            host, length = self._in_place(found, at, end)
            if length:
                await self._check_behind_end(host + length)
                await self.put(host, at, data[done : done + length])
            else:
                length = await self._write_allocating(at, data[done:])
            done += length

    def _in_place(self, found: Slice, offset: int, end: int) -> tuple[int, int]:
        """(host offset, length) of what can be overwritten where it lies, from `offset` on; length 0
        if nothing can."""
        mapping, start = self._mapping, offset
        step, host, length = mapping.step, 0, 0
        end = min(end, ((offset >> self._bits | mapping.slice_mask) + 1) << self._bits)
        while offset < end:
            index = (offset >> self._bits & mapping.slice_mask) * step
            entry = found.entries[index]
            here = (entry & OFFSET_MASK) + (offset & self._mask)
            if not self._owned(entry) or entry & OFFSET_MASK & self._mask:
                break
            stop = min(end, (offset | self._mask) + 1)
            if mapping.extended:
                stop = self._allocated_until(found.entries[index + 1], offset, stop)
            elif entry & mapping.zero_flag:
                break
            if stop == offset or (offset != start and here != host + length):
                break
            if offset == start:
                host = here
            length += stop - offset
            if stop & self._mask and stop != end:
                break  # a subcluster behind it is not allocated
            offset = stop
        return host, length

    async def _check_behind_end(self, end: int) -> None:
        """A file that ends before what is overwritten grows, if that cluster is in use: one wild offset
        must not make it so long that it cannot be flushed."""
        image = self._image
        behind = end > image.data.size and not image.external
        if behind and not await image.refcounts.get((end - 1) >> self._bits):
            raise RequestError(errno.EIO, f"a cluster at {end - 1:#x} is not in use, and behind the end")

    def _owned(self, entry: int) -> bool:
        """Whether the entry leads to a host cluster that is its own. 0 is one only in a data file."""
        if not entry & COPIED or entry & COMPRESSED:
            return False
        return bool(entry & OFFSET_MASK) or self._image.external

    def _allocated_until(self, bitmap: int, offset: int, stop: int) -> int:
        """Up to where, within the cluster and `stop`, the subclusters from `offset` on have data."""
        sub_bits = self._mapping.sub_bits
        base = offset & ~self._mask
        while offset < stop and bitmap >> ((offset - base) >> sub_bits) & 1:
            offset = (offset >> sub_bits) + 1 << sub_bits
        return min(offset, stop)

    def _unallocated_until(self, found: Slice, offset: int, stop: int) -> int:
        """Up to where the subclusters from `offset` on have no data: those that have are written in
        place, perhaps by somebody else just now."""
        index = (offset >> self._bits & self._mapping.slice_mask) * 2
        sub = (offset & self._mask) >> self._mapping.sub_bits
        later = found.entries[index + 1] & ALL_ALLOCATED & ~((2 << sub) - 1)
        if not later:
            return stop
        next_data = (later & -later).bit_length() - 1
        return min(stop, (offset & ~self._mask) + (next_data << self._mapping.sub_bits))

    async def put(self, host: int, guest: int, data: memoryview) -> None:
        """Write guest data to their place in the host file."""
        image = self._image
        if not image.external and image.file.overlap(host, len(data)) is not None:
            await image.file.protect(host, len(data))
        if image.crypt is not None:
            data = memoryview(bytearray(data))
            crypt, sector = image.crypt, image.crypt_sector(host, guest)
            await in_turns(crypt.encrypt, sector, data)
        inside = image.data.grow(host + len(data))  # what cannot grow refuses the write
        if not (inside and write_now(image.data, host, data, image.file.pace)):
            await image.data.write(host, data)

    # --- allocating -------------------------------------------------------------------------

    async def _write_allocating(self, offset: int, data: memoryview) -> int:
        """Write the start of `data` into clusters that are not the image's own yet; how much of it."""
        image, mapping, bits = self._image, self._mapping, self._bits
        first = offset >> bits
        limit = min(offset + len(data), offset + max(MAX_ALLOCATION, self._mask + 1))
        last = min((limit - 1) >> bits, first | mapping.slice_mask)
        for cluster in range(first + 1, last + 1):
            if cluster in image.busy:
                last = cluster - 1
                break
        async with image.busy.changing(first, last):
            found = await mapping.pin(first >> mapping.slice_bits)
            try:
                target = await self._target(found, first, last)
                end = min(offset + len(data), (target.first + target.clusters) << bits)
                if mapping.extended and target.run is None:
                    end = self._unallocated_until(found, offset, end)
                try:
                    start, stop = await self._fill(target, offset, data[: end - offset])
                except BaseException:
                    if target.run is not None:
                        await image.refcounts.give_back(target.run)
                    raise
                self._link(found, target, start, stop)
            finally:
                found.pins -= 1
        if image.metadata.many_freed:
            await image.metadata.commit()
        return end - offset

    async def _target(self, found: Slice, first: int, last: int) -> Target:
        """Where guest clusters from `first` on, up to `last` at most, are written to."""
        image, mapping = self._image, self._mapping
        step = mapping.step
        index = (first & mapping.slice_mask) * step
        entries = found.entries
        entry = entries[index]
        if not entry & COMPRESSED and entry & OFFSET_MASK & self._mask:
            raise await image.file.corruption(f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned")
        if image.external or self._owned(entry):
            # A host cluster of its own: reserved, or given by the guest's offset.
            host = first << self._bits if image.external else entry & OFFSET_MASK
            return Target(first, 1, host, None, virgin=False, whole=False)
        whole = _has_data(entry)
        count = 1
        while first + count <= last:
            other = entries[index + count * step]
            if self._owned(other) or _has_data(other) != whole:
                break
            count += 1
        run = await image.refcounts.allocate(count, fewer=True)
        return Target(first, run.clusters, run.offset, run, virgin=run.virgin, whole=whole)

    async def _fill(self, target: Target, offset: int, data: memoryview) -> tuple[int, int]:
        """Write `data`, and around them what the touched units read as until now. Returns the guest
        range that the target has now."""
        unit = (1 << (self._bits if target.whole else self._mapping.sub_bits)) - 1
        end = offset + len(data)
        start, stop = offset & ~unit, (end + unit) & ~unit
        host = target.host + start - (target.first << self._bits)
        head = await self._before(start, offset, target)
        tail = await self._before(end, stop, target)
        if not head and not tail:
            await self.put(host + offset - start, offset, data)
        elif len(data) <= 1 << 20:
            joined = memoryview(b"".join((head, data, tail)))
            await self.put(host + offset - start - len(head), offset - len(head), joined)
        else:
            await self.put(host + offset - start, offset, data)
            for at, part in ((offset - len(head), head), (end, tail)):
                if part:
                    await self.put(host + at - start, at, memoryview(part))
        return start, stop

    async def _before(self, start: int, end: int, target: Target) -> bytes | bytearray:
        """What this guest range read as before, or nothing where the target reads so already."""
        image = self._image
        if start >= end:
            return b""
        inside = min(end, max(start, image.size))
        pieces = await self._mapping.describe(start, inside, most=64) if inside > start else []
        if target.virgin and image.crypt is None and self._reads_as_zeroes(start, inside, pieces):
            return b""
        found = bytearray(end - start)
        if inside > start:
            await self._reader.read_into(start, memoryview(found)[: inside - start])
        return found

    def _reads_as_zeroes(self, start: int, end: int, pieces: Sequence[tuple[int, int, int]]) -> bool:
        for kind, _, length in pieces:
            if kind in (HOLE, RESERVED):
                if self._image.backing_length(start, length):
                    return False
            elif kind not in (ZEROED, RESERVED_ZERO):
                return False
            start += length
        return start >= end

    def _link(self, found: Slice, target: Target, start: int, stop: int) -> None:
        """Let the guest's clusters lead to the target. Nothing waits here."""
        mapping = self._mapping
        for number in range(target.clusters):
            cluster = target.first + number
            at = cluster << self._bits
            if at >= stop:
                break
            index = (cluster & mapping.slice_mask) * mapping.step
            old = found.entries[index]
            found.entries[index] = target.host + (number << self._bits) | COPIED
            if mapping.extended:
                low = max(0, start - at) >> mapping.sub_bits
                high = min(self._mask + 1, stop - at) - 1 >> mapping.sub_bits
                bits = ((1 << high + 1) - 1) & ~((1 << low) - 1)
                before = 0 if old & COMPRESSED or target.whole else found.entries[index + 1]
                found.entries[index + 1] = (before | bits) & ~(bits << SUBCLUSTERS)
            if target.run is not None:
                self.drop(old)
        found.dirty = True

    def drop(self, entry: int, why: str = "other") -> None:
        """A reference from an L2 entry is gone."""
        if self._image.external:
            return
        if entry & COMPRESSED:
            self._image.free_compressed(entry)
        elif entry & OFFSET_MASK:
            self._image.metadata.free(entry & OFFSET_MASK, 1, why)

    # --- compressed writes ------------------------------------------------------------------

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """One cluster or more; the last may be cut off by the image's end."""
        for at in range(0, len(data), self._mask + 1):
            await self._compress_cluster(offset + at, data[at : at + self._mask + 1])

    async def _compress_cluster(self, offset: int, data: memoryview) -> None:
        image, mapping, size = self._image, self._mapping, self._mask + 1
        image.check_writable()
        await image.metadata.mark_dirty()
        kind = image.header.compression_type
        whole = data if len(data) == size else memoryview(bytes(data).ljust(size, b"\0"))
        packed = await trio.to_thread.run_sync(compress, whole, kind, limiter=image.threads)
        if len(packed) >= size:
            await self.write(offset, data)
            return
        cluster = offset >> self._bits
        async with image.busy.changing(cluster, cluster):
            found = await mapping.pin(cluster >> mapping.slice_bits)
            try:
                host = await self._pack(packed)
                index = (cluster & mapping.slice_mask) * mapping.step
                old = found.entries[index]
                found.entries[index] = compressed_entry(host, len(packed), self._bits)
                image.on_changed_compressed()  # the same entry may have led to other data
                if mapping.extended:
                    found.entries[index + 1] = 0
                found.dirty = True
                self.drop(old)
            finally:
                found.pins -= 1

    async def _pack(self, packed: bytes) -> int:
        """Write compressed data behind the ones before, or into a new cluster; the host offset."""
        image, refcounts, size = self._image, self._image.refcounts, self._mask + 1
        async with self._packing:
            host, end = self._compressed_end, self._compressed_end + len(packed)
            room = -host & self._mask
            taken: Run | None = None
            shared = bool(room) and await self._share(host >> self._bits)
            if not shared or len(packed) > room:
                taken = await refcounts.allocate(1)
                if shared and taken.offset != host + room:
                    await refcounts.add(host >> self._bits, 1, -1)
                    shared = False
                if not shared:
                    host, end = taken.offset, taken.offset + len(packed)
            try:
                await image.file.protect(host, len(packed))
                await image.file.write(host, packed)
            except BaseException:
                with trio.CancelScope(shield=True):
                    if taken is not None:
                        await refcounts.give_back(taken)
                    if shared:
                        await refcounts.add(host >> self._bits, 1, -1)
                raise
            self._compressed_end = end
            refcounts.open_cluster = end >> self._bits if end % size else None
            return host

    async def _share(self, cluster: int) -> bool:
        """One more reference to the cluster that was begun; False if that cannot be counted, or it
        was freed since."""
        refcounts = self._image.refcounts
        if refcounts.open_cluster != cluster or await refcounts.get(cluster) >= refcounts.maximum:
            return False
        await refcounts.add(cluster, 1, 1)
        if refcounts.open_cluster != cluster:  # it was given up meanwhile
            await refcounts.add(cluster, 1, -1)
            return False
        return True


def _has_data(entry: int) -> bool:
    """Whether the cluster has content in the image that is not its own to overwrite."""
    return bool(entry & COMPRESSED or entry & OFFSET_MASK)
