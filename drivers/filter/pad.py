"""A filter that rounds its child's size up to whole sectors.

NBD clients, the Linux kernel first, think in sectors of 512 bytes. An image whose length is no
multiple of that is shown with zeroes behind its end, so that its last bytes can be reached.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from drivers.block.extents import Extent, ExtentFlags, Span
from drivers.block.node import Node, is_zero
from drivers.errors import RequestError

SECTOR = 512


class PadNode(Node):
    """`child` with zeroes up to the next multiple of 512 bytes.

    The zeroes cannot be changed: writing anything else there is ENOSPC, before a byte is written.
    """

    driver_name = "pad"
    supports_fua = True

    def __init__(self, child: Node) -> None:
        super().__init__(
            flags=child.flags,
            size=(child.size + SECTOR - 1) // SECTOR * SECTOR,
            limits=child.limits,
            name=f"{child.name}-padded",
        )
        self.child = child

    @classmethod
    async def over(cls, child: Node) -> PadNode:
        """A padded view of `child`, which belongs to it from now on."""
        node = cls(child)
        await node.use("file", child)
        return node

    def _inside(self, offset: int, length: int) -> int:
        """How many bytes of the range the child has."""
        return max(0, min(length, self.child.size - offset))

    def _plain(self, offset: int, length: int, /) -> Sequence[Span] | None:
        return self.child.plain(offset, length) if offset + length <= self.child.size else None

    def _plain_write(self, offset: int, length: int, /) -> Sequence[Span] | None:
        return self.child.plain_write(offset, length) if offset + length <= self.child.size else None

    def _write_now(self, offset: int, data: memoryview, /) -> bool:
        return offset + len(data) <= self.child.size and self.child.write_now(offset, data)

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        inside = self._inside(offset, len(buffer))
        await self.child.read_into(min(offset, self.child.size), buffer[:inside])
        buffer[inside:] = bytes(len(buffer) - inside)

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        inside = self._inside(offset, len(data))
        if not is_zero(data[inside:]):
            raise RequestError(errno.ENOSPC, f"the image ends after {self.child.size} bytes")
        await self.child.write(min(offset, self.child.size), data[:inside], fua=fua)

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        inside = self._inside(offset, length)
        await self.child.write_zeroes(min(offset, self.child.size), inside, may_unmap=may_unmap, fast=fast)

    async def _discard(self, offset: int, length: int, /) -> None:
        await self.child.discard(min(offset, self.child.size), self._inside(offset, length))

    async def _flush(self) -> None:
        await self.child.flush()

    async def _cache(self, offset: int, length: int, /) -> None:
        await self.child.cache(min(offset, self.child.size), self._inside(offset, length))

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        inside = self._inside(offset, length)
        extents = await self.child.block_status(min(offset, self.child.size), inside)
        if sum(extent.length for extent in extents) == inside and inside < length:
            extents.append(Extent(length - inside, ExtentFlags.ZERO))
        return extents
