"""Persistent dirty bitmaps: loaded at the opening, stored at the close.

See QEMU's docs/interop/qcow2.txt, "Bitmaps". Before the first write to the image those in the file are
marked in use, since they stop telling the truth then; one that is found so is inconsistent. What is
stored goes to new clusters, which the header leads to when all of it is durable; then the old ones are
freed.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import replace
from typing import Any

import trio

from drivers.block.dirty import MAX_GRANULARITY, MIN_GRANULARITY, DirtyBitmap
from drivers.block.node import Node
from drivers.errors import ImageError, OptionError
from drivers.format.qcow2.directory import BitmapEntry, BitmapFlags, parse_bitmap_directory
from drivers.format.qcow2.header import KNOWN_AUTOCLEAR, Autoclear, BitmapsExtension
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.layout import (
    BITMAP_TABLE_RESERVED,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAP_NAME,
    MAX_BITMAP_TABLE_BYTES,
    MAX_BITMAPS,
    OFFSET_MASK,
)
from drivers.format.qcow2.refcounts import Run, pack_table, unpack_table
from drivers.format.qcow2.rewriting import Rewrite

# All bitmaps of an image together take up so many bytes of memory at most.
MAX_LOADED_BYTES = 1 << 30
_ALL_ONES = 1


class StoredBitmaps:
    """Those of `image`, which `node` shows: `node.bitmaps` has them while the image is open."""

    def __init__(self, node: Node, image: Image) -> None:
        self._node = node
        self._image = image
        self._entries: dict[str, BitmapEntry] = {}
        # What the file has of each: a digest of its bits.
        self._digests: dict[str, bytes] = {}

    # --- loading ----------------------------------------------------------------------------

    async def load(self) -> None:
        """Raises ImageError."""
        file, header = self._image.file, self._image.header
        extension = header.bitmaps
        if extension is None:
            return
        data = await self._read(extension.directory_offset, extension.directory_size, "Bitmap directory")
        total = 0
        for entry in parse_bitmap_directory(data, header):
            total += (self._image.size >> entry.granularity_bits) // 8 + 1
            if total > MAX_LOADED_BYTES:
                raise ImageError("the bitmaps of the image are too large together")
            await self._load(entry)
        file.claim(extension.directory_offset, extension.directory_size, "bitmap-directory")

    async def _load(self, entry: BitmapEntry) -> None:
        try:
            bitmap = DirtyBitmap(entry.name, self._image.size, 1 << entry.granularity_bits)
        except OptionError as error:
            raise ImageError(str(error)) from None
        bitmap.persistent = True
        bitmap.enabled = bool(entry.flags & BitmapFlags.AUTO)
        unknown = bool(entry.extra) and not entry.flags & BitmapFlags.EXTRA_DATA_COMPATIBLE
        bitmap.inconsistent = unknown or bool(entry.flags & BitmapFlags.IN_USE)
        if not bitmap.inconsistent:
            await self._load_bits(entry, bitmap)
            if not self._node.flags.read_only:
                self._digests[entry.name] = _digest(bitmap)
        self._entries[entry.name] = entry
        self._node.track(bitmap)

    async def _load_bits(self, entry: BitmapEntry, bitmap: DirtyBitmap) -> None:
        size = self._image.file.cluster_size
        if entry.table_size != -(-bitmap.byte_count // size):
            raise ImageError(f"Bitmap '{entry.name}': its table has not the size that the disk asks for")
        for index, value in enumerate(await self._read_table(entry)):
            at = index * size
            offset = value & OFFSET_MASK
            if value & BITMAP_TABLE_RESERVED or offset % size or (offset and value & _ALL_ONES):
                raise ImageError(f"Bitmap '{entry.name}': invalid entry {value:#x} in its table")
            length = min(size, bitmap.byte_count - at)
            if offset:
                bitmap.bits[at : at + length] = await self._image.file.read(offset, length)
            elif value & _ALL_ONES:
                bitmap.bits[at : at + length] = b"\xff" * length
        if (rest := bitmap.bit_count & 7) and not bitmap.untouched:
            bitmap.bits[-1] &= (1 << rest) - 1

    async def _read_table(self, entry: BitmapEntry) -> array[int]:
        where = f"Bitmap '{entry.name}': bitmap table"
        return unpack_table(await self._read(entry.table_offset, entry.table_size * 8, where))

    async def _read(self, offset: int, length: int, name: str) -> bytes:
        file = self._image.file
        if offset + length > file.node.size + file.cluster_size:
            raise ImageError(f"{name} lies behind the end of the file")
        return bytes(await file.read(offset, length))

    # --- before the first write -------------------------------------------------------------

    @property
    def to_prepare(self) -> bool:
        """Whether prepare() has something to do."""
        return bool(self._digests) or bool(self._image.header.autoclear & ~KNOWN_AUTOCLEAR)

    async def prepare(self) -> None:
        """The image is going to be changed: what does not know of it is told so. Durable on return."""
        file = self._image.file
        await self.clear_unknown()
        entries = {
            name: replace(entry, flags=entry.flags | BitmapFlags.IN_USE) if name in self._digests else entry
            for name, entry in self._entries.items()
        }
        if entries != self._entries:
            assert file.header.bitmaps is not None
            await file.write(file.header.bitmaps.directory_offset, _build(entries))
            await file.flush()
            self._entries = entries

    async def clear_unknown(self) -> None:
        """Drop the autoclear bits that ask for what is not known here."""
        file = self._image.file
        if file.header.autoclear & ~KNOWN_AUTOCLEAR:
            await file.update_header(autoclear=file.header.autoclear & KNOWN_AUTOCLEAR)
            await file.flush()

    # --- adding and removing ----------------------------------------------------------------

    def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """A new bitmap; it is stored at the close. Raises OptionError."""
        node, image = self._node, self._image
        if not name:
            raise OptionError("Bitmap name cannot be empty")
        if granularity is None:
            granularity = max(4096, min(image.file.cluster_size, 64 << 10))
        elif not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY or granularity & (granularity - 1):
            raise OptionError(f"Granularity must be power of 2 and at least {MIN_GRANULARITY}")
        if name in node.bitmaps:
            raise OptionError(f"Bitmap already exists: {name}")
        reason = self._refusal(name, granularity)
        if reason is not None:
            raise OptionError(f"Can't make bitmap '{name}' persistent in '{node.name}': {reason}")
        bitmap = DirtyBitmap(name, image.size, granularity)
        bitmap.persistent = True
        bitmap.enabled = enabled
        node.track(bitmap)

    def _refusal(self, name: str, granularity: int) -> str | None:
        """What speaks against storing such a bitmap."""
        image = self._image
        if image.header.version < 3:
            return "Cannot store dirty bitmaps in qcow2 v2 files"
        if len(name.encode(errors="surrogateescape")) > MAX_BITMAP_NAME:
            return f"Name length exceeds maximum ({MAX_BITMAP_NAME} characters)"
        clusters = (image.size // granularity // 8) // image.file.cluster_size + 1
        if clusters * 8 > MAX_BITMAP_TABLE_BYTES:
            return "Too much space will be occupied by the bitmap. Use larger granularity"
        others = [bitmap.name for bitmap in self._node.bitmaps.values() if bitmap.persistent]
        if len(others) >= MAX_BITMAPS:
            return "Maximum number of persistent bitmaps is already reached"
        # More than an entry takes up without extra data.
        lengths = [32 + len(other.encode(errors="surrogateescape")) for other in (*others, name)]
        if sum(lengths) > MAX_BITMAP_DIRECTORY_BYTES:
            return "Not enough space in the bitmap directory"
        try:
            replace(image.header, bitmaps=BitmapsExtension(1, 1, 0)).build()
        except ImageError as error:
            return str(error)
        return None

    async def remove(self, name: str) -> None:
        """It is gone from the file on return. Raises OptionError."""
        bitmap = self._node.bitmaps.get(name)
        if bitmap is None:
            raise OptionError(f"Dirty bitmap '{name}' not found")
        if bitmap.busy:
            raise OptionError(f"Bitmap '{name}' is currently in use by another operation and cannot be used")
        if name in self._entries:
            with trio.CancelScope(shield=True):
                await self.clear_unknown()
                rest = {key: entry for key, entry in self._entries.items() if key != name}
                await self._replace(rest, [], [self._entries[name]])
            self._digests.pop(name, None)
        self._node.untrack(name)

    async def release_all(self, rewrite: Rewrite) -> dict[str, Any]:
        """Give up what all of them take up in the file; the header's fields without them."""
        extension = self._image.header.bitmaps
        if extension is not None:
            for entry in self._entries.values():
                for piece in await self._clusters(entry):
                    await rewrite.release(*piece)
            await rewrite.release(extension.directory_offset, extension.directory_size)
        return {"bitmaps": None}

    def forget_all(self) -> None:
        """The file has none of them any more."""
        for bitmap in list(self._node.bitmaps.values()):
            if bitmap.persistent:
                self._node.untrack(bitmap.name)
        self._entries.clear()
        self._digests.clear()

    # --- storing ----------------------------------------------------------------------------

    async def store(self) -> None:
        """Bring the file up to date; nothing is written if it is already. No request is in flight."""
        changed = [bitmap for bitmap in self._node.bitmaps.values() if self._changed(bitmap)]
        if not changed:
            return
        await self.clear_unknown()
        entries = dict(self._entries)
        runs: list[Run] = []
        try:
            for bitmap in changed:
                entries[bitmap.name] = await self._store(bitmap, runs)
        except BaseException:
            await self._give_back(runs)
            raise
        old = [self._entries[bitmap.name] for bitmap in changed if bitmap.name in self._entries]
        await self._replace(entries, runs, old)
        self._digests |= {bitmap.name: _digest(bitmap) for bitmap in changed}

    def _changed(self, bitmap: DirtyBitmap) -> bool:
        """Whether the file has something else of it."""
        if not bitmap.persistent or bitmap.inconsistent:
            return False
        entry = self._entries.get(bitmap.name)
        if entry is None or entry.flags & BitmapFlags.IN_USE:
            return True
        auto = bool(entry.flags & BitmapFlags.AUTO)
        return auto is not bitmap.enabled or self._digests[bitmap.name] != _digest(bitmap)

    async def _store(self, bitmap: DirtyBitmap, runs: list[Run]) -> BitmapEntry:
        """Write a bitmap into clusters that are added to `runs`."""
        size = self._image.file.cluster_size
        table = array("Q")
        zeroes, ones = bytes(size), b"\xff" * size
        for at in range(0, bitmap.byte_count, size):
            part = b"" if bitmap.untouched else bytes(bitmap.bits[at : at + size])
            if part == zeroes[: len(part)]:
                table.append(0)
            elif part == ones:
                table.append(_ALL_ONES)
            else:
                table.append((await self._write(part, runs)).offset)
        if not table:  # of an empty disk
            table.append(0)
        run = await self._write(pack_table(table), runs)
        before = self._entries.get(bitmap.name)
        kept = before.flags & BitmapFlags.EXTRA_DATA_COMPATIBLE if before else 0
        return BitmapEntry(
            table_offset=run.offset,
            table_size=len(table),
            flags=kept | (BitmapFlags.AUTO if bitmap.enabled else 0),
            granularity_bits=bitmap.shift,
            name=bitmap.name,
            extra=before.extra if before else b"",
        )

    async def _write(self, data: bytes, runs: list[Run]) -> Run:
        image, size = self._image, self._image.file.cluster_size
        run = await image.refcounts.allocate(-(-len(data) // size))
        runs.append(run)
        await image.file.write(run.offset, data + bytes(-len(data) % size))
        return run

    async def _replace(
        self, entries: dict[str, BitmapEntry], runs: list[Run], old: list[BitmapEntry]
    ) -> None:
        """Let the header lead to a new directory of `entries`; free what `old` ones have. Nothing has
        changed where that fails; `runs` are given back then."""
        image, file = self._image, self._image.file
        freed = [piece for entry in old for piece in await self._clusters(entry)]
        if file.header.bitmaps is not None:
            before = file.header.bitmaps
            freed.append((before.directory_offset, before.directory_size))
        try:
            changes = await self._write_directory(entries, runs)
            await image.metadata.flush(refcounts=True)
        except BaseException:
            await self._give_back(runs)
            raise
        await file.update_header(**changes)
        await file.flush()
        self._entries = entries
        for offset, length in freed:
            file.release(offset, length)
            image.metadata.free(offset, -(-length // file.cluster_size), "other")
        extension = file.header.bitmaps
        if extension is not None:
            file.claim(extension.directory_offset, extension.directory_size, "bitmap-directory")
        await image.metadata.commit()

    async def _give_back(self, runs: list[Run]) -> None:
        for run in runs:
            await self._image.refcounts.give_back(run)

    async def _write_directory(self, entries: dict[str, BitmapEntry], runs: list[Run]) -> dict[str, Any]:
        """The header's fields that lead to the new directory."""
        autoclear = self._image.header.autoclear
        if not entries:
            return {"bitmaps": None, "autoclear": autoclear & ~Autoclear.BITMAPS}
        directory = _build(entries)
        run = await self._write(directory, runs)
        extension = BitmapsExtension(len(entries), len(directory), run.offset)
        return {"bitmaps": extension, "autoclear": autoclear | Autoclear.BITMAPS}

    async def _clusters(self, entry: BitmapEntry) -> list[tuple[int, int]]:
        """(offset, length) of what a bitmap takes up in the file."""
        found = [(entry.table_offset, entry.table_size * 8)]
        found += [(value & OFFSET_MASK, 1) for value in await self._read_table(entry) if value & OFFSET_MASK]
        return found


def _build(entries: dict[str, BitmapEntry]) -> bytes:
    return b"".join(entry.build() for entry in entries.values())


def _digest(bitmap: DirtyBitmap) -> bytes:
    return b"" if bitmap.untouched else hashlib.blake2b(bitmap.bits, digest_size=16).digest()
