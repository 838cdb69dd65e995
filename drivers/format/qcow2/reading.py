"""Reading: from the image's clusters, compressed ones included, and from the backing file."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import trio

from drivers.block.extents import Extent, ExtentFlags, Span
from drivers.block.inline import read_now
from drivers.block.node import MAX_EXTENTS, Node
from drivers.crypto.cipher import in_turns
from drivers.format.qcow2.compress import decompress
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import COMPRESSED, OFFSET_MASK, ZERO, compressed_range
from drivers.format.qcow2.mapping import DATA, DEFLATED, HOLE, INVALID, RESERVED, RESERVED_ZERO, Piece

# Pieces that are read side by side, and that a request is cut into at a time.
MAX_PIECES = 256
# Decompressed clusters that are kept, for readers with requests smaller than a cluster.
KEPT_CLUSTERS = 4
# Compressed clusters that one thread deals with at a time, since handing them over takes its time, too.
MAX_PACKED = 8


class Packed(NamedTuple):
    """`part` takes the guest's bytes from `offset` on, of the cluster behind the descriptor `entry`."""

    entry: int
    offset: int
    part: memoryview


class Reader:
    def __init__(self, image: Image) -> None:
        self._image = image
        self._mapping = image.mapping
        self._data_plain = image.data.plain
        self._bits = image.mapping.cluster_bits
        self._mask = image.mapping.cluster_size - 1
        self._slice_bits, self._slice_mask = image.mapping.slice_bits, image.mapping.slice_mask
        # Found out when block status is first asked for.
        self._sparse: bool | None = None
        self._inflated: dict[int, bytes] = {}
        # Counts how often compressed data were freed or written: what is read meanwhile is not kept.
        self._generation = 0
        image.on_changed_compressed = self._forget_inflated

    # --- where the bytes lie plain ----------------------------------------------------------

    def plain(self, offset: int, length: int) -> Sequence[Span] | None:
        """See Node.plain()."""
        image, mapping = self._image, self._mapping
        if image.crypt is not None:
            return None
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        index = first >> self._slice_bits
        found = mapping.slices.get(index) or mapping.slice_now(index)
        if found is not None and not mapping.extended:
            # Most requests lie in one cluster, or in neighbours that are neighbours in the file too.
            found.used = True
            at = first & self._slice_mask
            entry = found.entries[at]
            host = entry & OFFSET_MASK
            if (
                host
                and not entry & (COMPRESSED | ZERO | self._mask & OFFSET_MASK)
                and (first == last or self._in_a_row(found.entries, at, last - first + 1))
            ):
                host += offset & self._mask
                if host + length <= image.data.size:
                    return self._data_plain(host, length)
            backing = image.backing
            if (
                not entry
                and backing is not None
                and (first == last or not any(found.entries[at : at + last - first + 1]))
                and last >> self._slice_bits == index
                and offset + length <= backing.size
            ):
                return backing.plain(offset, length)
        pieces: list[Piece] = []
        if mapping.pieces(offset, offset + length, pieces) != offset + length:
            return None
        return self._spans(offset, pieces)

    def _in_a_row(self, entries: array[int], at: int, count: int) -> bool:
        """Whether `count` L2 entries from `at` on lead to neighbours in the file."""
        first, step = entries[at], self._mask + 1
        return entries[at : at + count] == array("Q", range(first, first + count * step, step))

    def _spans(self, offset: int, pieces: list[Piece]) -> list[Span] | None:
        image = self._image
        spans: list[Span] = []
        for kind, host, length in pieces:
            if kind == DATA:
                if host + length > image.data.size:
                    return None
                below = self._data_plain(host, length)
                if below is None:
                    return None
                spans.extend(below)
            elif kind in (DEFLATED, INVALID):
                return None
            elif kind in (HOLE, RESERVED) and (reach := image.backing_length(offset, length)):
                assert image.backing is not None
                below = image.backing.plain(offset, reach)
                if below is None:
                    return None
                spans.extend(below)
                if reach < length:
                    spans.append((-1, 0, length - reach))
            else:
                spans.append((-1, 0, length))
            offset += length
        return spans

    # --- reading ----------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            pieces = await self._mapping.describe(offset + done, offset + len(buffer), most=MAX_PIECES)
            jobs: list[Callable[[], Awaitable[None]]] = []
            packed: list[Packed] = []
            for piece in pieces:
                part = buffer[done : done + piece.length]
                if piece.kind == DEFLATED:
                    packed.append(Packed(piece.host, offset + done, part))
                elif not self._read_now(piece, offset + done, part):
                    jobs.append(self._job(piece, offset + done, part))
                done += piece.length
            jobs += [
                partial(self._read_compressed, packed[at : at + MAX_PACKED])
                for at in range(0, len(packed), MAX_PACKED)
            ]
            if jobs:
                await together(jobs)

    def _read_now(self, piece: Piece, offset: int, part: memoryview) -> bool:
        """Fill `part` if that needs no waiting."""
        image = self._image
        if piece.kind == DATA:
            inside = piece.host + len(part) <= image.data.size
            return image.crypt is None and inside and read_now(image.data, piece.host, part)
        if piece.kind in (HOLE, RESERVED) and (reach := image.backing_length(offset, len(part))):
            assert image.backing is not None
            if not read_now(image.backing, offset, part[:reach]):
                return False
            part[reach:] = bytes(len(part) - reach)
            return True
        part[:] = bytes(len(part))
        return True

    def _job(self, piece: Piece, offset: int, part: memoryview) -> Callable[[], Awaitable[None]]:
        if piece.kind == DATA:
            return lambda: self._read_data(piece.host, offset, part)
        return lambda: self._read_backing(offset, part)

    async def _read_data(self, host: int, offset: int, part: memoryview) -> None:
        image = self._image
        await read_padded(image.data, host, part)
        if image.crypt is not None:
            crypt, sector = image.crypt, image.crypt_sector(host, offset)
            await in_turns(crypt.decrypt, sector, part)

    async def _read_backing(self, offset: int, part: memoryview) -> None:
        image = self._image
        reach = image.backing_length(offset, len(part))
        if reach:
            assert image.backing is not None
            await image.backing.read_into(offset, part[:reach])
        part[reach:] = bytes(len(part) - reach)

    async def _read_compressed(self, group: list[Packed]) -> None:
        if len(group) == 1:
            entry, offset, part = group[0]
            inside = offset & self._mask
            part[:] = (await self.inflate(entry))[inside : inside + len(part)]
            return
        # Whoever reads so much in one go does not come back for the rest: nothing is kept.
        image = self._image
        found = [await image.file.read(*compressed_range(entry, self._bits)) for entry, _, _ in group]
        kind, size = image.header.compression_type, self._mask + 1

        def fill() -> None:
            for (_, offset, part), data in zip(group, found, strict=True):
                inside = offset & self._mask
                part[:] = decompress(data, size, kind)[inside : inside + len(part)]

        await trio.to_thread.run_sync(fill, limiter=image.threads)

    async def inflate(self, entry: int) -> bytes:
        """The cluster behind the compressed descriptor `entry`."""
        whole = self._inflated.get(entry)
        if whole is None:
            image, generation = self._image, self._generation
            host, length = compressed_range(entry, self._bits)
            data = await image.file.read(host, length)
            kind, size = image.header.compression_type, self._mask + 1
            whole = await trio.to_thread.run_sync(decompress, data, size, kind, limiter=image.threads)
            if generation == self._generation:
                while len(self._inflated) >= KEPT_CLUSTERS:
                    del self._inflated[next(iter(self._inflated))]
                self._inflated[entry] = whole
        return whole

    def _forget_inflated(self) -> None:
        self._generation += 1
        self._inflated.clear()

    # --- block status -----------------------------------------------------------------------

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        image = self._image
        extents: list[Extent] = []
        for piece in await self._mapping.describe(offset, offset + length, most=MAX_EXTENTS // 2):
            if len(extents) >= MAX_EXTENTS:
                break
            if piece.kind in (HOLE, RESERVED):
                complete = await self._status_below(offset, piece.length, extents)
                if not complete:
                    break
            elif piece.kind == DATA and image.crypt is not None:
                extents.append(Extent(piece.length, ExtentFlags.DATA))
            elif piece.kind == DATA and await self._is_sparse():
                if not await self._status_in_file(piece, extents):
                    break
            elif piece.kind == DATA:
                extents.append(Extent(piece.length, ExtentFlags.DATA, host_offset=piece.host))
            elif piece.kind == DEFLATED:
                extents.append(Extent(piece.length, ExtentFlags.DATA | ExtentFlags.COMPRESSED))
            else:
                host = piece.host if piece.kind == RESERVED_ZERO and image.crypt is None else None
                extents.append(Extent(piece.length, ExtentFlags.ZERO, host_offset=host))
            offset += piece.length
        return extents

    async def _is_sparse(self) -> bool:
        """Whether more clusters are in use than the file has storage for: then data may be holes of
        the file, because they were preallocated."""
        if self._sparse is None:
            node, size = self._image.file.node, self._mask + 1
            allocated = await node.allocated_size()
            self._sparse = False
            if allocated is not None:
                stored = allocated // size
                many = max(stored * 10 // 9, stored + 2)
                self._sparse = node.size // size >= many and await self._image.refcounts.in_use(many)
        return self._sparse

    async def _status_in_file(self, piece: Piece, out: list[Extent]) -> bool:
        """Append a piece of data, with what the file says reads as zeroes; False if it told only a
        part of it."""
        node = self._image.data
        host, end = piece.host, piece.host + piece.length
        file_end = min(end, node.size)
        while host < file_end and len(out) < MAX_EXTENTS:
            for extent in await node.block_status(host, file_end - host):
                zero = extent.flags & ExtentFlags.ZERO
                out.append(Extent(extent.length, ExtentFlags.DATA | zero, host_offset=host))
                host += extent.length
        if host < file_end:
            return False
        if host < end:
            out.append(Extent(end - host, ExtentFlags.DATA | ExtentFlags.ZERO, host_offset=host))
        return True

    async def _status_below(self, offset: int, length: int, out: list[Extent]) -> bool:
        """Append what the backing file has there; False if it told only a part of it."""
        image = self._image
        reach = image.backing_length(offset, length)
        done = 0
        while done < reach and len(out) < MAX_EXTENTS:
            assert image.backing is not None
            for extent in await image.backing.block_status(offset + done, reach - done):
                depth = extent.depth + 1 if extent.depth else 0
                short = extent.short + 1 if extent.short else 0
                out.append(extent._replace(depth=depth, short=short))
                done += extent.length
        if done < reach:
            return False
        if reach < length:
            out.append(Extent(length - reach, ExtentFlags.ZERO, 0, short=0 if image.backing is None else 2))
        return True


async def read_padded(node: Node, offset: int, buffer: memoryview) -> None:
    """Fill `buffer`; what lies behind the node's end reads as zeroes."""
    inside = min(len(buffer), max(0, node.size - offset))
    if inside:
        await node.read_into(offset, buffer[:inside])
    buffer[inside:] = bytes(len(buffer) - inside)


async def together(jobs: list[Callable[[], Awaitable[None]]]) -> None:
    """Do all `jobs` side by side. The first error is raised when all have ended."""
    if len(jobs) == 1:
        await jobs[0]()
        return
    failures: list[Exception] = []

    async def run(job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except Exception as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(run, job)
    if failures:
        raise failures[0]
