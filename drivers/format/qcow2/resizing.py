"""Changing the size of the guest's disk. Nothing else is in flight."""

from __future__ import annotations

import errno

import trio

from drivers.errors import RequestError
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK
from drivers.format.qcow2.refcounts import pack_table
from drivers.format.qcow2.unmapping import Unmapper


async def grow_l1(image: Image, size: int) -> None:
    """Give the L1 table room for `size` bytes. The new table is on disk before the header names it."""
    file, mapping = image.file, image.mapping
    needed = file.header.needed_l1_size(size)
    if needed <= len(mapping.l1):
        return
    if needed * 8 > MAX_L1_BYTES:
        raise RequestError(errno.EFBIG, "the L1 table would be too large")
    await image.metadata.flush()
    old_offset, old_length = file.header.l1_table_offset, len(mapping.l1) * 8
    clusters = -(-needed * 8 // file.cluster_size)
    run = await image.refcounts.allocate(clusters)
    table = mapping.l1[:]
    table.extend([0] * (needed - len(table)))
    try:
        data = pack_table(table)
        await file.write(run.offset, data + bytes(-len(data) % file.cluster_size))
        # The refcounts of the new table go with everything else that is dirty.
        await image.metadata.flush()
        await file.switch_header(l1_table_offset=run.offset, l1_size=needed)
    except BaseException:
        if not file.corrupt:  # else nobody knows which table the header leads to
            await image.refcounts.give_back(run)
        raise
    mapping.l1 = table
    file.claim(run.offset, needed * 8, "active-l1")
    if old_length:
        file.release(old_offset, old_length)
        image.metadata.free(old_offset, -(-old_length // file.cluster_size), "other")


async def resize(image: Image, unmapper: Unmapper, size: int) -> None:
    """Let the disk end at `size`. What lies behind is freed; what is added shows zeroes."""
    file = image.file
    image.check_writable()
    if image.header.snapshot_count and image.header.version < 3:
        # Its snapshots do not tell how large the disk was.
        raise RequestError(errno.ENOTSUP, "Can't resize a v2 image which has snapshots")
    await image.metadata.mark_dirty()
    await _forget_machine(image, unmapper)
    if size < image.size:
        first = -(-size // file.cluster_size)
        last = -(-image.size // file.cluster_size)
        await unmapper.forget(first, last)
        await _drop_tables(image, size)
        await image.metadata.flush()
    else:
        await grow_l1(image, size)
        await _hide(image, unmapper, size)
        # Else a power cut may show what was hidden.
        await image.metadata.flush()
    with trio.CancelScope(shield=True):
        # The header and we are of one mind about the size; a data file is never the shorter one.
        raw, grows = image.header.raw_data_file, size > image.size
        if raw and grows:
            await image.data.truncate(size)
        await file.switch_header(size=size)
        image.size = size
        if raw and not grows:
            await image.data.truncate(size)


async def _hide(image: Image, unmapper: Unmapper, size: int) -> None:
    """What was behind the end must not show in what is added: the rest of a last cluster that was cut,
    and a backing file that is longer than the image was."""
    start = image.size
    cluster_end = -(-start // image.file.cluster_size) * image.file.cluster_size
    reach = image.backing_length(start, size - start)
    length = max(reach, min(size, cluster_end) - start)
    image.size = size
    try:
        if length:
            await unmapper.write_zeroes(start, length, may_unmap=True)
    finally:
        image.size = start


async def _forget_machine(image: Image, unmapper: Unmapper) -> None:
    """Behind the disk's end may lie the state of a virtual machine, from a snapshot that was applied.
    It must not become a part of the disk."""
    mapping = image.mapping
    needed = image.header.needed_l1_size(image.size)
    if any(mapping.l1[needed:]):
        await unmapper.forget(needed << mapping.l2_bits, len(mapping.l1) << mapping.l2_bits)
        await _drop_tables(image, image.size)


async def _drop_tables(image: Image, size: int) -> None:
    """Free the L2 tables of nothing but what lies behind `size`."""
    file, mapping = image.file, image.mapping
    keep = file.header.needed_l1_size(size)
    for index in range(keep, len(mapping.l1)):
        if offset := mapping.l1[index] & OFFSET_MASK:
            mapping.forget_table(index)
            file.release(offset, 1)
            image.metadata.free(offset, 1, "other")
