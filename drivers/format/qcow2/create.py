"""Making qcow2 images.

What is laid out, in clusters: the header, the refcount table, the refcount blocks, the L1 table,
the encryption header, and, for preallocated images, the L2 tables and the data. The header is
written last, behind a flush: before it there is no image.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from drivers.block.image import CreateContext
from drivers.block.node import Node, Preallocation
from drivers.errors import ImageError, OptionError, RequestError
from drivers.format.qcow2.encryption import NewEncryption, take_encryption
from drivers.format.qcow2.header import EncryptionHeader, Header
from drivers.format.qcow2.layout import COPIED, MAX_BACKING_NAME, MAX_REFCOUNT_TABLE_BYTES
from drivers.format.qcow2.new import NewImage, check_size, divide_up, refcount_clusters, take_options
from drivers.format.qcow2.refcounts import pack_table
from drivers.options.schema import Options

# Tables are written in pieces of about so many bytes.
_PIECE = 1 << 20
_TOO_LARGE = "The image size is too large for file format 'qcow2'"


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything lies; all in clusters. `end` is in bytes: the last table may end early."""

    refcount_table: int
    refcount_blocks: int
    l1: int
    encryption: int
    l2: int
    data: int
    clusters: int
    end: int


async def create(context: CreateContext, options: Options) -> None:
    """Make a qcow2 image as ImageNode.create() describes it, an empty one or one with all of its
    clusters allocated. Raises OptionError."""
    image = take_options(options)
    check_size(image, _TOO_LARGE)
    encryption = take_encryption(image, context.graph)
    if image.data_file_raw and image.preallocation is Preallocation.OFF:
        # A raw file has every cluster in its place.
        image = replace(image, preallocation=Preallocation.METADATA)
    layout = _lay_out(image, 0 if encryption is None else encryption.header_bytes)
    header = _header(image, layout, encryption)
    first = _first_cluster(image, header)
    file = await context.create_file(context.filename)
    if image.data_file is not None:
        await _make_data_file(context, image)
    await _make_room(file, image, layout)
    await _write_tables(file, image, header, layout)
    if encryption is not None and encryption.header_bytes:
        await encryption.write_header(file, layout.encryption << image.cluster_bits)
    await file.flush()
    await file.write(0, first)
    await file.flush()


def _lay_out(image: NewImage, encryption_bytes: int) -> _Layout:
    bits = image.cluster_bits
    l1_bytes = image.l2_tables * 8
    l1_clusters = divide_up(l1_bytes, 1 << bits)
    encryption_clusters = divide_up(encryption_bytes, 1 << bits)
    l2_clusters = data_clusters = 0
    if image.preallocation is not Preallocation.OFF:
        l2_clusters = image.l2_tables
        if image.data_file is None:
            data_clusters = divide_up(image.size, 1 << bits)
    counted = 1 + l1_clusters + encryption_clusters + l2_clusters + data_clusters
    table, blocks = refcount_clusters(counted, bits, image.refcount_order)
    if table << bits > MAX_REFCOUNT_TABLE_BYTES:
        raise OptionError(f"{_TOO_LARGE} (try using a larger cluster size)")
    l1 = 1 + table + blocks
    encryption = l1 + l1_clusters
    l2 = encryption + encryption_clusters
    clusters = counted + table + blocks
    end = clusters << bits
    if l1_clusters and encryption == clusters:
        end = (l1 << bits) + l1_bytes
    return _Layout(
        refcount_table=1,
        refcount_blocks=1 + table,
        l1=l1,
        encryption=encryption,
        l2=l2,
        data=l2 + l2_clusters,
        clusters=clusters,
        end=end,
    )


def _header(image: NewImage, layout: _Layout, encryption: NewEncryption | None) -> Header:
    bits = image.cluster_bits
    extension = None
    if encryption is not None and encryption.header_bytes:
        extension = EncryptionHeader(layout.encryption << bits, encryption.header_bytes)
    return replace(
        image.header(),
        l1_size=image.l2_tables,
        l1_table_offset=layout.l1 << bits if image.l2_tables else 0,
        refcount_table_offset=layout.refcount_table << bits,
        refcount_table_clusters=layout.refcount_blocks - layout.refcount_table,
        encryption=extension,
    )


def _first_cluster(image: NewImage, header: Header) -> bytes:
    """The header as it is written. Raises OptionError where the names are too long for it."""
    name = (image.backing_name or "").encode(errors="surrogateescape")
    refused = f"Could not assign backing file '{image.backing_name}'"
    if image.backing_format:
        refused += f" with format '{image.backing_format}'"
    if len(name) > MAX_BACKING_NAME:
        raise OptionError(f"{refused}: Invalid argument")
    try:
        whole = header.build()
    except ImageError as error:
        reason = f"{refused}: No space left on device" if name else str(error)
        raise OptionError(reason) from None
    return whole + bytes(header.cluster_size - len(whole))


async def _make_data_file(context: CreateContext, image: NewImage) -> None:
    assert image.data_file is not None
    file = await context.create_file(image.data_file)
    storage = image.preallocation
    if file.size < image.size:
        # METADATA is about the tables of this image, and the file has none.
        storage = Preallocation.OFF if storage is Preallocation.METADATA else storage
        await file.truncate(image.size, preallocation=storage)
    await file.flush()


async def _make_room(file: Node, image: NewImage, layout: _Layout) -> None:
    """Have the file end where the image does; all tables are zeroes."""
    tables_end = min(layout.end, layout.data << image.cluster_bits)
    # What cannot be emptied, as a block device, may hold anything.
    stale = min(file.size, tables_end)
    if file.size < layout.end:
        storage = image.preallocation
        if storage is Preallocation.METADATA or image.data_file is not None:
            storage = Preallocation.OFF
        try:
            await file.truncate(layout.end, preallocation=storage)
        except RequestError as error:
            if image.preallocation is Preallocation.OFF or error.errno == errno.EFBIG:
                raise
            raise OptionError(f"Could not resize image: {error}") from None
    if stale:
        await file.write_zeroes(0, stale)


async def _write_tables(file: Node, image: NewImage, header: Header, layout: _Layout) -> None:
    bits = image.cluster_bits
    blocks = range(layout.refcount_blocks << bits, layout.l1 << bits, 1 << bits)
    await _write_pieces(file, layout.refcount_table << bits, (pack_table(array("Q", blocks)),))
    counted = refcount_blocks(layout.clusters, image.refcount_order, image.cluster_size)
    await _write_pieces(file, layout.refcount_blocks << bits, counted)
    if image.preallocation is Preallocation.OFF or not image.l2_tables:
        return
    data = layout.data << bits if image.data_file is None else 0
    tables = l2_tables(header, data, divide_up(image.size, image.cluster_size))
    await _write_pieces(file, layout.l2 << bits, tables)
    l2_offsets = range(layout.l2 << bits | COPIED, layout.data << bits | COPIED, 1 << bits)
    await _write_pieces(file, layout.l1 << bits, (pack_table(array("Q", l2_offsets)),))


async def _write_pieces(file: Node, offset: int, pieces: Iterable[bytes]) -> None:
    """Write `pieces` one behind the other, several small ones at once."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        if len(waiting) >= _PIECE:
            await file.write(offset, waiting)
            offset += len(waiting)
            waiting = bytearray()
    if waiting:
        await file.write(offset, waiting)


def l2_tables(header: Header, data_offset: int, clusters: int) -> Iterator[bytes]:
    """The L2 tables that map `clusters` guest clusters from the start of a table to as many host
    clusters from `data_offset` on. With extended L2 entries the subclusters stay unallocated."""
    bits = header.cluster_bits
    per_table = 1 << header.l2_bits
    step = header.l2_entry_size // 8
    for first in range(0, clusters, per_table):
        count = min(per_table, clusters - first)
        start = data_offset + (first << bits) | COPIED
        table = array("Q", bytes(header.cluster_size))
        table[: count * step : step] = array("Q", range(start, start + (count << bits), 1 << bits))
        yield pack_table(table)


def refcount_blocks(clusters: int, refcount_order: int, cluster_size: int) -> Iterator[bytes]:
    """Refcount blocks in which the first `clusters` have one reference each."""
    per_block = cluster_size * 8 >> refcount_order
    bits = 1 << refcount_order
    if bits < 8:
        # Entries fill a byte from its lowest bit up.
        ones, per_byte = (0xFF, 0x55, 0x11)[refcount_order], 8 // bits
    else:
        ones, per_byte = 0, 1
    for first in range(0, clusters, per_block):
        count = min(per_block, clusters - first)
        if ones:
            whole, rest = divmod(count, per_byte)
            block = bytes((ones,)) * whole + bytes((ones & (1 << rest * bits) - 1,) if rest else ())
        else:
            block = (1).to_bytes(bits // 8, "big") * count
        yield block + bytes(cluster_size - len(block))
