"""The host file of an image: its header, its metadata's bytes, and who lies where in it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import trio

from drivers.block.inline import read_now, write_now
from drivers.block.node import Node
from drivers.block.pace import Pace
from drivers.errors import RequestError
from drivers.format.qcow2.header import Header, Incompatible

_SECTOR = 512

# The kinds of metadata, by the names of the overlap checks, and what messages call them.
OWNERS = {
    "main-header": "qcow2_header",
    "active-l1": "active L1 table",
    "active-l2": "active L2 table",
    "refcount-table": "refcount table",
    "refcount-block": "refcount block",
    "snapshot-table": "snapshot table",
    "inactive-l1": "inactive L1 table",
    "inactive-l2": "inactive L2 table",
    "bitmap-directory": "bitmap directory",
}


class ImageFile:
    """`node` is the file below, `header` what its first cluster says now.

    Guest data never passes here. What is read behind the file's end is zeroes. `checks` are the
    kinds of metadata that overlap() looks for; `on_corruption` is told, once, why the image was
    marked corrupt.
    """

    def __init__(
        self, node: Node, header: Header, *, checks: frozenset[str], on_corruption: Callable[[str], object]
    ) -> None:
        self.node = node
        self.header = header
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self._on_corruption = on_corruption
        # Whether writing into the page cache waits for no disk at the moment.
        self.pace = Pace()
        # The image turned out to be damaged: nothing is written to it any more.
        self.corrupt = False
        # One change of the header at a time, or the later would take back the earlier.
        self._changing = trio.Lock()
        # What the host clusters with metadata hold, by cluster index: no data may be written there.
        self.owners: dict[int, str] = {}
        self.checks = checks
        self.claim(0, header.cluster_size, "main-header")

    # --- bytes ------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        inside = min(length, max(0, self.node.size - offset))
        part = memoryview(data)[:inside]
        if inside and not read_now(self.node, offset, part):
            await self.node.read_into(offset, part)
        return data

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if not self.node.grow(offset + len(data)):
            raise RequestError(errno.ENOSPC)
        if not write_now(self.node, offset, memoryview(data), self.pace):
            await self.node.write(offset, data)

    async def flush(self) -> None:
        await self.node.flush()

    # --- the header -------------------------------------------------------------------------

    async def update_header(self, **changes: Any) -> None:
        """Change fields of the header and write the sectors that this changes. Not durable before
        the next flush."""
        async with self._changing:
            await self.write_header(replace(self.header, **changes))

    async def switch_header(self, **changes: Any) -> None:
        """Change fields of the header, durably. Where that fails it is what it was; if not even that is
        certain, nothing is written to the image any more. It is not cancelled half way."""
        before = self.header
        with trio.CancelScope(shield=True):
            try:
                await self.update_header(**changes)
                await self.flush()
            except BaseException:
                corrupt, self.corrupt = self.corrupt, True
                await self.write_header(before)
                await self.flush()
                self.corrupt = corrupt
                raise

    async def write_header(self, header: Header) -> None:
        new = header.build()
        new += bytes(-len(new) % _SECTOR)
        old = await self.read(0, min(self.cluster_size, max(len(new), self._header_length())))
        new += bytes(len(old) - len(new))
        sectors = range(0, len(old), _SECTOR)
        changed = [at for at in sectors if old[at : at + _SECTOR] != new[at : at + _SECTOR]]
        if changed:
            await self.write(changed[0], new[changed[0] : changed[-1] + _SECTOR])
        self.header = header

    def _header_length(self) -> int:
        length = len(self.header.build())
        return length + -length % _SECTOR

    # --- who lies where ---------------------------------------------------------------------

    def claim(self, offset: int, length: int, owner: str) -> None:
        """The clusters of this range hold metadata from now on; `owner` is a key of OWNERS."""
        if owner not in self.checks:
            return
        for cluster in self._clusters(offset, length):
            self.owners[cluster] = owner

    def forget_owners(self) -> None:
        """All metadata may lie elsewhere now: whoever knows claims it anew."""
        self.owners.clear()
        self.claim(0, self.cluster_size, "main-header")

    def release(self, offset: int, length: int) -> None:
        for cluster in self._clusters(offset, length):
            self.owners.pop(cluster, None)

    def _clusters(self, offset: int, length: int) -> Iterable[int]:
        return range(offset >> self.cluster_bits, (offset + length - 1 >> self.cluster_bits) + 1)

    def overlap(self, offset: int, length: int) -> str | None:
        """What metadata a write of this range would destroy."""
        owners = self.owners
        for cluster in self._clusters(offset, length):
            if cluster in owners:
                return owners[cluster]
        return None

    async def protect(self, offset: int, length: int) -> None:
        """Mark the image corrupt, and raise, if data were to be written over metadata."""
        owner = self.overlap(offset, length)
        if owner is not None:
            raise await self.corruption(
                f"Preventing invalid write on metadata (overlaps with {OWNERS[owner]})"
            )

    async def corruption(self, reason: str) -> RequestError:
        """The image is damaged: nothing is written to it from now on, and it says so itself. Returns
        the error to raise."""
        if not self.corrupt:
            self.corrupt = True
            if self.header.version >= 3 and not self.node.flags.read_only:
                self._on_corruption(
                    f"Marking image as corrupt: {reason}; further corruption events will be suppressed"
                )
                await self.update_header(incompatible=self.header.incompatible | Incompatible.CORRUPT)
                await self.flush()
            else:
                self._on_corruption(
                    f"Image is corrupt: {reason}; further corruption events will be suppressed"
                )
        return RequestError(errno.EIO, reason)
