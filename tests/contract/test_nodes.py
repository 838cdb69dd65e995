"""The node contract, for every driver of the ground floor."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.filter.pad import PadNode
from drivers.filter.temporary import TemporaryOverlay
from drivers.format.raw import RawNode
from drivers.testing.contract import NodeContract
from drivers.testing.memory import MemoryNode


class TestMemory(NodeContract):
    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        node = MemoryNode(bytearray(content), flags=flags)
        yield node
        await node.aclose()


class Aligned(MemoryNode):
    """Refuses what is not aligned, as a disk does."""

    def __init__(self, content: bytearray, *, flags: OpenFlags) -> None:
        super().__init__(content, flags=flags)
        self.limits = type(self.limits)(request_alignment=512)

    def _must_be_aligned(self, offset: int, length: int) -> None:
        assert offset % 512 == 0
        assert length % 512 == 0 or offset + length == self.size

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        self._must_be_aligned(offset, len(buffer))
        await super()._read_into(offset, buffer)

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        self._must_be_aligned(offset, len(data))
        await super()._write(offset, data, fua=fua)

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        self._must_be_aligned(offset, length)
        await super()._write_zeroes(offset, length, may_unmap=may_unmap, fast=fast)


class TestAlignedMemory(NodeContract):
    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        node = Aligned(bytearray(content), flags=flags)
        yield node
        await node.aclose()


class TestRawOverMemory(NodeContract):
    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        child = MemoryNode(bytearray(content), flags=OpenFlags(read_only=flags.read_only, discard=True))
        node = RawNode(child, flags=flags)
        await node.use("file", child)
        yield node
        await node.aclose()


class FileContract(NodeContract):
    """`tree()` describes the node over the file that holds `lead`, the content and `trail`."""

    lead = b""
    trail = b""

    def tree(self, path: Path, size: int) -> dict[str, Any]:
        raise NotImplementedError

    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        path = self.tmp_path / "disk.img"
        path.write_bytes(self.lead + content + self.trail)
        node = await Graph(Catalog()).open(self.tree(path, len(content)), flags)
        yield node
        await node.aclose()
        found = path.read_bytes()
        assert found.startswith(self.lead)
        assert found.endswith(self.trail)


class TestFile(FileContract):
    def tree(self, path: Path, size: int) -> dict[str, Any]:
        return {"driver": "file", "filename": str(path)}


class TestDirectFile(FileContract):
    def tree(self, path: Path, size: int) -> dict[str, Any]:
        return {"driver": "file", "filename": str(path), "cache": {"direct": "on"}}


class TestDirectFileInThreads(FileContract):
    def tree(self, path: Path, size: int) -> dict[str, Any]:
        return {"driver": "file", "filename": str(path), "cache": {"direct": "on"}, "aio": "threads"}


class TestRaw(FileContract):
    def tree(self, path: Path, size: int) -> dict[str, Any]:
        return {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}


class TestRawFromAnOffset(FileContract):
    lead = b"L" * 1001

    def tree(self, path: Path, size: int) -> dict[str, Any]:
        return {"driver": "raw", "offset": "1001", "file": {"driver": "file", "filename": str(path)}}


class TestRawPartOfAFile(FileContract):
    granularity = 512
    resizable = False
    lead = b"L" * 1536
    trail = b"T" * 777

    def tree(self, path: Path, size: int) -> dict[str, Any]:
        child = {"driver": "file", "filename": str(path)}
        return {"driver": "raw", "offset": 1536, "size": size, "file": child}


class TestRawPartOfADirectFile(TestRawPartOfAFile):
    def tree(self, path: Path, size: int) -> dict[str, Any]:
        return {**super().tree(path, size), "cache": {"direct": True}}


class TestTemporaryOverlay(NodeContract):
    """The image below is never written, whatever happens above."""

    resizable = False

    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        below = MemoryNode(bytearray(content), flags=OpenFlags(read_only=True))
        node = await TemporaryOverlay.over(below, flags)
        yield node
        await node.aclose()
        assert below.content == content
        assert below.closed


class TestPad(NodeContract):
    granularity = 512
    resizable = False

    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        node = await PadNode.over(MemoryNode(bytearray(content), flags=flags))
        yield node
        await node.aclose()
