"""Giving clusters to what was just added to the disk. Nothing else is in flight."""

from __future__ import annotations

from drivers.block.node import Preallocation
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from drivers.format.qcow2.mapping import Slice

# Zeroes are written in pieces of so many bytes.
_ZEROES = bytes(1 << 20)


async def preallocate(image: Image, start: int, end: int, mode: Preallocation) -> None:
    """Let the guest bytes from `start` to `end`, which read as zeroes, have clusters of their own.
    METADATA leaves the clusters as holes of the file, FALLOC reserves storage for them, FULL writes
    them."""
    mapping = image.mapping
    bits = mapping.cluster_bits
    cluster, last = start >> bits, (end - 1) >> bits
    while cluster <= last:
        stop = min(last, cluster | mapping.slice_mask)
        found = await mapping.pin(cluster >> mapping.slice_bits)
        try:
            while cluster <= stop:
                cluster += await _allocate(image, found, cluster, stop, mode)
        finally:
            found.pins -= 1
        await image.metadata.commit()


async def _allocate(image: Image, found: Slice, first: int, last: int, mode: Preallocation) -> int:
    """Allocate for some clusters from `first` on; how many have theirs now."""
    mapping, step = image.mapping, image.mapping.step
    at = (first & mapping.slice_mask) * step
    if found.entries[at] & (COMPRESSED | OFFSET_MASK):
        return 1
    count = 1
    while first + count <= last and not found.entries[at + count * step] & (COMPRESSED | OFFSET_MASK):
        count += 1
    host = first << mapping.cluster_bits
    if not image.external:
        run = await image.refcounts.allocate(count, fewer=True)
        host, count = run.offset, run.clusters
        try:
            await _provide(image, host, count << mapping.cluster_bits, mode, virgin=run.virgin)
        except BaseException:
            await image.refcounts.give_back(run)
            raise
    for number in range(count):
        found.entries[at + number * step] = host + (number << mapping.cluster_bits) | COPIED
        # With extended entries the subclusters stay what they are, with a place of their own.
    found.dirty = True
    return count


async def _provide(image: Image, host: int, length: int, mode: Preallocation, *, virgin: bool) -> None:
    """Have the host clusters read as zeroes, with the storage that `mode` asks for."""
    node = image.file.node
    if mode is Preallocation.FULL:
        for at in range(0, length, len(_ZEROES)):
            await node.write(host + at, memoryview(_ZEROES)[: length - at])
    elif mode is Preallocation.FALLOC or not virgin:
        await node.write_zeroes(host, length, may_unmap=False)
