"""Making a version 2 image of a version 3 one.

Version 2 has no zero clusters. What they say is said by unallocated clusters where no backing file
would show through them, else by clusters full of zeroes; in the tables of snapshots, too. All tables
that change are written anew and take effect together with the version: see rewriting.py.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

from drivers.errors import OptionError
from drivers.format.qcow2.bitmaps import StoredBitmaps
from drivers.format.qcow2.header import V2_LENGTH, CompressionType, Incompatible
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from drivers.format.qcow2.refcounts import pack_table
from drivers.format.qcow2.rewriting import Rewrite, rewriting
from drivers.format.qcow2.sharing import read_table, used
from drivers.format.qcow2.snapshots import Qcow2Snapshots
from drivers.format.qcow2.writing import Writer

_ZEROES = bytes(1 << 20)
# The header's fields, as far as version 2 has less to say.
_VERSION_2: dict[str, Any] = {
    "version": 2,
    "header_length": V2_LENGTH,
    "unknown_fields": b"",
    "incompatible": 0,
    "compatible": 0,
    "autoclear": 0,
    "compression_type": CompressionType.ZLIB,
}


def check_downgrade(image: Image, refcount_order: int) -> None:
    """Raises OptionError where version 2 cannot say what the header says."""
    header = image.header
    if refcount_order != 4:
        raise OptionError("compat=0.10 requires refcount_bits=16")
    if header.has_data_file:
        raise OptionError("Cannot downgrade an image with a data file")
    if other := header.incompatible & ~(Incompatible.DIRTY | Incompatible.COMPRESSION):
        raise OptionError(f"Cannot downgrade an image with incompatible features {other:#x} set")


class Downgrade:
    """Of an open image; nothing else is in flight."""

    def __init__(
        self,
        image: Image,
        snapshots: Qcow2Snapshots,
        bitmaps: StoredBitmaps,
        writer: Writer,
        progress: Callable[[float], object],
    ) -> None:
        self._image = image
        self._snapshots = snapshots
        self._bitmaps = bitmaps
        self._writer = writer
        self._progress = progress
        # How many L1 tables lead to each L2 table that has zero clusters, by its offset.
        self._uses: Counter[int] = Counter()
        # Entries of all L1 tables, and how many of them are done.
        self._entries = self._done = 0
        # Where those are that were written anew.
        self._moved: dict[int, int] = {}

    async def run(self) -> None:
        """Raises OptionError where the snapshots or compressed clusters are in the way."""
        image = self._image
        if self._snapshots.sizes() - {image.size}:
            raise OptionError("Internal snapshots prevent downgrade of image")
        was_lazy = image.metadata.lazy
        await image.metadata.finish()
        image.metadata.lazy = False
        try:
            await self._survey()
            if self._uses or image.header.bitmaps is not None:
                await self._rewrite()
            else:
                await image.file.switch_header(**_VERSION_2)
        except BaseException:
            image.metadata.lazy = was_lazy
            raise
        self._bitmaps.forget_all()
        image.mapping.follow_version()

    async def _rewrite(self) -> None:
        async with rewriting(self._image) as rewrite:
            fields = _VERSION_2 | await self._bitmaps.release_all(rewrite)
            await self._snapshots.transform(rewrite, lambda l1: self._expand(rewrite, l1), **fields)

    async def _survey(self) -> None:
        """Look at all tables before anything is changed."""
        image = self._image
        zlib = image.header.compression_type == CompressionType.ZLIB
        total = len(self._snapshots.list()) + 1
        for number in range(total):
            own = number == total - 1
            l1 = image.mapping.l1 if own else await self._snapshots.l1_table(number)
            for index, l1_entry in used(l1):
                entries = await read_table(image, index, l1_entry)
                compressed = [bool(entry & COMPRESSED) for entry in entries]
                if not zlib and any(compressed):
                    raise OptionError(
                        "Cannot downgrade an image with zstd compression type and existing "
                        "compressed clusters"
                    )
                if any(entry & ZERO and not entry & COMPRESSED for entry in entries):
                    self._uses[l1_entry & OFFSET_MASK] += 1
            self._entries += len(l1)

    async def _expand(self, rewrite: Rewrite, l1: array[int]) -> array[int]:
        """An L1 table like `l1` that leads to no zero cluster."""
        image = self._image
        own = l1 is image.mapping.l1
        out = l1[:]
        for index, entry in enumerate(l1):
            self._done += 1
            self._progress(self._done / self._entries)
            offset = entry & OFFSET_MASK
            uses = self._uses.get(offset)
            if not uses:
                continue
            if offset not in self._moved:
                entries = await read_table(image, index, entry)
                await self._expand_table(rewrite, index << image.mapping.l2_bits, entries, uses)
                self._moved[offset] = new = await rewrite.write(pack_table(entries))
                await image.refcounts.add(new >> image.file.cluster_bits, 1, uses - 1)
            await rewrite.release(offset)
            out[index] = self._moved[offset] | (COPIED if own and uses == 1 else 0)
        return out

    async def _expand_table(self, rewrite: Rewrite, first: int, entries: array[int], uses: int) -> None:
        """Change the entries of an L2 table to which `uses` L1 tables lead; it begins with the guest
        cluster `first`."""
        bits = self._image.file.cluster_bits
        for at, entry in enumerate(entries):
            if entry & COMPRESSED or not entry & ZERO:
                continue
            host = entry & OFFSET_MASK
            guest = (first + at) << bits
            # Only where none but this table leads there may the cluster be written to.
            own = bool(host) and await self._image.refcounts.get(host >> bits) == uses
            if host and not own:
                for _ in range(uses):
                    await rewrite.release(host)
            if not own and self._shows_zeroes(guest):
                entries[at] = 0
                continue
            if not own:
                host = (await self._image.refcounts.allocate(1)).offset
                await self._image.refcounts.add(host >> bits, 1, uses - 1)
            await self._write_zeroes(host, guest)
            entries[at] = host | (COPIED if uses == 1 else 0)

    def _shows_zeroes(self, guest: int) -> bool:
        """Whether a cluster there reads as zeroes while it is not allocated."""
        image = self._image
        if image.header.backing_name is None:
            return True
        return image.backing is not None and image.backing.size <= guest

    async def _write_zeroes(self, host: int, guest: int) -> None:
        image, size = self._image, self._image.file.cluster_size
        if image.crypt is None and image.file.node.grow(host + size):
            await image.file.node.write_zeroes(host, size)
            return
        for done in range(0, size, len(_ZEROES)):
            part = memoryview(_ZEROES)[: size - done]
            await self._writer.put(host + done, guest + done, part)
