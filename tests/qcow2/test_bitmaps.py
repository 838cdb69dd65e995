"""Persistent dirty bitmaps: stored by QEMU and by us, read by the other."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from drivers.block.graph import Graph
from drivers.block.image import ImageNode
from drivers.block.node import OpenFlags
from drivers.catalog import Catalog
from drivers.errors import ImageError, OptionError, RequestError
from drivers.testing.memory import MemoryNode
from tests.qcow2.qemu import attempt, check, create, opened, opened_over, qemu_io, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

MIB = 1 << 20
READ_ONLY = OpenFlags(read_only=True)
BITMAPS_MAGIC = struct.pack(">I", 0x23852875)


def bitmaps_of(path: Path) -> dict[str, tuple[int, list[str]]]:
    """What qemu-img tells: name to (granularity, flags)."""
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {row["name"]: (row["granularity"], row["flags"]) for row in found}


def dirty_by_qemu(path: Path, name: str) -> list[tuple[int, int]]:
    """The dirty ranges as qemu-img map sees them through an NBD server of QEMU's: merged into an
    image of its own, so that no server is needed."""
    raw = path.with_suffix(".sock")
    raw.unlink(missing_ok=True)
    command = f"qemu-nbd -r -f qcow2 -k {raw} -B {name} --fork --pid-file={path}.pid {path}"
    run("sh", "-c", command)
    pid = int(Path(f"{path}.pid").read_text())
    uri = f"nbd+unix:///?socket={raw}"
    rows = json.loads(run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", "--json", uri))
    attempt("sh", "-c", f"kill {pid} 2>/dev/null; while kill -0 {pid} 2>/dev/null; do sleep 0.01; done")
    return [(row["offset"], row["length"]) for row in rows if row["type"] == 1]


def ranges(node: ImageNode, name: str) -> list[tuple[int, int]]:
    return list(node.bitmaps[name].dirty_ranges())


@pytest.mark.peer("qemu-nbd", "nbdinfo")
@pytest.mark.parametrize("options", ["", "cluster_size=512", "cluster_size=2M", "data_file=DATA"])
async def test_qemu_reads_what_we_stored(tmp_path: Path, options: str) -> None:
    options = options.replace("DATA", str(tmp_path / "data"))
    path = create(tmp_path / "disk.qcow2", 40 * MIB + 512, options)
    async with opened(path) as node:
        await node.add_bitmap("fine", 512)
        await node.add_bitmap("coarse", 1 << 20)
        await node.add_bitmap("off", enabled=False)
        await node.add_bitmap("all", 512)
        node.bitmaps["all"].mark(0, node.size)
        await node.write(70_000, b"x" * 3000)
        await node.write_zeroes(30 * MIB, MIB)
        expected = {name: ranges(node, name) for name in node.bitmaps}
    assert expected["fine"] == [(69632, 3584), (30 * MIB, MIB)]
    assert expected["off"] == []
    check(path)
    granularity = min(65536, max(4096, node.image.file.cluster_size))  # type: ignore[attr-defined]
    assert bitmaps_of(path) == {
        "fine": (512, ["auto"]),
        "coarse": (MIB, ["auto"]),
        "off": (granularity, []),
        "all": (512, ["auto"]),
    }
    for name, wanted in expected.items():
        assert dirty_by_qemu(path, name) == wanted
    async with opened(path, READ_ONLY) as node:
        assert {name: ranges(node, name) for name in node.bitmaps} == expected


async def test_we_read_what_qemu_stored_and_go_on(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 10 * MIB)
    run("qemu-img", "bitmap", "--add", "-g", "4k", path, "b0")
    run("qemu-img", "bitmap", "--add", "--disable", path, "b1")
    qemu_io(path, "write -P 1 100k 50k")
    async with opened(path) as node:
        assert ranges(node, "b0") == [(102400, 53248)]
        assert ranges(node, "b1") == []
        assert not node.bitmaps["b1"].enabled
        await node.write(MIB, b"more")
        node.bitmaps["b1"].merge(node.bitmaps["b0"])
    check(path)
    run("qemu-img", "bitmap", "--merge", "b1", path, "b0")
    async with opened(path, READ_ONLY) as node:
        assert ranges(node, "b1") == [(65536, 131072), (MIB, 65536)]
        assert ranges(node, "b0") == [(65536, 131072), (MIB, 65536)]


async def test_a_session_that_changes_nothing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 10 * MIB)
    run("qemu-img", "bitmap", "--add", path, "b0")
    before = path.read_bytes()
    for flags in (OpenFlags(), READ_ONLY):
        async with opened(path, flags) as node:
            await node.read_into(0, bytearray(512))
            await node.flush()
        assert path.read_bytes() == before


async def test_bitmaps_are_marked_in_use_before_the_first_write(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 10 * MIB)
    qemu_io(path, "write -P 1 0 64k")
    run("qemu-img", "bitmap", "--add", path, "b0")
    copy = tmp_path / "copy.qcow2"
    async with opened(path) as node:
        copy.write_bytes(path.read_bytes())
        assert bitmaps_of(copy) == {"b0": (65536, ["auto"])}
        assert node.plain_write(0, 512) is None  # the file is to be told first
        await node.write(0, b"x" * 512)
        assert node.plain_write(0, 512)
        # A crash now:
        copy.write_bytes(path.read_bytes())
    assert bitmaps_of(path) == {"b0": (65536, ["auto"])}
    assert bitmaps_of(copy) == {"b0": (65536, ["in-use", "auto"])}
    check(copy)
    async with opened(copy) as node:
        assert node.bitmaps["b0"].inconsistent
        with pytest.raises(RequestError, match="Bitmap 'b0' is inconsistent and cannot be used"):
            await node.truncate(20 * MIB)
        await node.write(0, b"x" * 512)
    assert bitmaps_of(copy) == {"b0": (65536, ["in-use", "auto"])}
    async with opened(copy) as node:
        await node.remove_bitmap("b0")
    assert bitmaps_of(copy) == {}
    check(copy)


async def test_changes_to_a_bitmap_alone_are_stored(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 10 * MIB)
    run("qemu-img", "bitmap", "--add", path, "b0")
    qemu_io(path, "write 0 64k")
    async with opened(path) as node:
        node.bitmaps["b0"].enabled = False
        node.track(node.bitmaps["b0"])
    assert bitmaps_of(path) == {"b0": (65536, [])}
    async with opened(path) as node:
        assert ranges(node, "b0") == [(0, 65536)]
        node.bitmaps["b0"].clear()
    async with opened(path) as node:
        assert ranges(node, "b0") == []
    check(path)


async def test_bitmaps_follow_the_size_of_the_disk(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 10 * MIB, "cluster_size=512")
    async with opened(path) as node:
        await node.add_bitmap("b0", 512)
        await node.write(9 * MIB, b"x" * 512)
    async with opened(path) as node:
        await node.truncate(100 * MIB)
        await node.write(99 * MIB, b"x" * 512)
    async with opened(path) as node:
        assert ranges(node, "b0") == [(9 * MIB, 512), (99 * MIB, 512)]
        await node.truncate(50 * MIB)
    check(path)
    run("qemu-img", "resize", path, "70M")
    async with opened(path, READ_ONLY) as node:
        assert ranges(node, "b0") == [(9 * MIB, 512)]


async def test_what_cannot_be_added_or_removed(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 10 * MIB)
    async with opened(path) as node:
        await node.add_bitmap("b0")
        for name, granularity, told in [
            ("b0", None, "Bitmap already exists: b0"),
            ("", None, "Bitmap name cannot be empty"),
            ("x", 100, "Granularity must be power of 2 and at least 512"),
            ("x", 256, "Granularity must be power of 2 and at least 512"),
            ("x", 1 << 32, "Granularity must be power of 2 and at least 512"),
            ("a" * 1024, None, r"Name length exceeds maximum \(1023 characters\)"),
        ]:
            with pytest.raises(OptionError, match=told):
                await node.add_bitmap(name, granularity)
        with pytest.raises(OptionError, match="Dirty bitmap 'none' not found"):
            await node.remove_bitmap("none")
        node.bitmaps["b0"].busy = True
        with pytest.raises(OptionError, match="Bitmap 'b0' is currently in use by another operation"):
            await node.remove_bitmap("b0")
        with pytest.raises(RequestError, match="Bitmap 'b0' is currently in use by another operation"):
            await node.truncate(20 * MIB)
    assert list(bitmaps_of(path)) == ["b0"]
    old = create(tmp_path / "old.qcow2", MIB, "compat=0.10")
    async with opened(old) as node:
        with pytest.raises(OptionError, match="Cannot store dirty bitmaps in qcow2 v2 files"):
            await node.add_bitmap("b0")
    async with opened(path, READ_ONLY) as node:
        with pytest.raises(RequestError, match="read-only"):
            await node.remove_bitmap("b0")


async def test_removing_frees_all_that_a_bitmap_had(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 100 * MIB, "cluster_size=4k")
    async with opened(path) as node:
        for name in ("one", "two"):
            await node.add_bitmap(name, 512)
        await node.write(12345, b"x")
    async with opened(path) as node:
        await node.remove_bitmap("one")
        assert list(bitmaps_of_copy(path)) == ["two"]
        await node.remove_bitmap("two")
    assert bitmaps_of(path) == {}
    report = json.loads(run("qemu-img", "check", "--output=json", path))
    assert "leaks" not in report


def bitmaps_of_copy(path: Path) -> dict[str, Any]:
    """The image is locked by us."""
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    return bitmaps_of(copy)


def damaged(path: Path, change: str, value: int) -> bytearray:
    image = bytearray(path.read_bytes())
    at = image.index(BITMAPS_MAGIC) + 8
    _, _, _, directory = struct.unpack_from(">IIQQ", image, at)
    (table,) = struct.unpack_from(">Q", image, directory)
    where, form = {
        "directory offset": (at + 16, ">Q"),
        "table offset": (directory, ">Q"),
        "table size": (directory + 8, ">I"),
        "flags": (directory + 12, ">I"),
        "type": (directory + 16, ">B"),
        "granularity": (directory + 17, ">B"),
        "extra data": (directory + 20, ">I"),
        "table entry": (table, ">Q"),
    }[change]
    struct.pack_into(form, image, where, value)
    return image


@pytest.mark.parametrize(
    ("change", "value", "told"),
    [
        ("directory offset", 0x7FFF0000, "Bitmap directory lies behind the end of the file"),
        ("table offset", 0x1234, "Bitmap 'b0': bitmap table offset invalid"),
        ("table offset", 1 << 40, "Bitmap 'b0': bitmap table lies behind the end of the file"),
        ("table size", 77, "Bitmap 'b0': its table has not the size"),
        ("table size", 0xFFFFFFFF, "Bitmap 'b0': bitmap table too large"),
        ("flags", 0x80, "Bitmap 'b0': reserved flags"),
        ("type", 2, "Bitmap 'b0': unknown type"),
        ("granularity", 60, "Bitmap 'b0': unsupported granularity"),
        ("table entry", 0x1200, "Bitmap 'b0': invalid entry 0x1200"),
        ("table entry", 1 << 60, "Bitmap 'b0': invalid entry"),
    ],
)
async def test_damaged_bitmaps_are_told_and_the_disk_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, value: int, told: str
) -> None:
    path = create(tmp_path / "disk.qcow2", 10 * MIB)
    qemu_io(path, "write -P 5 0 64k")
    run("qemu-img", "bitmap", "--add", path, "b0")
    image = damaged(path, change, value)
    with pytest.raises(ImageError, match=told):
        async with opened_over(MemoryNode(bytearray(image))):
            pass
    async with opened_over(MemoryNode(image), READ_ONLY) as node:
        found = bytearray(512)
        await node.read_into(0, found)
        assert found == b"\5" * 512
        assert not node.bitmaps
    assert told in capsys.readouterr().err


async def test_bits_behind_the_end_of_the_disk_are_of_no_account(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 3 * 65536)
    run("qemu-img", "bitmap", "--add", path, "b0")
    image = damaged(path, "table entry", 1)  # all ones
    async with opened_over(MemoryNode(image), READ_ONLY) as node:
        assert node.bitmaps["b0"].bits == b"\x07"


async def test_unknown_autoclear_bits_are_cleared_before_the_first_write(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    image = bytearray(path.read_bytes())
    image[88] = 0x80
    path.write_bytes(image)
    async with opened(path) as node:
        await node.read_into(0, bytearray(512))
    assert path.read_bytes()[88] == 0x80
    async with opened(path) as node:
        await node.write(0, b"x")
        assert path.read_bytes()[88] == 0


async def test_bitmaps_from_before_a_writer_who_knew_none_are_dropped(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    run("qemu-img", "bitmap", "--add", path, "b0")
    image = bytearray(path.read_bytes())
    image[95] = 0
    path.write_bytes(image)
    async with opened(path) as node:
        assert not node.bitmaps
        await node.add_bitmap("b0")
        await node.write(0, b"x")
    async with opened(path) as node:
        assert ranges(node, "b0") == [(0, 65536)]
    check(path, leaks=True)


async def test_applying_a_snapshot_makes_all_of_the_disk_dirty(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", MIB)
    async with opened(path) as node:
        assert node.snapshots is not None
        await node.snapshots.create("one")
        await node.add_bitmap("b0")
        await node.add_bitmap("off", enabled=False)
        await node.snapshots.apply("one")
        assert ranges(node, "b0") == [(0, MIB)]
        assert ranges(node, "off") == []
    check(path)


async def test_a_new_bitmap_is_in_the_file_once_the_image_is_closed(tmp_path: Path) -> None:
    """Another graph, another node: what one did is in the file when it has closed, not before."""
    path = create(tmp_path / "disk.qcow2", MIB)
    async with opened(path) as node:
        await node.add_bitmap("b0")
        tree = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path), "locking": "off"}}
        other = await Graph(Catalog()).open(tree, READ_ONLY)  # type: ignore[arg-type]
        assert not other.bitmaps
        await other.aclose()
    assert list(bitmaps_of(path)) == ["b0"]
