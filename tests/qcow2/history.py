"""What a guest did to its disk, and so what may be found there after a power cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from drivers.block.node import Node

SECTOR = 512


@dataclass
class _Write:
    """`begin` and `end` are moments of the history; `position` the disk's when it began."""

    position: int
    begin: int
    first: int
    data: bytes
    end: int | None = None


@dataclass
class _Flush:
    position: int  # the disk's when it had returned
    begin: int
    content: bytes


class History:
    """Requests to `node`, of whole sectors, made through here and written down.

    `position` tells how far the disk below has come.
    """

    def __init__(self, node: Node, content: bytes, position: Callable[[], int]) -> None:
        self.node = node
        self.content = bytearray(content)
        self._position = position
        self._moment = 0
        self._writes: list[_Write] = []
        self._flushes = [_Flush(position(), 0, bytes(content))]

    def _next(self) -> int:
        self._moment += 1
        return self._moment

    async def write(self, offset: int, data: bytes, *, zeroes: bool = False, inline: bool = False) -> None:
        """`inline`: as the server does, where the bytes lie or with what is at hand, if it can be."""
        assert not offset % SECTOR
        assert not len(data) % SECTOR
        entry = _Write(self._position(), self._next(), offset // SECTOR, data)
        self._writes.append(entry)
        if zeroes:
            await self.node.write_zeroes(offset, len(data))
        elif not (inline and self._write_now(offset, data)):
            await self.node.write(offset, data)
        entry.end = self._next()
        self.content[offset : offset + len(data)] = data

    def _write_now(self, offset: int, data: bytes) -> bool:
        spans = self.node.plain_write(offset, len(data))
        if spans is None or len(spans) != 1:
            return spans is None and self.node.write_now(offset, memoryview(data))
        fd, position, length = spans[0]
        return os.pwrite(fd, data, position) == length

    async def zero(self, offset: int, length: int) -> None:
        await self.write(offset, bytes(length), zeroes=True)

    async def discard(self, offset: int, length: int, backing: bytes = b"") -> None:
        """What was there, zeroes, or what lies below: the content tells."""
        entries = [
            _Write(self._position(), self._next(), offset // SECTOR, data)
            for data in (bytes(length), backing[offset : offset + length].ljust(length, b"\0"))
        ]
        self._writes += entries
        await self.node.discard(offset, length)
        for entry in entries:
            entry.end = self._next()
        await self.node.read_into(offset, memoryview(self.content)[offset : offset + length])

    async def flush(self) -> None:
        begin, content = self._next(), bytes(self.content)
        await self.node.flush()
        self._flushes.append(_Flush(self._position(), begin, content))

    def becomes(self, content: bytes) -> None:
        """The whole disk is about to become this, as by applying a snapshot."""
        self._writes.append(_Write(self._position(), self._next(), 0, content))

    def became(self) -> None:
        entry = self._writes[-1]
        entry.end = self._next()
        self.content[:] = entry.data

    def check(self, found: bytes | bytearray, position: int) -> None:
        """`found` may be on the disk after a power cut at `position`: all that was flushed, and of
        what came later any part."""
        flush = max(
            (flush for flush in self._flushes if flush.position <= position), key=lambda flush: flush.begin
        )
        later: dict[int, list[bytes]] = {}
        for write in self._writes:
            if write.position <= position and (write.end is None or write.end > flush.begin):
                for index in range(len(write.data) // SECTOR):
                    part = write.data[index * SECTOR : (index + 1) * SECTOR]
                    later.setdefault(write.first + index, []).append(part)
        assert len(found) == len(flush.content)
        for sector in range(len(found) // SECTOR):
            part = bytes(found[sector * SECTOR : (sector + 1) * SECTOR])
            if part != flush.content[sector * SECTOR : (sector + 1) * SECTOR]:
                assert part in later.get(sector, []), (
                    f"sector {sector} holds {part[:8].hex()}... instead of what was flushed"
                )
