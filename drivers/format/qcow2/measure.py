"""How large the file of a qcow2 image would be."""

from __future__ import annotations

from drivers.block.extents import ExtentFlags
from drivers.block.image import ImageNode, Measurement
from drivers.block.node import Node, Preallocation
from drivers.format.qcow2.directory import BitmapEntry
from drivers.format.qcow2.encryption import header_bytes
from drivers.format.qcow2.new import NewImage, check_size, divide_up, refcount_clusters, take_options
from drivers.options.schema import Options


async def measure(options: Options, source: Node | None) -> Measurement:
    """See ImageNode.measure(). What could be shared with a backing file is not known, so it counts
    as needed. Raises OptionError."""
    image = take_options(options, size=None if source is None else source.size)
    check_size(image, "The image size is too large")
    whole = _round_up(image.size, image.cluster_size)
    if image.preallocation in (Preallocation.FALLOC, Preallocation.FULL):
        needed = whole
    elif source is None:
        needed = 0
    elif image.backing_name:
        needed = whole
    else:
        needed = await _needed_by(source, image.cluster_size)
    full = _full_size(image) + _round_up(header_bytes(image), image.cluster_size)
    return Measurement(full - whole + needed, full, _bitmaps_size(image, source))


def _full_size(image: NewImage) -> int:
    """Bytes of an image of which every cluster is allocated, but for the encryption header."""
    size, per_table = image.cluster_size, image.cluster_size // image.l2_entry_size
    data = divide_up(image.size, size)
    l2 = divide_up(data, per_table)
    l1 = divide_up(l2 * 8, size)
    counted = 1 + l1 + l2 + data
    table, blocks = refcount_clusters(counted, image.cluster_bits, image.refcount_order)
    return (counted + table + blocks) * size


async def _needed_by(source: Node, cluster_size: int) -> int:
    """Bytes of the clusters that hold data of `source`."""
    needed = offset = counted_to = 0
    while offset < source.size:
        for extent in await source.block_status(offset, source.size - offset):
            end = offset + extent.length
            if extent.depth and not extent.flags & ExtentFlags.ZERO:
                start = max(counted_to, offset // cluster_size * cluster_size)
                counted_to = max(counted_to, _round_up(end, cluster_size))
                needed += max(0, counted_to - start)
            offset = end
    return needed


def _bitmaps_size(image: NewImage, source: Node | None) -> int | None:
    """Bytes that the source's persistent bitmaps would take; None where there can be none."""
    if image.version < 3 or not isinstance(source, ImageNode):
        return None
    if type(source).add_bitmap is ImageNode.add_bitmap:
        return None
    total = directory = 0
    for bitmap in source.bitmaps.values():
        if not bitmap.persistent or bitmap.inconsistent:
            continue
        clusters = divide_up(bitmap.byte_count, image.cluster_size)
        total += clusters * image.cluster_size + _round_up(clusters * 8, image.cluster_size)
        name = bitmap.name.encode(errors="surrogateescape")
        directory += _round_up(BitmapEntry.FIXED.size + len(name), 8)
    return total + _round_up(directory, image.cluster_size)


def _round_up(value: int, unit: int) -> int:
    return divide_up(value, unit) * unit
