"""The node contract for luks, over a volume made anew for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from drivers.block.area import NodeArea
from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.crypto.cipher import in_turns
from drivers.crypto.luks.layout import Format, header_area
from drivers.crypto.luks.volume import create
from drivers.objects.store import ObjectStore
from drivers.testing.contract import NodeContract
from drivers.testing.memory import MemoryNode


class LuksContract(NodeContract):
    granularity = 512
    format = Format()
    detached = False

    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        head = MemoryNode(bytearray(header_area(self.format)))
        volume = await create(NodeArea(head), self.format, b"abc", iter_time=0, detached=self.detached)
        payload = bytearray(content)
        await in_turns(volume.cipher.encrypt, 0, memoryview(payload))
        data, header = self.tmp_path / "data.img", self.tmp_path / "header.img"
        header.write_bytes(head.content)
        data.write_bytes(payload if self.detached else head.content + payload)
        objects = ObjectStore.of([{"qom-type": "secret", "id": "s", "data": "abc"}])
        tree = {
            "driver": "luks",
            "key-secret": "s",
            "file": {"driver": "file", "filename": str(data)},
        }
        if self.detached:
            tree["header"] = {"driver": "file", "filename": str(header)}
        node = await Graph(Catalog(), objects).open(tree, flags)
        yield node
        await node.aclose()
        assert header.read_bytes() == head.content


class TestLuks(LuksContract):
    pass


class TestLuksWithEssiv(LuksContract):
    format = Format(algorithm="aes-128", mode="cbc", iv_generator="essiv", iv_hash="md5")


class TestLuksWithADetachedHeader(LuksContract):
    detached = True
