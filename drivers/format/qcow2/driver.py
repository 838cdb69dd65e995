"""The node of a qcow2 image: QEMU's native format."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from drivers.block.extents import Extent
from drivers.block.graph import OpenContext
from drivers.block.image import (
    CheckReport,
    CreateContext,
    ImageInfo,
    ImageNode,
    Measurement,
    Progress,
    Repair,
)
from drivers.block.limits import Limits
from drivers.block.node import Node, OpenFlags, Preallocation
from drivers.block.permission import ALL, Permission
from drivers.errors import ImageError, RequestError
from drivers.format.qcow2.bitmaps import StoredBitmaps
from drivers.format.qcow2.description import describe
from drivers.format.qcow2.encryption import unlock
from drivers.format.qcow2.header import CryptMethod, Header, Incompatible
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.imagefile import ImageFile
from drivers.format.qcow2.inline import InlineWriter
from drivers.format.qcow2.new import AMEND_OPTIONS, CREATE_OPTIONS
from drivers.format.qcow2.opening import open_backing, open_data_file, read_header, read_tables
from drivers.format.qcow2.options import take_options
from drivers.format.qcow2.preallocating import preallocate
from drivers.format.qcow2.reading import Reader
from drivers.format.qcow2.resizing import resize
from drivers.format.qcow2.snapshots import Qcow2Snapshots, read_snapshots
from drivers.format.qcow2.unmapping import Unmapper
from drivers.format.qcow2.writing import Writer
from drivers.objects.store import ObjectStore
from drivers.options.schema import Options


class Qcow2Node(ImageNode):
    """`image` does the work; here it meets the block layer."""

    driver_name = "qcow2"
    create_options = CREATE_OPTIONS
    amend_options = AMEND_OPTIONS

    snapshots: Qcow2Snapshots

    def __init__(self, image: Image, objects: ObjectStore, *, flags: OpenFlags, name: str = "") -> None:
        """`objects` has the secrets that amend() is told of."""
        header = image.header
        limits = Limits(
            request_alignment=512 if header.crypt_method != CryptMethod.NONE else 1,
            preferred_block=max(4096, min(header.cluster_size, 64 << 10)),
        )
        super().__init__(flags=flags, size=header.size, limits=limits, name=name)
        self.image = image
        self.objects = objects
        # The requests that the image must know of are the node's.
        image.metadata.watch(self.requests)
        self.backing: Node | None = None
        self._reader = Reader(image)
        self.writer = Writer(image, self._reader)
        self._inline = InlineWriter(image)
        self.stored_bitmaps = StoredBitmaps(self, image)
        self._unmapper = Unmapper(image, self.writer)
        # One call less for every request of the hot path.
        if not image.locked:
            self._plain = self._reader.plain  # type: ignore[method-assign]
            self._plain_write = self._inline.plain_write  # type: ignore[method-assign]

    # --- opening ----------------------------------------------------------------------------

    @classmethod
    async def open(cls, context: OpenContext, options: Options, /) -> Qcow2Node:
        file_node = await context.child(options)
        flags = context.flags
        if file_node.flags.read_only and flags.auto_read_only:
            flags = replace(flags, read_only=True)
        header = await read_header(file_node, for_check=flags.for_check)
        if header.incompatible & Incompatible.CORRUPT and not flags.read_only and not flags.for_check:
            raise ImageError("qcow2: Image is corrupt; cannot be opened read/write")
        settings = take_options(options, header, flags)
        file = ImageFile(
            file_node,
            header,
            checks=settings.overlap_checks if not flags.read_only else frozenset(),
            on_corruption=lambda reason: context.graph.tell(f"qcow2: {reason}"),
        )
        l1, refcount_table = await read_tables(file)
        snapshots = ([], 0) if flags.for_check else await read_snapshots(file)
        data = await open_data_file(context, options, header)
        backing = await open_backing(context, options, header)
        image = Image(file, data or file_node, settings, l1=l1, refcount_table=refcount_table)
        await unlock(image, options, context.graph.objects, flags)
        node = cls(image, context.graph.objects, flags=flags, name=context.name)
        node.snapshots = Qcow2Snapshots(node, image, *snapshots)
        await node.use("file", file_node)
        if header.incompatible & Incompatible.DIRTY and not flags.read_only and not flags.for_check:
            await node._repair_dirty()
        else:
            await node.snapshots.claim()
        await node._load_bitmaps(context.graph.tell)
        if data is not None:
            await node.use("data-file", data)
        if backing is not None:
            await node.use("backing", backing)
            image.backing = node.backing = backing
        return node

    async def _repair_dirty(self) -> None:
        """Whoever wrote last with lazy refcounts did not come to an end: count anew."""
        try:
            report = await self.check(Repair.ALL)
        except OSError as error:
            raise ImageError(f"qcow2: Could not repair dirty image: {error.strerror}") from None
        if report.check_errors or report.corruptions:
            raise ImageError("qcow2: Could not repair dirty image")

    def _child_permissions(
        self, role: str, needed: Permission, shared: Permission, /
    ) -> tuple[Permission, Permission]:
        shared = ALL & ~(Permission.WRITE | Permission.RESIZE)
        needed = Permission.CONSISTENT_READ
        if role != "backing" and not self.flags.read_only:
            needed |= Permission.WRITE | Permission.RESIZE
        return needed, shared

    # --- requests ---------------------------------------------------------------------------

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        self.image.check_unlocked()
        await self._reader.read_into(offset, buffer)

    def _write_now(self, offset: int, data: memoryview, /) -> bool:
        return not self.image.locked and self._inline.write_now(offset, data)

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        await self.writer.write(offset, data)

    async def _write_compressed(self, offset: int, data: memoryview, /) -> None:
        image = self.image
        if image.crypt is not None or image.external:
            raise RequestError(errno.ENOTSUP, "Compression not supported for this file format")
        if offset % image.file.cluster_size or (
            len(data) % image.file.cluster_size and offset + len(data) != self.size
        ):
            raise RequestError(errno.EINVAL, "compressed writes are of whole clusters")
        await self.writer.write_compressed(offset, data)

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        await self._unmapper.write_zeroes(offset, length, may_unmap=may_unmap)

    async def _discard(self, offset: int, length: int, /) -> None:
        await self._unmapper.discard(offset, length)

    async def _write_back(self) -> None:
        if not self.flags.read_only and not self.image.file.corrupt:
            await self.image.metadata.commit()

    async def _flush(self) -> None:
        image = self.image
        if self.flags.read_only or image.file.corrupt:
            await image.flush_data()
        else:
            await image.metadata.flush()
        image.clean_caches()

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        return await self._reader.block_status(offset, length)

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        if preallocation is not Preallocation.OFF and size < self.size:
            raise RequestError(errno.ENOTSUP, "Preallocation can't be used for shrinking an image")
        if size % 512:
            raise RequestError(errno.EINVAL, "The new size must be a multiple of 512")
        self.check_resizable()
        before = self.size
        await resize(self.image, self._unmapper, size)
        if preallocation is not Preallocation.OFF and size > before:
            await preallocate(self.image, before, size, preallocation)

    async def _close(self) -> None:
        image = self.image
        if not self.flags.read_only and not image.file.corrupt:
            try:
                await self.stored_bitmaps.store()
            finally:
                await image.metadata.finish()

    # --- snapshots --------------------------------------------------------------------------

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Inside, no request is in flight, and the image stays open."""
        async with self._reshaping, self.requests.quiesced():
            self._check_alive()
            yield

    def check_resizable(self) -> None:
        """Raises RequestError where something speaks against another size."""
        for bitmap in self.bitmaps.values():
            if bitmap.busy:
                problem = "currently in use by another operation and cannot be used"
            elif bitmap.inconsistent:
                problem = (
                    "inconsistent and cannot be used\n"
                    "Try block-dirty-bitmap-remove to delete this bitmap from disk"
                )
            else:
                continue
            raise RequestError(errno.ENOTSUP, f"Bitmap '{bitmap.name}' is {problem}")

    def became(self, size: int) -> None:
        """The disk is another one now, of `size` bytes."""
        self.size = size
        for bitmap in self.bitmaps.values():
            bitmap.resize(size)
        self._mark(0, size)

    # --- bitmaps ----------------------------------------------------------------------------

    async def _load_bitmaps(self, tell: Callable[[str], object]) -> None:
        try:
            await self.stored_bitmaps.load()
        except ImageError as error:
            if not self.flags.read_only:
                raise
            # The disk can be read without them.
            for name in list(self.bitmaps):
                self.untrack(name)
            tell(f"qcow2: the bitmaps cannot be used: {error}")
        if self.stored_bitmaps.to_prepare and not self.flags.read_only:
            self.image.metadata.before_writing = self._prepare
            self._plain_write = self._nothing_plain  # type: ignore[method-assign]

    def _nothing_plain(self, offset: int, length: int, /) -> None:
        """Stands for plain_write() as long as the file has to be told something first."""

    async def _prepare(self) -> None:
        await self.stored_bitmaps.prepare()
        self._plain_write = self._inline.plain_write  # type: ignore[method-assign]

    async def add_bitmap(self, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        self._check_changeable()
        self.stored_bitmaps.add(name, granularity, enabled=enabled)

    async def remove_bitmap(self, name: str) -> None:
        self._check_changeable()
        async with self.alone():
            await self.stored_bitmaps.remove(name)

    def _check_changeable(self) -> None:
        self._check_alive()
        if self.flags.read_only:
            raise RequestError(errno.EPERM, "the image is read-only")
        self.image.check_writable()

    # --- image tools ------------------------------------------------------------------------

    @classmethod
    async def create(cls, context: CreateContext, options: Options, /) -> None:
        from drivers.format.qcow2.create import create  # only image tools need it

        await create(context, options)

    @classmethod
    async def measure(cls, options: Options, source: Node | None, /) -> Measurement:
        from drivers.format.qcow2.measure import measure

        return await measure(options, source)

    async def info(self) -> ImageInfo:
        return describe(self.image, list(self.bitmaps.values()))

    async def check(self, repair: Repair = Repair.NONE) -> CheckReport:
        from drivers.format.qcow2.check import check

        image = self.image
        async with self.alone():
            if not self.flags.read_only and not image.file.corrupt:
                await image.metadata.finish()
            if repair is not Repair.NONE:
                await self.stored_bitmaps.clear_unknown()
            report, header = await check(image.file.node, image.header, repair)
            if repair is not Repair.NONE:
                await self._read_anew(header)
            return report

    async def _read_anew(self, header: Header) -> None:
        """The file was changed behind the tables in memory."""
        image = self.image
        image.file.header = header
        image.file.corrupt = False
        image.file.forget_owners()
        l1, refcount_table = await read_tables(image.file)
        image.mapping.read_anew(l1)
        image.refcounts.read_anew(refcount_table)
        self.snapshots = Qcow2Snapshots(self, image, *await read_snapshots(image.file))
        await self.snapshots.claim()

    async def amend(
        self, options: Options, /, *, progress: Progress | None = None, force: bool = False
    ) -> None:
        from drivers.format.qcow2.amend import amend

        self._check_changeable()
        await amend(self, options, force=force, progress=progress or (lambda part: None))

    async def change_backing(self, filename: str | None, image_format: str | None) -> None:
        self._check_changeable()
        async with self.alone():
            if self.image.header.raw_data_file and filename:
                raise RequestError(errno.EINVAL, "a raw data file cannot have a backing file")
            file = self.image.file
            try:
                await file.update_header(backing_name=filename or None, backing_format=image_format or None)
            except ImageError as error:
                raise RequestError(errno.ENOSPC, str(error)) from None
            await file.flush()

    async def make_empty(self) -> None:
        self._check_changeable()
        async with self.alone():
            image = self.image
            await image.metadata.mark_dirty()
            await self._unmapper.forget(0, -(-self.size // image.file.cluster_size))
            await image.metadata.flush()
