"""A disk in memory, for tests and as the shortest complete driver."""

from __future__ import annotations

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.graph import OpenContext
from drivers.block.node import Node, OpenFlags, Preallocation
from drivers.errors import OptionError
from drivers.options.schema import Options

# It is a test aid: larger ones are mistakes.
MAX_MEMORY_SIZE = 1 << 30


class MemoryNode(Node):
    """A bytearray behind the node contract. Its content is lost at close."""

    driver_name = "memory"
    supports_fua = True

    def __init__(self, content: bytearray, *, flags: OpenFlags | None = None, name: str = "") -> None:
        super().__init__(flags=flags or OpenFlags(), size=len(content), name=name)
        self.content = content

    @classmethod
    async def open(cls, context: OpenContext, options: Options, /) -> MemoryNode:
        size = options.size("size", 0)
        if size > MAX_MEMORY_SIZE:
            raise OptionError(f"{options.owner}: size is limited to {MAX_MEMORY_SIZE}")
        return cls(bytearray(size), flags=context.flags, name=context.name)

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        self.content[offset : offset + len(data)] = data

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        self.content[offset : offset + length] = bytes(length)

    def _grow(self, size: int, /) -> bool:
        if size > MAX_MEMORY_SIZE:
            return False
        self.content.extend(bytes(size - len(self.content)))
        return True

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        return [Extent(length, ExtentFlags.DATA)]

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))
