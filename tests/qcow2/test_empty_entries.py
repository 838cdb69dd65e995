"""Entries that say "mine alone" and lead nowhere, as a bit that fell over makes them: there is nothing,
and what is written finds a place."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from drivers.block.node import OpenFlags
from drivers.testing.memory import MemoryNode
from drivers.testing.model import write_plain
from tests.qcow2.qemu import create, opened, opened_over, qemu_io

SIZE = 1 << 30
COPIED = 1 << 63


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("level", ["L1", "L2"])
@pytest.mark.parametrize("check", ["none", "cached"])
async def test_a_copied_flag_without_a_cluster(tmp_path: Path, level: str, check: str, inline: bool) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, "write -P 1 64k 64k", f"write -P 1 {SIZE - 65536} 64k")
    image = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", image, 40)
    (l2,) = struct.unpack_from(">Q", image, l1)
    struct.pack_into(">Q", image, l1 if level == "L1" else l2 & ~COPIED, COPIED)
    header = bytes(image[:72])
    disk = MemoryNode(image, name="disk")
    async with opened_over(disk, options={"overlap-check": check}) as node:
        if not (inline and write_plain(node, 0, b"w" * 512)):
            await node.write(0, b"w" * 512)
        found = bytearray(b"?" * 1024)
        await node.read_into(513 << 20, found)
        assert not any(found), "a table that does not exist is empty"
    assert disk.content[:72] == header
    async with opened_over(MemoryNode(bytearray(disk.content), name="disk")) as node:
        found = bytearray(1024)
        await node.read_into(0, found)
        assert found == b"w" * 512 + bytes(512)


@pytest.mark.peer("qemu-img")
async def test_a_discard_of_a_huge_empty_disk_takes_no_time(tmp_path: Path) -> None:
    size = 2 << 50
    path = create(tmp_path / "disk.qcow2", size, "cluster_size=2M")
    disk = MemoryNode(bytearray(path.read_bytes()), name="disk")
    async with opened_over(disk) as node:
        await node.write(size - 8192, b"x" * 4096)
        await node.discard(0, size)
        found = bytearray(8192)
        await node.read_into(size - 8192, found)
        assert not any(found)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("level", ["L1", "L2"])
async def test_one_wild_offset_does_not_keep_others_from_being_flushed(tmp_path: Path, level: str) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, "write -P 1 64k 64k", f"write -P 1 {SIZE - 65536} 64k")
    image = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", image, 40)
    (l2,) = struct.unpack_from(">Q", image, l1)
    struct.pack_into(">Q", image, l1 if level == "L1" else l2 & ~COPIED, COPIED | 1 << 55)
    path.write_bytes(image)
    async with opened(path) as node:
        await node.write(SIZE - 65536, b"a" * 512)
        with pytest.raises(OSError, match=r"."):
            await node.write(0, b"w" * 512)
        await node.flush()
        assert node.children["file"].child.size < 1 << 40
    async with opened(path, OpenFlags(read_only=True)) as node:
        found = bytearray(512)
        await node.read_into(SIZE - 65536, found)
        assert found == b"a" * 512
