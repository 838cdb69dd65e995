"""The `null-co` driver: a disk that forgets, for measuring what stands above it."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from drivers.block.extents import Extent, ExtentFlags, Span
from drivers.block.graph import OpenContext
from drivers.block.node import Node, OpenFlags, Preallocation
from drivers.options.schema import Options

_DEFAULT_SIZE = 1 << 30


class NullNode(Node):
    """Writes vanish. Reads give zeroes, after `latency` seconds; whether block_status may promise
    that, is `read_zeroes`."""

    driver_name = "null-co"
    supports_fua = True

    def __init__(
        self, *, flags: OpenFlags, size: int, latency: float = 0, read_zeroes: bool = False, name: str = ""
    ) -> None:
        super().__init__(flags=flags, size=size, name=name)
        self._latency = latency
        self._flags = ExtentFlags.ZERO if read_zeroes else ExtentFlags.DATA

    @classmethod
    async def open(cls, context: OpenContext, options: Options, /) -> NullNode:
        return cls(
            flags=context.flags,
            size=options.size("size", _DEFAULT_SIZE),
            latency=options.integer("latency-ns", 0) / 1e9,
            read_zeroes=options.boolean("read-zeroes", False),
            name=context.name,
        )

    def _plain(self, offset: int, length: int, /) -> Sequence[Span] | None:
        return None if self._latency else [(-1, 0, length)]

    async def _wait(self) -> None:
        if self._latency:
            await trio.sleep(self._latency)

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        await self._wait()
        # Never what the buffer held before: that might be another client's data.
        buffer[:] = bytes(len(buffer))

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        await self._wait()

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        await self._wait()

    async def _discard(self, offset: int, length: int, /) -> None:
        await self._wait()

    async def _flush(self) -> None:
        await self._wait()

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        return [Extent(length, self._flags)]

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        """Any size will do."""
