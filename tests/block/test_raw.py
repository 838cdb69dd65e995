"""The `raw` format: parts of files, probed images, sizes and permissions."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.graph import Graph
from drivers.block.limits import Limits
from drivers.block.node import OpenFlags, Preallocation
from drivers.block.permission import ALL, Permission
from drivers.block.probe import SIGNATURES, probe
from drivers.catalog import Catalog
from drivers.errors import OptionError, RequestError
from drivers.format.raw import RawNode
from drivers.testing.memory import MemoryNode
from drivers.testing.model import contents

HEADS = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "qcow": b"QFI\xfb\0\0\0\1",
    "qed": b"QED\0",
    "luks": b"LUKS\xba\xbe\0\1",
    "vdi": bytes(64) + b"\x7f\x10\xda\xbe",
    "vmdk": b"KDMV",
    "vpc": b"conectix",
    "vhdx": b"vhdxfile",
    "parallels": b"WithoutFreeSpace",
    "bochs": b"Bochs Virtual HD Image\0".ljust(32, b"\0") + b"Redolog\0",
    "cloop": b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n",
}


class Spans(MemoryNode):
    """Memory that claims to lie in file 77, at the same offsets."""

    def _plain(self, offset: int, length: int, /) -> list[tuple[int, int, int]]:
        return [(77, offset, length)]

    _plain_write = _plain

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        return [Extent(length, ExtentFlags.DATA, host_offset=offset)]


@asynccontextmanager
async def over(child: MemoryNode, flags: OpenFlags | None = None, **arguments: Any) -> AsyncIterator[RawNode]:
    node = RawNode(child, flags=flags or OpenFlags(discard=True), **arguments)
    await node.use("file", child)
    yield node
    await node.aclose()


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (4097, None, "Offset (4097) cannot be greater than size of the containing file (4096)"),
        (0, 1000, "Specified size is not multiple of 512"),
        (
            1024,
            3584,
            "The sum of offset (1024) and size (3584) has to be smaller or equal to the actual size of "
            "the containing file (4096)",
        ),
        (1 << 64, 512, "Offset (18446744073709551616) cannot be greater than"),
    ],
)
def test_a_part_must_lie_inside_the_file(offset: int, size: int | None, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        RawNode(MemoryNode(bytearray(4096)), flags=OpenFlags(), offset=offset, size=size)
    assert str(caught.value).startswith(message)


async def test_offset_and_size_are_options_and_their_failure_closes_the_file() -> None:
    graph = Graph(Catalog())
    node = await graph.open({"driver": "raw", "offset": "1k", "file": {"driver": "memory", "size": "4k"}})
    assert node.size == 3072
    await node.aclose()
    with pytest.raises(OptionError, match="smaller or equal"):
        await graph.open({"driver": "raw", "size": "8k", "file": {"driver": "memory", "size": "4k"}})
    with pytest.raises(OptionError, match='must be specified for "file"'):
        await graph.open({"driver": "raw"})
    assert graph.nodes == {}


async def test_an_offset_at_the_end_gives_an_empty_image() -> None:
    async with over(MemoryNode(bytearray(4096)), offset=4096) as node:
        assert (node.size, await contents(node)) == (0, b"")


async def test_spans_and_extents_are_the_childs_moved_by_the_offset() -> None:
    async with over(Spans(bytearray(8192)), offset=1000, size=4096) as node:
        assert node.plain(24, 10) == [(77, 1024, 10)]
        assert node.plain_write(24, 10) == [(77, 1024, 10)]
        assert await node.block_status(24, 100) == [Extent(100, ExtentFlags.DATA, 1, 1024)]


async def test_the_fast_path_asks_raw_and_its_child_whether_it_is_open() -> None:
    """Bound straight to the child's, it must not lose either's veto."""
    child = Spans(bytearray(8192))
    async with over(child) as node:
        assert node.plain(1, 2) == [(77, 1, 2)]
        for guarded in (node, child):
            async with guarded.requests.quiesced():
                assert node.plain(1, 2) is None
                assert node.plain_write(1, 2) is None
        assert node.plain_write(1, 2) == [(77, 1, 2)]


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: signature.driver)
async def test_a_probed_image_never_becomes_another_format(signature: Any) -> None:
    head = HEADS[signature.driver]
    assert probe(head.ljust(512, b"\0")) == signature.driver
    content = bytearray(8192)
    async with over(MemoryNode(content), probed=True) as node:
        assert node.limits.request_alignment == 512
        for step in (len(head), 3):
            # At once, and creeping in piece by piece.
            with pytest.raises(RequestError) as caught:
                for start in range(0, len(head), step):
                    await node.write(start, head[start : start + step])
            assert caught.value.errno == errno.EPERM
        assert probe(bytes(content[:512])) == "raw"
        with pytest.raises(RequestError):
            await node.write(0, head + bytes(4096))
        await node.write(512, head)
        await node.write(0, b"harmless")
        await node.write_zeroes(0, 8192)
    async with over(MemoryNode(content)) as named:
        await named.write(0, head)
    assert probe(bytes(content[:512])) == signature.driver


async def test_a_probed_image_is_written_inline_only_behind_its_first_sector() -> None:
    async with over(Spans(bytearray(8192)), probed=True) as node:
        assert node.plain_write(0, 4096) is None
        assert node.plain_write(511, 1) is None
        assert node.plain_write(512, 4096) == [(77, 512, 4096)]
        assert node.plain(0, 4096) == [(77, 0, 4096)]
    async with over(Spans(bytearray(8192)), OpenFlags(read_only=True), probed=True) as node:
        assert node.limits.request_alignment == 1


async def test_a_probed_image_shorter_than_a_sector_is_protected_too() -> None:
    async with over(MemoryNode(bytearray(100)), probed=True) as node:
        with pytest.raises(RequestError):
            await node.write(0, b"QED\0")
        await node.write(50, b"QED\0")


async def test_the_childs_alignment_is_the_childs_own_affair() -> None:
    child = MemoryNode(bytearray(8192))
    child.limits = Limits(request_alignment=4096, preferred_block=8192)
    for offset in (0, 4096, 512):
        node = RawNode(child, flags=OpenFlags(), offset=offset)
        assert node.limits == Limits(request_alignment=1, preferred_block=8192)


async def test_resizing_moves_the_files_end_unless_the_size_is_fixed() -> None:
    child = MemoryNode(bytearray(b"a" * 4096))
    async with over(child, offset=1000) as node:
        await node.truncate(5000)
        assert (node.size, child.size) == (5000, 6000)
        with pytest.raises(RequestError, match="too large for the chosen offset"):
            await node.truncate((1 << 63) - (1 << 30))
    async with over(MemoryNode(bytearray(4096)), size=512) as fixed:
        with pytest.raises(RequestError, match="Cannot resize fixed-size raw disks"):
            await fixed.truncate(1024, preallocation=Preallocation.FULL)


@pytest.mark.parametrize("needed", [Permission.CONSISTENT_READ, ALL])
async def test_raw_asks_of_the_file_what_is_asked_of_it(needed: Permission) -> None:
    async with over(MemoryNode(bytearray(4096))) as node:
        assert node._child_permissions("file", needed, ALL) == (needed, ALL)
    async with over(MemoryNode(bytearray(4096)), size=512) as node:
        assert node._child_permissions("file", needed, ALL) == (needed, ALL & ~Permission.RESIZE)


async def test_a_file_that_fell_back_to_read_only_makes_raw_read_only() -> None:
    tree: dict[str, Any] = {"driver": "raw", "file": {"driver": "memory", "size": 512, "read-only": "on"}}
    node = await Graph(Catalog()).open(tree, OpenFlags(auto_read_only=True))
    assert node.flags.read_only
    await node.aclose()


@pytest.mark.parametrize(("discard", "storage"), [("unmap", 0), ("ignore", 65536), (None, 0)])
async def test_the_files_discard_option_decides_whether_zeroes_may_be_a_hole(
    tmp_path: Path, discard: str | None, storage: int
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"a" * 65536)
    file: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if discard:
        file["discard"] = discard
    node = await Graph(Catalog()).open({"driver": "raw", "file": file}, OpenFlags(discard=False))
    await node.write_zeroes(0, 65536, may_unmap=True)
    await node.aclose()
    assert path.stat().st_blocks * 512 == storage
