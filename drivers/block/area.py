"""A part of a node as drivers.crypto.luks wants it: where LUKS's header and key slots lie."""

from __future__ import annotations

from drivers.block.node import Node


class NodeArea:
    """From `start` on, `length` bytes, or as many as the node has."""

    def __init__(self, node: Node, start: int = 0, length: int | None = None) -> None:
        self._node = node
        self._start = start
        self._length = length

    async def read(self, offset: int, length: int, /) -> bytes:
        end = self._node.size - self._start
        if self._length is not None:
            end = min(end, self._length)
        data = bytearray(max(0, min(length, end - offset)))
        await self._node.read_into(self._start + offset, data)
        return bytes(data)

    async def write(self, offset: int, data: bytes, /) -> None:
        assert self._length is None or offset + len(data) <= self._length
        await self._node.write(self._start + offset, data)

    async def flush(self) -> None:
        await self._node.flush()
