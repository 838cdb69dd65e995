"""A node that fails or waits where a test wants it to."""

from __future__ import annotations

import os
from collections import defaultdict

import trio

from drivers.block.extents import Extent, Span
from drivers.block.node import Node, OpenFlags, Preallocation


class FaultyNode(Node):
    """Passes every request on to `child`, which the caller attaches with use().

    fail: {"write": EIO} makes every write fail so until the entry is taken out. gates: a request
    whose operation has an event here waits for it before anything is done. calls: the operations
    that reached the hooks, with their offset and length, in order. fail_call: {7: ENOSPC} makes the
    call that will be calls[7] fail, once. The operations are the hooks' names without the underscore.
    """

    driver_name = "faulty"
    supports_fua = True

    def __init__(
        self, child: Node, *, flags: OpenFlags | None = None, plain: bool = False, name: str = "faulty"
    ) -> None:
        """`plain`: whether plain() passes through too, so that reads may not be seen here."""
        super().__init__(flags=flags or child.flags, size=child.size, limits=child.limits, name=name)
        self._child = child
        self._passes_plain = plain
        self.fail: dict[str, int] = {}
        self.fail_call: dict[int, int] = {}
        self.gates: dict[str, trio.Event] = {}
        self.calls: list[tuple[str, int, int]] = []
        self._arrivals: dict[str, trio.Event] = defaultdict(trio.Event)

    async def arrived(self, operation: str) -> None:
        """Wait until a request of that operation has reached its gate."""
        await self._arrivals[operation].wait()

    async def _step(self, operation: str, offset: int = 0, length: int = 0) -> None:
        failure = self.fail_call.get(len(self.calls), 0)
        self.calls.append((operation, offset, length))
        self._arrivals[operation].set()
        if operation in self.gates:
            await self.gates[operation].wait()
        if number := failure or self.fail.get(operation):
            raise OSError(number, os.strerror(number))

    def _plain(self, offset: int, length: int, /) -> list[Span] | None:
        spans = self._child.plain(offset, length) if self._passes_plain else None
        return None if spans is None else list(spans)

    def _grow(self, size: int, /) -> bool:
        return self._child.grow(size)

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        await self._step("read_into", offset, len(buffer))
        await self._child.read_into(offset, buffer)

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        await self._step("write", offset, len(data))
        await self._child.write(offset, data, fua=fua)

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        await self._step("write_zeroes", offset, length)
        await self._child.write_zeroes(offset, length, may_unmap=may_unmap, fast=fast)

    async def _discard(self, offset: int, length: int, /) -> None:
        await self._step("discard", offset, length)
        await self._child.discard(offset, length)

    async def _flush(self) -> None:
        await self._step("flush")
        await self._child.flush()

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        await self._step("block_status", offset, length)
        return await self._child.block_status(offset, length)

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        await self._step("truncate", size)
        await self._child.truncate(size, preallocation=preallocation)

    async def _close(self) -> None:
        self.calls.append(("close", 0, 0))
