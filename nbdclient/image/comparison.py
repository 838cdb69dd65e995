"""Comparing two images byte by byte, without reading what is known to be zero."""

from __future__ import annotations

import os
from collections.abc import Callable

import trio

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.node import Node, is_zero
from drivers.errors import Error

# So much of both is read at once.
STEP = 2 << 20
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
        self._buffers = memoryview(bytearray(STEP)), memoryview(bytearray(STEP))

    async def run(self, *, strict: bool) -> int | None:
        """The offset of the first difference, or None. `strict`: what is allocated must be, too."""
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
                    if not is_zero(part):
                        first = start + len(part) - len(bytes(part).lstrip(b"\0"))
                        return first // _SECTOR * _SECTOR
            offset += extent.length
            self._progress(offset / longer.size)
        return None

    async def _status(self, node: Node, offset: int, end: int | None = None) -> Extent:
        try:
            extents = await node.block_status(offset, (self._common if end is None else end) - offset)
        except OSError as error:
            raise Failure(
                f"Sector allocation test failed for {self._names[node]}: {error.strerror}", STATUS_FAILED
            ) from None
        return extents[0]

    async def _compare(self, offset: int, length: int, left_zero: bool, right_zero: bool) -> int | None:
        if left_zero and right_zero:
            return None
        for start in range(offset, offset + length, STEP):
            size = min(STEP, offset + length - start)
            left = memoryview(bytes(size)) if left_zero else await self._read(self._first, start, size, 0)
            right = memoryview(bytes(size)) if right_zero else await self._read(self._second, start, size, 1)
            if not _same(left, right):
                return start + _first_different(left, right)
        return None

    async def _read(self, node: Node, offset: int, length: int, which: int) -> memoryview:
        buffer = self._buffers[which][:length]
        spans = node.plain(offset, length)
        try:
            if spans is not None:
                await trio.to_thread.run_sync(_read_spans, spans, buffer)
            else:
                await node.read_into(offset, buffer)
        except OSError as error:
            raise Failure(
                f"Error while reading offset {offset} of {self._names[node]}: {error.strerror}", READ_FAILED
            ) from None
        return buffer


def _read_spans(spans: object, buffer: memoryview) -> None:
    for fd, offset, length in spans:  # type: ignore[attr-defined]
        part, buffer = buffer[:length], buffer[length:]
        while part:
            got = os.preadv(fd, [part], offset) if fd >= 0 else 0
            if not got:
                part[:] = bytes(len(part))
                break
            part = part[got:]
            offset += got


def _kind(extent: Extent, node: Node, offset: int) -> tuple[bool, ...]:
    """What strict comparisons compare: that it is an image's last extent, too."""
    has_data = bool(extent.flags & ExtentFlags.DATA)
    return _reads_zero(extent), has_data, extent.depth > 0, offset + extent.length >= node.size


def _reads_zero(extent: Extent) -> bool:
    return not extent.depth or bool(extent.flags & ExtentFlags.ZERO)


def _same(left: memoryview, right: memoryview) -> bool:
    # Comparing bytes is memcmp; comparing memoryviews goes item by item.
    return bytes(left) == bytes(right)


def _first_different(left: memoryview, right: memoryview) -> int:
    """The offset of the first sector in which two buffers differ."""
    low, size = 0, len(left)
    while size > _SECTOR:
        half = -(-size // 2 // _SECTOR) * _SECTOR
        if _same(left[low : low + half], right[low : low + half]):
            low, size = low + half, size - half
        else:
            size = half
    return low
