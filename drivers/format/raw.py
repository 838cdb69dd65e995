"""The `raw` format: the guest's disk is the file, or a part of it."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace

from drivers.block.extents import Extent, Span
from drivers.block.graph import OpenContext
from drivers.block.image import CreateContext, CreateOption, ImageNode, Measurement
from drivers.block.limits import MAX_SIZE, Limits
from drivers.block.node import Node, OpenFlags, Preallocation
from drivers.block.permission import Permission
from drivers.block.probe import PROBE_SIZE, probe
from drivers.errors import OptionError, RequestError
from drivers.options.schema import Options

# QEMU counts in sectors here.
_SECTOR = 512


class RawNode(ImageNode):
    """`size` bytes of a child from `offset` on; every request goes on to the child.

    `probed` raw images, that is, of which only their first bytes said that they are raw, keep
    their first sector from becoming another format's: the next to probe them would be led to
    read whatever host file that image names (CVE-2008-2004).
    """

    driver_name = "raw"
    supports_fua = True
    create_options = (CreateOption("size", "size", "Virtual disk size"),)

    def __init__(
        self,
        child: Node,
        *,
        flags: OpenFlags,
        offset: int = 0,
        size: int | None = None,
        probed: bool = False,
        name: str = "",
    ) -> None:
        """`size` None: as far as the child reaches. The caller attaches the child."""
        if offset > child.size:
            raise OptionError(
                f"Offset ({offset}) cannot be greater than size of the containing file ({child.size})"
            )
        if size is not None and size % _SECTOR:
            raise OptionError(f"Specified size is not multiple of {_SECTOR}")
        if size is not None and offset + size > child.size:
            raise OptionError(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
                f"actual size of the containing file ({child.size})"
            )
        self._protected = probed and not flags.read_only
        limits = Limits(
            # A child that is stricter deals with what is unaligned. To demand its alignment here would
            # refuse clients that qemu-nbd --cache=none serves.
            request_alignment=PROBE_SIZE if self._protected else 1,
            preferred_block=child.limits.preferred_block,
            max_transfer=child.limits.max_transfer,
        )
        super().__init__(
            flags=flags, size=child.size - offset if size is None else size, limits=limits, name=name
        )
        self._child = child
        self._offset = offset
        self._fixed_size = size is not None
        if not offset:
            # One call less for every request of the hot path; see docs/drivers/raw.md.
            self._plain = child.plain  # type: ignore[method-assign]
            if not self._protected:
                self._plain_write = child.plain_write  # type: ignore[method-assign]

    @classmethod
    async def open(cls, context: OpenContext, options: Options, /) -> RawNode:
        child = await context.child(options)
        flags = context.flags
        if child.flags.read_only and flags.auto_read_only:
            flags = replace(flags, read_only=True)
        node = cls(
            child,
            flags=flags,
            offset=options.size("offset", 0),
            size=options.size("size", None),
            probed=context.probed,
            name=context.name,
        )
        await node.use("file", child)
        return node

    @classmethod
    async def create(cls, context: CreateContext, options: Options, /) -> None:
        mode = options.string("preallocation", "off")
        try:
            preallocation = Preallocation(mode)
        except ValueError:
            raise OptionError(f"invalid parameter value: {mode}") from None
        size = _whole_sectors(options.size("size", 0))
        await context.create_file(context.filename, size=size, preallocation=preallocation)

    @classmethod
    async def measure(cls, options: Options, source: Node | None, /) -> Measurement:
        size = options.size("size", 0)
        size = _whole_sectors(size if source is None else source.size)
        return Measurement(required=size, fully_allocated=size)

    def _child_permissions(
        self, role: str, needed: Permission, shared: Permission, /
    ) -> tuple[Permission, Permission]:
        """Nothing of its own to write, so it asks only for what its parents do. A part of a file
        relies on that file keeping its size."""
        if self._offset or self._fixed_size:
            shared &= ~Permission.RESIZE
        return needed, shared

    # --- requests ---------------------------------------------------------------------------

    def _plain(self, offset: int, length: int, /) -> Sequence[Span] | None:
        return self._child.plain(self._offset + offset, length)

    def _plain_write(self, offset: int, length: int, /) -> Sequence[Span] | None:
        if self._protected and offset < PROBE_SIZE:
            return None
        return self._child.plain_write(self._offset + offset, length)

    def _write_now(self, offset: int, data: memoryview, /) -> bool:
        if self._protected and offset < PROBE_SIZE:
            return False
        return self._child.write_now(self._offset + offset, data)

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        await self._child.read_into(self._offset + offset, buffer)

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        if self._protected and offset < PROBE_SIZE:
            # The request alignment sees to it that the whole sector is here.
            found = probe(bytes(data[:PROBE_SIZE]))
            if found != "raw":
                raise RequestError(errno.EPERM, f"the image would be taken for {found}")
        await self._child.write(self._offset + offset, data, fua=fua)

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        await self._child.write_zeroes(self._offset + offset, length, may_unmap=may_unmap, fast=fast)

    async def _discard(self, offset: int, length: int, /) -> None:
        await self._child.discard(self._offset + offset, length)

    async def _flush(self) -> None:
        await self._child.flush()

    def _grow(self, size: int, /) -> bool:
        return not self._fixed_size and self._child.grow(self._offset + size)

    async def _cache(self, offset: int, length: int, /) -> None:
        await self._child.cache(self._offset + offset, length)

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        return await self._child.block_status(self._offset + offset, length)

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        if self._fixed_size:
            raise RequestError(errno.ENOTSUP, "Cannot resize fixed-size raw disks")
        if size > MAX_SIZE - self._offset:
            raise RequestError(errno.EINVAL, "Disk size too large for the chosen offset")
        await self._child.truncate(self._offset + size, preallocation=preallocation)


def _whole_sectors(size: int) -> int:
    return (size + _SECTOR - 1) // _SECTOR * _SECTOR
