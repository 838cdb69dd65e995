"""A temporary overlay: the image below is only read, what is written lives until the close.

Written clusters go to a sparse temporary file, at the image's own offsets, so that both are
plain; a byte for each cluster tells which of the two has it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence

import trio

from drivers.block.extents import Extent, ExtentFlags, Span
from drivers.block.node import Node, OpenFlags
from drivers.block.permission import ALL, Permission
from drivers.block.transfer import read_full, write_full
from drivers.errors import OptionError

# The unit of copying up.
CLUSTER_SIZE = 64 << 10
# A byte of memory for each cluster: 256 MiB for an image of so many bytes.
MAX_OVERLAY_SIZE = 16 << 40


class TemporaryOverlay(Node):
    """`base` as it is, until a cluster is written."""

    driver_name = "temporary"

    def __init__(self, base: Node, flags: OpenFlags, file: int) -> None:
        super().__init__(flags=flags, size=base.size, limits=base.limits, name=f"{base.name}-temporary")
        self._base = base
        self._file = file
        self._written = bytearray((base.size + CLUSTER_SIZE - 1) // CLUSTER_SIZE)
        self._copying = trio.Lock()

    @classmethod
    async def over(cls, base: Node, flags: OpenFlags) -> TemporaryOverlay:
        """An overlay in the system's directory for temporary files ($TMPDIR, or /var/tmp: the
        data may be large). `base` belongs to it from now on. Raises OptionError."""
        if base.size > MAX_OVERLAY_SIZE:
            raise OptionError("the image is too large for a temporary overlay")
        directory = os.environ.get("TMPDIR") or "/var/tmp"
        try:
            file, path = tempfile.mkstemp(prefix="nbdserve-", dir=directory)
            os.unlink(path)
        except OSError as error:
            raise OptionError(
                f"Could not create a temporary file in '{directory}': {error.strerror}"
            ) from None
        try:
            os.truncate(file, base.size)
            node = cls(base, flags, file)
            await node.use("backing", base)
        except BaseException:
            os.close(file)
            raise
        return node

    def _child_permissions(
        self, role: str, needed: Permission, shared: Permission, /
    ) -> tuple[Permission, Permission]:
        # Whoever else writes to the image would show through, but that is theirs to know.
        return Permission.CONSISTENT_READ, ALL & ~(Permission.WRITE | Permission.RESIZE)

    # --- who has which bytes ----------------------------------------------------------------

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """The range cut where the owner changes: (offset, length, whether it was written)."""
        end = offset + length
        while offset < end:
            cluster = offset // CLUSTER_SIZE
            written = self._written[cluster]
            other = self._written.find(b"\0" if written else b"\1", cluster, (end - 1) // CLUSTER_SIZE + 1)
            stop = end if other < 0 else other * CLUSTER_SIZE
            yield offset, stop - offset, bool(written)
            offset = stop

    def _plain(self, offset: int, length: int, /) -> Sequence[Span] | None:
        spans: list[Span] = []
        for start, run, written in self._runs(offset, length):
            if written:
                spans.append((self._file, start, run))
            else:
                below = self._base.plain(start, run)
                if below is None:
                    return None
                spans.extend(below)
        return spans

    def _plain_write(self, offset: int, length: int, /) -> Sequence[Span] | None:
        first, last = offset // CLUSTER_SIZE, (offset + length - 1) // CLUSTER_SIZE
        if self._written.find(b"\0", first, last + 1) >= 0:
            return None
        return [(self._file, offset, length)]

    # --- hooks ------------------------------------------------------------------------------

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        for start, run, written in self._runs(offset, len(buffer)):
            part = buffer[start - offset : start - offset + run]
            if written:
                await trio.to_thread.run_sync(read_full, self._file, start, part)
            else:
                await self._base.read_into(start, part)

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        async with self._copying:
            await self._copy_edges(offset, offset + len(data))
            await trio.to_thread.run_sync(write_full, self._file, offset, data)
            first, last = offset // CLUSTER_SIZE, (offset + len(data) - 1) // CLUSTER_SIZE
            self._written[first : last + 1] = b"\1" * (last + 1 - first)

    async def _copy_edges(self, start: int, end: int) -> None:
        """Bring up what a write leaves alone of the first and the last cluster it touches. The
        clusters count as written only after the write itself."""
        low = start // CLUSTER_SIZE * CLUSTER_SIZE
        high = min(self.size, -(-end // CLUSTER_SIZE) * CLUSTER_SIZE)
        for left, right in ((low, start), (end, high)):
            if left < right and not self._written[left // CLUSTER_SIZE]:
                copy = memoryview(bytearray(right - left))
                await self._base.read_into(left, copy)
                await trio.to_thread.run_sync(write_full, self._file, left, copy)

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        start, run, written = next(self._runs(offset, length))
        if written:
            return [Extent(run, ExtentFlags.DATA, 1, None)]
        below = await self._base.block_status(start, run)
        return [extent._replace(depth=extent.depth + 1) for extent in below]

    async def _close(self) -> None:
        os.close(self._file)
