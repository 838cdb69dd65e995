"""Internal snapshots: QEMU makes them and we read them, we make them and QEMU reads them."""

from __future__ import annotations

import errno
import random
import struct
from pathlib import Path

import pytest

from drivers.block.graph import Graph
from drivers.block.image import ImageNode
from drivers.block.node import OpenFlags
from drivers.catalog import Catalog
from drivers.errors import ImageError, RequestError
from drivers.options.schema import Tree
from drivers.testing.imagemodel import BITMAP_KINDS, SNAPSHOT_KINDS, ImageModel
from drivers.testing.memory import MemoryNode
from drivers.testing.model import Operation, contents
from tests.qcow2.qemu import check, create, opened, opened_over, qemu_io, raw_content, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
READ_ONLY = OpenFlags(read_only=True)
OPTIONS = [
    "compat=0.10,cluster_size=4k",
    "cluster_size=512",
    "cluster_size=64k",
    "extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on,cluster_size=4k",
    "refcount_bits=8,cluster_size=4k",
    "refcount_bits=64,cluster_size=512",
]


def listed(path: Path) -> list[tuple[str, str]]:
    """(id, name) of the snapshots that qemu-img sees."""
    rows = run("qemu-img", "snapshot", "-l", path).splitlines()[2:]
    return [(row.split()[0], row.split()[1]) for row in rows]


def snapshots(node: ImageNode) -> list[tuple[str, str]]:
    assert node.snapshots is not None
    return [(info.id, info.name) for info in node.snapshots.list()]


@pytest.mark.parametrize("options", OPTIONS)
async def test_qemu_reads_what_we_took(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, options)
    qemu_io(path, "write -P 1 0 300k", "write -c -P 2 512k 64k")
    states: dict[str, bytes] = {}
    for name in ("one", "two", "three"):
        async with opened(path) as node:
            assert node.snapshots is not None
            await node.write(100_000, name.encode() * 5000)
            info = await node.snapshots.create(name)
            states[name] = bytes(await contents(node))
            assert info.disk_size == MIB
            await node.write(200_000, b"between" * 100)
        check(path)
    assert listed(path) == [("1", "one"), ("2", "two"), ("3", "three")]
    for name, content in states.items():
        assert raw_content(path, snapshot=name) == content
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.snapshots.delete("two")
        await node.snapshots.apply("one")
        assert await contents(node) == states["one"]
    check(path)
    assert raw_content(path) == states["one"]
    assert raw_content(path, snapshot="three") == states["three"]
    assert listed(path) == [("1", "one"), ("3", "three")]


@pytest.mark.parametrize("options", OPTIONS)
async def test_we_read_apply_and_delete_what_qemu_took(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, options)
    states: dict[str, bytes] = {}
    for turn, name in enumerate(("one", "two"), 1):
        qemu_io(path, f"write -P {turn} {turn * 70}k 200k")
        run("qemu-img", "snapshot", "-c", name, path)
        states[name] = raw_content(path)
    qemu_io(path, "write -P 9 0 1M")
    for name, content in states.items():
        async with opened(path, READ_ONLY) as node:
            assert snapshots(node) == [("1", "one"), ("2", "two")]
            assert node.snapshots is not None
            await node.snapshots.load(name)
            assert await contents(node) == content
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.snapshots.apply("2")
        assert await contents(node) == states["two"]
        await node.write(0, b"after" * 1000)
        await node.snapshots.delete("one")
        assert node.snapshots.find("one") is None
    check(path)
    run("qemu-img", "snapshot", "-a", "two", path)
    check(path)
    assert raw_content(path) == states["two"]
    run("qemu-img", "snapshot", "-d", "two", path)
    check(path)


async def test_a_deleted_snapshot_leaves_nothing_behind(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, "cluster_size=4k")
    qemu_io(path, "write -P 1 0 512k")
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.snapshots.create("one")
        await node.write(0, b"2" * 300_000)
        await node.snapshots.delete("one")
        size_of_l2 = 4096
        before = path.stat().st_size
        await node.write(0, b"3" * 500_000)  # in place again, or into what the snapshot had
        await node.flush()
        assert path.stat().st_size <= before + size_of_l2
    check(path)


async def test_a_snapshot_remembers_how_large_the_disk_was(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 100 << 20, "cluster_size=4k")
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.write(99 << 20, b"end")
        await node.snapshots.create("large")
        await node.truncate(1 << 20)
        await node.snapshots.create("small")
        await node.truncate(50 << 20)
        await node.snapshots.apply("large")
        assert node.size == 100 << 20
        found = bytearray(3)
        await node.read_into(99 << 20, found)
        assert found == b"end"
        await node.snapshots.apply("small")
        assert node.size == 1 << 20
    check(path)
    async with opened(path, READ_ONLY) as node:
        assert node.snapshots is not None
        assert node.size == 1 << 20
        await node.snapshots.load("large")
        assert node.size == 100 << 20
    run("qemu-img", "snapshot", "-a", "large", path)
    check(path)


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=512,refcount_bits=64"])
async def test_tables_that_are_longer_than_what_a_refcount_block_covers(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", 1 << 30, options)
    qemu_io(path, "write -P 3 900M 64k")
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.snapshots.create("one")
        await node.write(900 << 20, b"x" * 512)
        await node.truncate(3 << 30)
        await node.write((3 << 30) - 512, b"y" * 512)
    check(path)
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.snapshots.apply("one")
        found = bytearray(512)
        await node.read_into(900 << 20, found)
        assert found == b"\3" * 512
        await node.snapshots.delete("one")
    check(path)


async def test_version_2_does_not_resize_with_snapshots(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, "compat=0.10")
    run("qemu-img", "snapshot", "-c", "one", path)
    async with opened(path) as node:
        with pytest.raises(RequestError, match="Can't resize a v2 image which has snapshots"):
            await node.truncate(2 * MIB)
        assert node.snapshots is not None
        await node.snapshots.delete("one")
        await node.truncate(2 * MIB)


async def test_a_refcount_that_would_overflow_changes_nothing(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, "refcount_bits=1")
    qemu_io(path, "write -P 1 0 200k")
    before = path.read_bytes()
    async with opened(path) as node:
        assert node.snapshots is not None
        with pytest.raises(RequestError) as caught:
            await node.snapshots.create("one")
        assert caught.value.errno == errno.EINVAL  # qemu-img: -22 (Invalid argument)
        assert node.snapshots.list() == []
        await node.write(0, b"in place")
    check(path)
    assert len(path.read_bytes()) == len(before)


async def test_refcounts_overflow_when_there_are_many(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, "refcount_bits=2,cluster_size=4k")
    qemu_io(path, "write -P 1 0 100k")
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.snapshots.create("one")
        await node.snapshots.create("two")
        with pytest.raises(RequestError):
            await node.snapshots.create("three")
        assert snapshots(node) == [("1", "one"), ("2", "two")]
        await node.write(0, b"x" * 50_000)
    check(path)
    assert raw_content(path, snapshot="two")[:50_000] == b"\1" * 50_000


async def test_images_with_a_data_file_have_none(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, f"data_file={tmp_path / 'data'}")
    async with opened(path) as node:
        assert node.snapshots is not None
        with pytest.raises(RequestError) as caught:
            await node.snapshots.create("one")
        assert caught.value.errno == errno.ENOTSUP


async def test_ids_and_names(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    for name in ("2", "one", "one"):
        run("qemu-img", "snapshot", "-c", name, path)
    run("qemu-img", "snapshot", "-d", "2", path)
    async with opened(path) as node:
        assert node.snapshots is not None
        assert snapshots(node) == [("2", "one"), ("3", "one")]
        await node.snapshots.create("x" * 300)
        assert snapshots(node)[2] == ("4", "x" * 255)
        await node.snapshots.create("3")
        by_name = node.snapshots.find("3", by="name")
        by_id = node.snapshots.find("3", by="id")
        assert by_name is not None
        assert by_id is not None
        assert (by_name.id, by_id.name) == ("5", "one")
        assert node.snapshots.find("3") == by_id  # ids first
        assert node.snapshots.find("one", by="id") is None
        with pytest.raises(RequestError) as caught:
            await node.snapshots.apply("none")
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(RequestError, match="readonly"):
            await node.snapshots.load("3")
    assert listed(path)[-1] == ("5", "3")


def _table(image: bytes | bytearray) -> int:
    return int(struct.unpack_from(">Q", image, 64)[0])


async def test_extra_data_and_the_state_of_a_machine_are_kept(tmp_path: Path) -> None:
    """An entry with more extra data than we know, and with a machine's state behind the disk."""
    path = create(tmp_path / "disk.qcow2", MIB)
    run("qemu-img", "snapshot", "-c", "one", path)
    image = bytearray(path.read_bytes())
    at = _table(image)
    assert struct.unpack_from(">I", image, at + 36) == (24,)
    image[at + 36 : at + 40] = struct.pack(">I", 32)
    image[at + 64 : at + 76] = b"unknown!1one"
    image[at + 40 : at + 48] = struct.pack(">Q", 5 << 32)
    path.write_bytes(image)
    async with opened(path) as node:
        assert node.snapshots is not None
        found = node.snapshots.find("one")
        assert found is not None
        assert (found.id, found.vm_state_size) == ("1", 5 << 32)
        await node.snapshots.create("two")
    image = bytearray(path.read_bytes())
    at = _table(image)
    assert image[at + 64 : at + 76] == b"unknown!1one"
    assert image[at + 40 : at + 48] == struct.pack(">Q", 5 << 32)
    assert listed(path)[1] == ("2", "two")


@pytest.mark.parametrize(
    ("offset", "value", "told"),
    [
        (36, struct.pack(">I", 1025), "Too much extra metadata"),
        (36, struct.pack(">I", 0xFFFFFFFF), "too large"),
    ],
)
async def test_a_damaged_table_is_refused(tmp_path: Path, offset: int, value: bytes, told: str) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    run("qemu-img", "snapshot", "-c", "one", path)
    image = bytearray(path.read_bytes())
    image[_table(image) + offset : _table(image) + offset + len(value)] = value
    with pytest.raises(ImageError, match=told):
        async with opened_over(MemoryNode(image)):
            pass


async def test_a_snapshot_s_damaged_l1_table_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    run("qemu-img", "snapshot", "-c", "one", path)
    image = bytearray(path.read_bytes())
    struct.pack_into(">Q", image, _table(image), 0x1234)
    async with opened_over(MemoryNode(image), READ_ONLY) as node:
        assert node.snapshots is not None
        with pytest.raises(ImageError, match="Snapshot L1 table offset invalid"):
            await node.snapshots.load("one")


async def test_what_snapshots_own_is_not_overwritten(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, "cluster_size=4k")
    qemu_io(path, "write -P 1 0 100k")
    run("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 0 4k")
    image = path.read_bytes()
    table = _table(image)
    (l1,) = struct.unpack_from(">Q", image, table)
    (l2,) = struct.unpack_from(">Q", image, l1)
    async with opened_over(MemoryNode(bytearray(image)), options={"overlap-check": "all"}) as node:
        file = node.image.file  # type: ignore[attr-defined]
        assert file.overlap(table, 1) == "snapshot-table"
        assert file.overlap(l1, 1) == "inactive-l1"
        assert file.overlap(l2 & (1 << 56) - 1, 1) == "inactive-l2"
        assert node.snapshots is not None
        await node.snapshots.delete("one")
        for offset in (table, l1, l2 & (1 << 56) - 1):
            assert file.overlap(offset, 1) is None
        await node.snapshots.create("two")
        assert file.overlap(file.header.snapshots_offset, 1) == "snapshot-table"
        await node.write(0, b"x" * MIB)


async def test_the_state_of_a_machine_comes_back_with_its_snapshot(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 4 * MIB, "cluster_size=4k")
    qemu_io(path, "write -b -P 0x11 1M 64k")
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.snapshots.create("one")
        await node.snapshots.apply("one")
    check(path)
    assert "verification failed" not in run("qemu-io", "-f", "qcow2", "-c", "read -b -P 0x11 1M 64k", path)


async def test_what_the_machine_left_does_not_become_disk(tmp_path: Path) -> None:
    """QEMU applies a snapshot with all of its L1 table; behind the disk is the machine's state."""
    path = create(tmp_path / "disk.qcow2", 4 * MIB, "cluster_size=4k")
    qemu_io(path, "write -P 7 0 4M")
    image = bytearray(path.read_bytes())
    struct.pack_into(">Q", image, 24, 2 * MIB)  # an L1 entry is of 2 MiB: there are more than the disk has
    path.write_bytes(image)
    async with opened(path) as node:
        await node.truncate(4 * MIB)
        found = await contents(node)
        assert found == b"\7" * (2 * MIB) + bytes(2 * MIB)
    check(path)


# --- random sequences ---------------------------------------------------------------------------

KINDS = ("write", "write", "write-plain", "zero", "discard", "truncate", "flush", "reopen", *SNAPSHOT_KINDS)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
async def test_any_sequence_agrees_with_the_model(tmp_path: Path, options: str, seed: int) -> None:
    path = create(tmp_path / "disk.qcow2", MIB, options)
    chance = random.Random(f"{options} {seed}")
    kinds = KINDS if "0.10" in options else (*KINDS, *BITMAP_KINDS)

    async def open_image() -> ImageNode:
        graph = Graph(Catalog())
        tree: Tree = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        node = await graph.open(tree, OpenFlags(discard=True))
        assert isinstance(node, ImageNode)
        return node

    model = ImageModel(await open_image(), bytearray(MIB), reopen=open_image)
    try:
        for _ in range(6):
            steps = [
                Operation(
                    kind=chance.choice(kinds),
                    offset=chance.randrange(2 * MIB) & ~511,
                    length=chance.choice((512, 4096, 65536, chance.randrange(MIB))),
                    fill=chance.randrange(1, 256),
                    flag=chance.random() < 0.5,
                )
                for _ in range(8)
            ]
            await model.replay(steps)
    finally:
        await model.node.aclose()
    check(path)
    assert raw_content(path) == model.content
    for name, content in model.snapshots.items():
        assert raw_content(path, snapshot=name)[: len(content)] == content[: len(model.content)]
