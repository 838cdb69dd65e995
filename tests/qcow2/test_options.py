"""The options of an opened qcow2 image: what they do, and what QEMU says to them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio.testing

from drivers.block.graph import Graph
from drivers.block.image import ImageNode
from drivers.block.node import OpenFlags
from drivers.catalog import Catalog
from drivers.errors import Error, RequestError
from drivers.format.qcow2.driver import Qcow2Node
from drivers.options.image import complete_options
from drivers.options.keyval import parse_keyval
from drivers.testing.memory import MemoryNode
from drivers.testing.model import contents
from tests.qcow2.qemu import attempt, check, create, opened, opened_over, qemu_io, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 1 << 20

REFUSED = [
    "cache-size=1M,l2-cache-size=1M,refcount-cache-size=1",
    "l2-cache-size=2M,cache-size=1M",
    "cache-size=1M,refcount-cache-size=2M",
    "l2-cache-entry-size=3k",
    "l2-cache-entry-size=256",
    "l2-cache-entry-size=128k",
    "cache-clean-interval=-1",
    "cache-clean-interval=4294967296",
    "pass-discard-foo=on",
    "overlap-check=foo",
    "overlap-check.template=foo",
    "overlap-check.foo=on",
    "encrypt.format=luks",
    "data-file.filename=DIR/base.raw",
    "backing=foo",
    "foo=1",
]
TAKEN = [
    "l2-cache-entry-size=512",
    "l2-cache-size=0,refcount-cache-size=0",
    "l2-cache-size=1T",
    "cache-size=0",
    "cache-size=8M,l2-cache-size=1M",
    "cache-size=8M,refcount-cache-size=1M",
    "cache-clean-interval=0",
    "cache-clean-interval=5",
    "lazy-refcounts=on",
    "pass-discard-request=on,pass-discard-snapshot=off,pass-discard-other=on",
    *(f"overlap-check={template}" for template in ("none", "constant", "cached", "all")),
    "overlap-check.template=all,overlap-check.main-header=off",
    "overlap-check.inactive-l2=on",
    "encrypt.key-secret=x",
    "backing.driver=null-co,backing.size=1M",
    "backing.driver=raw,backing.file.filename=DIR/base.raw",
]


async def node_of(path: Path, text: str) -> ImageNode:
    tree = parse_keyval(f"driver=qcow2,file.driver=file,file.filename={path},{text}".rstrip(","))
    graph = Graph(Catalog())
    node = await graph.open(complete_options(tree, graph.catalog.prefixes()), OpenFlags(discard=True))
    assert isinstance(node, ImageNode)
    return node


def by_qemu(path: Path, text: str) -> subprocess.CompletedProcess[str]:
    return attempt("qemu-io", "-c", "read 0 4k", "--image-opts", f"driver=qcow2,file.filename={path},{text}")


def image(tmp_path: Path, options: str = "") -> Path:
    (tmp_path / "base.raw").write_bytes(b"b" * SIZE)
    return create(tmp_path / "disk.qcow2", SIZE, options)


@pytest.mark.parametrize("text", REFUSED)
async def test_what_is_refused_is_refused_in_qemu_io_s_words(tmp_path: Path, text: str) -> None:
    path, text = image(tmp_path), text.replace("DIR", str(tmp_path))
    theirs = by_qemu(path, text)
    with pytest.raises(Error) as caught:
        await node_of(path, text)
    assert theirs.stderr == f"qemu-io: can't open: {caught.value}\n"


@pytest.mark.parametrize("text", TAKEN)
async def test_what_qemu_io_takes_is_taken(tmp_path: Path, text: str) -> None:
    path, text = image(tmp_path), text.replace("DIR", str(tmp_path))
    theirs = by_qemu(path, text)
    assert theirs.returncode == 0, theirs.stderr
    node = await node_of(path, text)
    await node.write(SIZE // 2, b"x" * 70_000)
    await node.aclose()
    check(path)


@pytest.mark.parametrize(
    "text", ["lazy-refcounts=on", "discard-no-unref=on"], ids=lambda text: text.partition("=")[0]
)
async def test_version_2_has_neither(tmp_path: Path, text: str) -> None:
    path = image(tmp_path, "compat=0.10")
    with pytest.raises(Error, match=r"at least qemu 1\.1|since qcow2 version 3"):
        await node_of(path, text)


# --- backing ------------------------------------------------------------------------------------


async def test_another_backing_file_than_the_image_names_or_none(tmp_path: Path) -> None:
    image(tmp_path)
    (tmp_path / "other.raw").write_bytes(b"o" * SIZE)
    path = create(tmp_path / "over.qcow2", SIZE, backing=(tmp_path / "base.raw", "raw"))
    other = f"backing.driver=raw,backing.file.filename={tmp_path}/other.raw"
    for text, expected in (("", b"b"), (other, b"o"), ("backing=", b"\0")):
        node = await node_of(path, text)
        assert await contents(node) == expected * SIZE
        await node.aclose()
        theirs = by_qemu(path, text.rstrip(",")) if text else by_qemu(path, "cache-size=1M")
        assert theirs.returncode == 0
        pattern = f"read -P {expected[0]} 0 1M"
        found = attempt(
            "qemu-io", "-c", pattern, "--image-opts", f"driver=qcow2,file.filename={path},{text}".rstrip(",")
        )
        assert "verification failed" not in found.stdout


async def test_null_is_no_backing_file(tmp_path: Path) -> None:
    image(tmp_path)
    path = create(tmp_path / "over.qcow2", SIZE, backing=(tmp_path / "base.raw", "raw"))
    async with opened(path, backing=None) as node:
        assert await contents(node) == bytes(SIZE)


async def test_options_are_added_to_the_backing_file_that_the_image_names(tmp_path: Path) -> None:
    image(tmp_path)
    path = create(tmp_path / "over.qcow2", SIZE, backing=(tmp_path / "base.raw", "raw"))
    node = await node_of(path, "backing.driver=raw,backing.size=64k,backing.offset=64k")
    assert node.backing is not None
    assert (node.backing.driver_name, node.backing.size) == ("raw", 64 << 10)
    await node.aclose()


async def test_the_data_file_may_be_another(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, f"data_file={tmp_path}/data.raw")
    qemu_io(path, "write -P 7 0 64k")
    (tmp_path / "data.raw").rename(tmp_path / "moved.raw")
    with pytest.raises(Error, match="No such file"):
        await node_of(path, "")
    node = await node_of(path, f"data-file.filename={tmp_path}/moved.raw")
    assert (await contents(node))[: 64 << 10] == b"\x07" * (64 << 10)
    await node.aclose()


# --- lazy refcounts -----------------------------------------------------------------------------


def is_dirty(path: Path) -> bool:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "-U", "--output=json", path))
    return bool(found["dirty-flag"])


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
async def test_lazy_refcounts(tmp_path: Path, stored: bool, wanted: bool) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, f"lazy_refcounts={'on' if stored else 'off'}")
    async with opened(path, lazy_refcounts=wanted) as node:
        await node.write(0, b"x" * 70_000)
        await node.flush()
        assert is_dirty(path) is wanted
    assert not is_dirty(path)
    check(path)


# --- discards that are passed on ----------------------------------------------------------------


def stored(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("passed", ["on", "off"])
async def test_pass_discard_request(tmp_path: Path, passed: str) -> None:
    path = image(tmp_path)
    qemu_io(path, "write 0 1M")
    before = stored(path)
    node = await node_of(path, f"pass-discard-request={passed}")
    await node.discard(0, SIZE)
    await node.aclose()
    assert (before - stored(path) >= SIZE) is (passed == "on")
    check(path)


async def test_discards_are_passed_on_as_the_node_is_told_to_take_them(tmp_path: Path) -> None:
    path = image(tmp_path)
    qemu_io(path, "write 0 1M")
    before = stored(path)
    async with opened(path, OpenFlags(discard=False)) as node:
        assert isinstance(node, Qcow2Node)
        assert node.image.options.passes_discard == {"request": False, "snapshot": True, "other": False}
        await node.write_zeroes(0, SIZE)
    assert before - stored(path) < SIZE


@pytest.mark.parametrize("passed", ["on", "off"])
async def test_pass_discard_snapshot(tmp_path: Path, passed: str) -> None:
    path = image(tmp_path)
    qemu_io(path, "write 0 1M")
    run("qemu-img", "snapshot", "-c", "s", path)
    qemu_io(path, "write 0 1M")
    before = stored(path)
    node = await node_of(path, f"pass-discard-snapshot={passed}")
    assert node.snapshots is not None
    await node.snapshots.delete("1")
    await node.aclose()
    assert (before - stored(path) >= SIZE // 2) is (passed == "on")
    check(path)


@pytest.mark.parametrize("passed", ["on", "off"])
async def test_pass_discard_other(tmp_path: Path, passed: str) -> None:
    """What compressed data took up, when the guest writes over them."""
    path = image(tmp_path)
    for offset in range(0, SIZE, 64 << 10):
        qemu_io(path, f"write -c -s {random_file(tmp_path)} {offset} 64k")
    before = stored(path)
    node = await node_of(path, f"pass-discard-other={passed}")
    await node.write(0, b"x" * SIZE)
    await node.flush()
    await node.aclose()
    grown = stored(path) - before
    assert (grown < SIZE * 3 // 4) is (passed == "on")
    check(path)


def random_file(tmp_path: Path) -> Path:
    """Half of it can be compressed."""
    path = tmp_path / "random"
    path.write_bytes(bytes(i * i * 7919 >> 7 & 0xFF for i in range(32 << 10)) + bytes(32 << 10))
    return path


async def test_discard_no_unref_keeps_the_host_clusters(tmp_path: Path) -> None:
    """Newer than QEMU 7.2; what it leaves behind is an image like any other."""
    path = image(tmp_path)
    qemu_io(path, "write -P 1 0 256k")
    before = json.loads(run("qemu-img", "map", "--output=json", path))[0]["offset"]
    node = await node_of(path, "discard-no-unref=on")
    await node.discard(0, 128 << 10)
    await node.write(0, b"x" * (256 << 10))
    await node.aclose()
    check(path)
    (row, *_) = json.loads(run("qemu-img", "map", "--output=json", path))
    assert (row["offset"], row["length"]) == (before, 256 << 10)


# --- overlap checks -----------------------------------------------------------------------------

# By kind: where the metadata lie that an L2 entry leads to, as (field of the header, is a table of offsets).
KINDS = {
    "active-l1": (40, False),
    "refcount-table": (48, False),
    "snapshot-table": (64, False),
    "active-l2": (40, True),
    "refcount-block": (48, True),
}
TEMPLATES = {
    "none": (),
    "constant": ("active-l1", "refcount-table", "snapshot-table"),
    "cached": tuple(KINDS),
    "all": tuple(KINDS),
}


def overlapping(tmp_path: Path, kind: str) -> bytes:
    """The guest's second cluster leads to metadata of that kind."""
    path = image(tmp_path)
    qemu_io(path, "write 0 128k")
    run("qemu-img", "snapshot", "-c", "s", path)
    qemu_io(path, "write 0 128k")
    data = bytearray(path.read_bytes())

    def number(at: int) -> int:
        return int.from_bytes(data[at : at + 8], "big") & 0x00FFFFFFFFFFFE00

    field, table = KINDS[kind]
    target = number(number(field)) if table else number(field)
    l2 = number(number(40))
    data[l2 + 8 : l2 + 16] = (target | 1 << 63).to_bytes(8, "big")
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
async def test_overlap_checks_see_what_their_template_says(tmp_path: Path, template: str, kind: str) -> None:
    disk = MemoryNode(bytearray(overlapping(tmp_path, kind)), name="disk")
    async with opened_over(disk, options={"overlap-check": template}) as node:
        if kind in TEMPLATES[template]:
            with pytest.raises(RequestError, match="Preventing invalid write"):
                await node.write(64 << 10, b"x" * 512)
            assert (await node.info()).specific["corrupt"] is True
        else:
            await node.write(64 << 10, b"x" * 512)
            assert (await node.info()).specific["corrupt"] is False


@pytest.mark.parametrize("kind", KINDS)
async def test_an_overlap_check_is_left_out_or_added_by_itself(tmp_path: Path, kind: str) -> None:
    disk = MemoryNode(bytearray(overlapping(tmp_path, kind)), name="disk")
    alone = {"overlap-check": {"template": "all", kind: False}}
    async with opened_over(disk, options=alone) as node:
        await node.write(64 << 10, b"x" * 512)
    disk = MemoryNode(bytearray(overlapping(tmp_path, kind)), name="disk")
    alone = {"overlap-check": {"template": "none", kind: True}}
    async with opened_over(disk, options=alone) as node:
        with pytest.raises(RequestError, match="Preventing invalid write"):
            await node.write(64 << 10, b"x" * 512)


# --- caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "l2"), [("4k", "64k"), ("64k", "128k"), ("512", "16k")])
async def test_memory_stays_within_the_caches(tmp_path: Path, entry: str, l2: str) -> None:
    path = create(tmp_path / "disk.qcow2", 64 << 30, "preallocation=metadata")
    node = await node_of(path, f"l2-cache-entry-size={entry},l2-cache-size={l2},refcount-cache-size=256k")
    assert isinstance(node, Qcow2Node)
    mapping, refcounts = node.image.mapping, node.image.refcounts
    limit = (int(l2[:-1]) << 10) // node.image.options.l2_cache_entry_size
    step = 128 << 20
    for offset in range(0, 64 << 30, step):
        await node.read_into(offset, bytearray(512))
        await node.write(offset + step // 2, b"x" * 512)
        node.plain(offset + step // 4, 512)
        assert len(mapping.slices) <= limit
        assert len(refcounts.blocks) <= 4
    await node.discard(0, 1 << 30)
    assert len(mapping.slices) <= limit
    await node.aclose()


async def test_what_is_not_used_is_dropped_after_the_interval(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = create(tmp_path / "disk.qcow2", 8 << 20, "cluster_size=512,preallocation=metadata")
    disk = MemoryNode(bytearray(path.read_bytes()), name="disk")
    async with opened_over(disk, options={"cache-clean-interval": 60}) as node:
        assert isinstance(node, Qcow2Node)
        slices, blocks = node.image.mapping.slices, node.image.refcounts.blocks
        for offset in range(0, 8 << 20, 32 << 10):
            await node.read_into(offset, bytearray(512))
        await node.write_zeroes(0, 64 << 10, may_unmap=True)
        await node.flush()
        many, counted = len(slices), len(blocks)
        assert many > 100
        assert counted
        mock_clock.jump(59)
        await node.flush()
        assert len(slices) == many
        mock_clock.jump(1)
        await node.flush()  # all were used since the opening: from here on it counts
        await node.read_into(0, bytearray(512))
        await node.write(1 << 20, b"dirty")
        mock_clock.jump(60)
        await node.flush()
        assert 0 < len(slices) <= 2
        assert len(blocks) < counted or not blocks
        assert (await contents(node))[1 << 20 :][:5] == b"dirty"


async def test_a_load_cleans_too_and_no_interval_means_never(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = create(tmp_path / "disk.qcow2", 8 << 20, "cluster_size=512,preallocation=metadata")
    for interval, kept in ((60, False), (0, True)):
        disk = MemoryNode(bytearray(path.read_bytes()), name="disk")
        async with opened_over(disk, options={"cache-clean-interval": interval}) as node:
            assert isinstance(node, Qcow2Node)
            slices = node.image.mapping.slices
            for offset in range(0, 4 << 20, 32 << 10):
                await node.read_into(offset, bytearray(512))
            many = len(slices)
            for offset in (5 << 20, 6 << 20):
                mock_clock.jump(60)
                await node.read_into(offset, bytearray(512))
            assert (len(slices) > many) is kept
