"""Comparing two images byte by byte, without reading what is known to be zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from drivers.block.extents import Extent, ExtentFlags, Span
from drivers.block.node import Node, is_zero
from drivers.errors import Error
from nbdclient.image import plaincopy
from nbdclient.image.cursor import ExtentCursor

# So much of both is read at once through buffers; where both lie plain in host files so much is
# one job of a thread.
STEP = 2 << 20
PLAIN_STEP = 32 << 20
_SECTOR = 512
STATUS_FAILED, READ_FAILED = 3, 4


class Failure(Error):
    """An image could not be read; `status` is the exit status for it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Comparison:
    """Of the two images, as far as both reach, and then of the longer one's rest."""

    def __init__(
        self,
        first_name: str,
        first: Node,
        second_name: str,
        second: Node,
        progress: Callable[[float], object],
    ) -> None:
        self._names = {first: first_name, second: second_name}
        self._first = first
        self._second = second
        self._progress = progress
        self._common = min(first.size, second.size)
        # What is wrong where run() says, if it is not the content.
        self.difference: str | None = None
        self._strict = False
        self._cursors = {node: ExtentCursor(node) for node in (first, second)}
        self._buffers = bytearray(STEP), bytearray(STEP)

    async def run(self, *, strict: bool) -> int | None:
        """The offset of the first difference, or None. `strict`: what is allocated must be, too."""
        self._strict = strict
        offset = 0
        while offset < self._common:
            left = await self._status(self._first, offset)
            right = await self._status(self._second, offset)
            length = min(left.length, right.length)
            if strict and _kind(left, self._first, offset) != _kind(right, self._second, offset):
                self.difference = f"Strict mode: Offset {offset} block status mismatch!"
                return offset
            different = await self._compare(offset, length, _reads_zero(left), _reads_zero(right))
            if different is not None:
                return different
            offset += length
            self._progress(offset / max(self._first.size, self._second.size))
        return None

    async def rest_is_zero(self) -> int | None:
        """The offset of the first sector of the longer image's rest that is not zero, or None."""
        longer = self._first if self._first.size > self._second.size else self._second
        offset = self._common
        while offset < longer.size:
            extent = await self._status(longer, offset, longer.size)
            if not _reads_zero(extent):
                for start in range(offset, offset + extent.length, STEP):
                    part = await self._read(longer, start, min(STEP, offset + extent.length - start), 0)
                    if not is_zero(memoryview(part)):
                        first = start + len(part) - len(part.lstrip(b"\0"))
                        return first // _SECTOR * _SECTOR
            offset += extent.length
            self._progress(offset / longer.size)
        return None

    async def _status(self, node: Node, offset: int, end: int | None = None) -> Extent:
        end = self._common if end is None else end
        try:
            if self._strict:
                # How far an extent reaches counts: whole ones, not what is left of an answer.
                return (await node.block_status(offset, end - offset))[0]
            return await self._cursors[node].at(offset, end)
        except OSError as error:
            raise Failure(
                f"Sector allocation test failed for {self._names[node]}: {error.strerror}", STATUS_FAILED
            ) from None

    async def _compare(self, offset: int, length: int, left_zero: bool, right_zero: bool) -> int | None:
        if left_zero and right_zero:
            return None
        for start in range(offset, offset + length, PLAIN_STEP):
            size = min(PLAIN_STEP, offset + length - start)
            spans = [
                [(-1, 0, size)] if zero else node.plain(start, size)
                for node, zero in ((self._first, left_zero), (self._second, right_zero))
            ]
            if spans[0] is None or spans[1] is None:
                different = await self._compare_buffered(start, size, left_zero, right_zero)
            else:
                different = await self._compare_plain(start, size, spans[0], spans[1])
            if different is not None:
                return different
        return None

    async def _compare_plain(
        self, offset: int, length: int, left: Sequence[Span], right: Sequence[Span]
    ) -> int | None:
        nodes = self._first, self._second
        holds = [node.hold(offset, length) for node in nodes]
        try:
            find = partial(plaincopy.first_difference, left, right, multiple=_SECTOR)
            different = find() if length <= STEP else await trio.to_thread.run_sync(find)
        except plaincopy.CopyError as error:
            node = nodes[error.doing == "second"]
            raise self._unreadable(node, offset + error.position, error.error) from None
        finally:
            for node, hold in zip(nodes, holds, strict=True):
                node.release(hold)
        return None if different is None else offset + different

    async def _compare_buffered(
        self, offset: int, length: int, left_zero: bool, right_zero: bool
    ) -> int | None:
        for start in range(offset, offset + length, STEP):
            size = min(STEP, offset + length - start)
            left = bytearray(size) if left_zero else await self._read(self._first, start, size, 0)
            right = bytearray(size) if right_zero else await self._read(self._second, start, size, 1)
            if left != right:
                return start + plaincopy.differing(left, right, _SECTOR)
        return None

    async def _read(self, node: Node, offset: int, length: int, which: int) -> bytearray:
        buffer = self._buffers[which]
        if length < len(buffer):
            buffer = bytearray(length)
        try:
            await node.read_into(offset, buffer)
        except OSError as error:
            raise self._unreadable(node, offset, error) from None
        return buffer

    def _unreadable(self, node: Node, offset: int, error: OSError) -> Failure:
        return Failure(
            f"Error while reading offset {offset} of {self._names[node]}: {error.strerror}", READ_FAILED
        )


def _kind(extent: Extent, node: Node, offset: int) -> tuple[bool, ...]:
    """What strict comparisons compare: that it is an image's last extent, too."""
    has_data = bool(extent.flags & ExtentFlags.DATA)
    return _reads_zero(extent), has_data, extent.depth > 0, offset + extent.length >= node.size


def _reads_zero(extent: Extent) -> bool:
    return not extent.depth or bool(extent.flags & ExtentFlags.ZERO)
