"""qcow2 images that we make: the bytes that qemu-img would write, or images that it finds in order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.errors import OptionError
from drivers.format.qcow2.create import create
from drivers.format.qcow2.measure import measure
from drivers.options.schema import Options
from drivers.testing.memory import MemoryNode
from tests.qcow2.images import FileContext, make, qemu_check, qemu_img, qemu_io

pytestmark = pytest.mark.peer("qemu-img")
MIB = 1 << 20


def _theirs(path: Path, options: dict[str, Any], *, base: Path | None = None) -> None:
    tree = {key.replace("__", ".").replace("_alg", "-alg"): value for key, value in options.items()}
    size = tree.pop("size")
    flags = [part for key, value in tree.items() for part in ("-o", f"{key}={value}")]
    qemu_img("create", "-q", "-f", "qcow2", "-u", *flags, path, size)


SAME_BYTES: list[dict[str, Any]] = [
    {"size": MIB},
    {"size": 0},
    {"size": 1000},
    {"size": 64 * MIB, "compat": "0.10"},
    {"size": 64 * MIB, "compat": "v2", "backing_file": "base", "backing_fmt": "raw"},
    {"size": 64 * MIB, "backing_file": "base", "backing_fmt": "qcow2", "cluster_size": 512},
    {"size": 10 << 30, "lazy_refcounts": "on"},
    {"size": MIB, "cluster_size": 512},
    *({"size": MIB, "cluster_size": 1 << bits} for bits in range(10, 22)),
    {"size": 1 << 40, "cluster_size": 2 * MIB},
    *({"size": MIB, "refcount_bits": bits} for bits in (1, 2, 4, 8, 16, 32, 64)),
    {"size": MIB, "extended_l2": "on"},
    {"size": MIB, "compression_type": "zstd"},
    {"size": MIB, "preallocation": "metadata"},
    {"size": MIB, "preallocation": "metadata", "refcount_bits": 1},
    {"size": MIB, "preallocation": "metadata", "refcount_bits": 2},
    {"size": MIB, "preallocation": "metadata", "refcount_bits": 4},
    {"size": MIB, "preallocation": "metadata", "refcount_bits": 64},
    {"size": MIB, "preallocation": "metadata", "extended_l2": "on"},
    {"size": 100 * MIB + 512, "preallocation": "metadata"},
]


@pytest.mark.parametrize("options", SAME_BYTES, ids=str)
async def test_create_writes_the_bytes_of_qemu_img(tmp_path: Path, options: dict[str, Any]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    await make(ours, **options)
    _theirs(theirs, options)
    assert ours.read_bytes() == theirs.read_bytes()


GOOD_IMAGES: list[dict[str, Any]] = [
    {"size": 1 << 30, "cluster_size": 512},
    {"size": 100_000, "cluster_size": 512, "preallocation": "metadata", "refcount_bits": 64},
    {"size": 20 * MIB, "cluster_size": 512, "preallocation": "metadata"},
    {"size": 20 * MIB, "cluster_size": 512, "preallocation": "metadata", "refcount_bits": 1},
    {"size": 3 * MIB, "cluster_size": 4096, "preallocation": "falloc"},
    {"size": 3 * MIB, "preallocation": "full", "extended_l2": "on"},
    {"size": 3 * MIB, "preallocation": "falloc", "compat": "0.10"},
    {"size": 0, "preallocation": "full"},
    {"size": 1 << 40, "preallocation": "metadata", "cluster_size": 2 * MIB},
]


@pytest.mark.parametrize("options", GOOD_IMAGES, ids=str)
async def test_created_images_are_in_order(tmp_path: Path, options: dict[str, Any]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    await make(ours, **options)
    assert qemu_check(ours)["status"] == 0
    assert "check-errors" in qemu_check(ours)
    _theirs(theirs, {**options, "preallocation": "off"})
    qemu_img("compare", ours, theirs)
    mine, other = (json.loads(qemu_img("info", "--output=json", path).stdout) for path in (ours, theirs))
    for key in ("virtual-size", "cluster-size", "format-specific"):
        assert mine[key] == other[key]
    if "preallocation" in options and options["size"]:
        extents = json.loads(qemu_img("map", "--output=json", ours).stdout)
        assert all("offset" in extent for extent in extents)


async def test_preallocated_space_is_there(tmp_path: Path) -> None:
    path = tmp_path / "image"
    await make(path, size=8 * MIB, preallocation="falloc")
    assert os.stat(path).st_blocks * 512 >= 8 * MIB
    await make(path, size=8 * MIB, preallocation="metadata")
    assert os.stat(path).st_blocks * 512 < MIB


@pytest.mark.peer("qemu-io")
async def test_created_images_can_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for options in (*GOOD_IMAGES[:7], *SAME_BYTES[8:20]):
        await make(path, **options)
        qemu_io(path, "write -P 7 0 8k", "write -P 8 50k 30k")
        qemu_io(path, "read -P 7 0 8k", "read -P 0 8k 42k", "read -P 8 50k 30k")
        assert qemu_check(path)["status"] == 0


@pytest.mark.parametrize("raw", ["off", "on"])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.peer("qemu-io")
async def test_data_files(tmp_path: Path, raw: str, preallocation: str) -> None:
    options = {"size": 3 * MIB, "data_file_raw": raw, "preallocation": preallocation}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    await make(ours, data_file=str(tmp_path / "data"), **options)
    mine = ours.read_bytes()
    assert (tmp_path / "data").stat().st_size == 3 * MIB
    _theirs(theirs, {"data_file": str(tmp_path / "data"), **options})
    assert mine == theirs.read_bytes()
    qemu_io(ours, "write -P 7 64k 64k")
    assert qemu_check(ours)["status"] == 0
    assert (tmp_path / "data").read_bytes()[65536:131072] == b"\7" * 65536


REFUSED: list[dict[str, Any]] = [
    {"cluster_size": 256},
    {"cluster_size": 3000},
    {"cluster_size": "4M"},
    {"cluster_size": 0},
    {"compat": "2"},
    {"compat": "0.10", "lazy_refcounts": "on"},
    {"compat": "0.10", "refcount_bits": 8},
    {"compat": "0.10", "extended_l2": "on"},
    {"compat": "0.10", "compression_type": "zstd"},
    {"compat": "0.10", "data_file": "data"},
    {"refcount_bits": 0},
    {"refcount_bits": 3},
    {"refcount_bits": 128},
    {"extended_l2": "on", "cluster_size": "8k"},
    {"compression_type": "lzma"},
    {"data_file_raw": "on"},
    {"data_file": "data", "data_file_raw": "on", "backing_file": "base", "backing_fmt": "raw"},
    {"preallocation": "metadata", "backing_file": "base", "backing_fmt": "raw"},
    {"preallocation": "bogus"},
    {"encrypt__format": "foo"},
    {"encryption": "on", "encrypt__format": "aes"},
    {"encrypt__key-secret": "s"},
    {"encrypt__cipher_alg": "aes-256"},
    {"backing_fmt": "raw"},
    {"size": 1 << 40, "cluster_size": 512},
    {"size": 130 << 30, "cluster_size": 512},
    {"size": 7 << 60, "cluster_size": "2M", "extended_l2": "on"},
    {"backing_file": "x" * 1100, "backing_fmt": "raw"},
    {"backing_file": "x" * 1000, "cluster_size": 1024, "backing_fmt": "raw"},
    {"backing_file": "x" * 500, "cluster_size": 512, "backing_fmt": "raw"},
]


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: str(options)[:70])
async def test_bad_combinations_are_refused_like_qemu_img(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"size": MIB, **options}
    with pytest.raises(OptionError) as caught:
        await make(tmp_path / "ours", **options)
    tree = {key.replace("__", ".").replace("_alg", "-alg"): value for key, value in options.items()}
    size = tree.pop("size")
    flags = [part for key, value in tree.items() for part in ("-o", f"{key}={value}")]
    done = qemu_img("create", "-q", "-f", "qcow2", "-u", *flags, tmp_path / "t", size, ok=(1,))
    assert done.stderr.strip() == f"qemu-img: {tmp_path}/t: {caught.value}"
    assert not (tmp_path / "ours").exists()


class _Journal(MemoryNode):
    """A disk that notes what is done to it."""

    def __init__(self) -> None:
        super().__init__(bytearray())
        self.journal: list[str] = []

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        self.journal.append("write" if offset else "write header")
        await super()._write(offset, data, fua=fua)

    async def _flush(self) -> None:
        self.journal.append("flush")


class _Context(FileContext):
    """A CreateContext with one file, which is given."""

    def __init__(self, node: Node) -> None:
        super().__init__(Graph(Catalog()), "disk")
        self.node = node

    async def create_file(self, filename: str, *, size: int = 0) -> Node:
        return self.node


async def test_the_header_comes_last() -> None:
    """Whatever the creation is cut off behind, no half-made image can be opened."""
    node = _Journal()
    await create(_Context(node), Options({"size": MIB, "preallocation": "metadata"}, owner="qcow2"))
    assert node.journal[-3:] == ["flush", "write header", "flush"]
    assert node.journal.count("write header") == 1


async def test_what_lay_on_a_device_does_not_show(tmp_path: Path) -> None:
    """A device cannot be emptied; the metadata on it are as in a new file all the same."""
    path = tmp_path / "image"
    for preallocation in ("off", "metadata"):
        options = {"size": MIB, "preallocation": preallocation}
        await make(path, **options)
        wanted = path.read_bytes()
        node = MemoryNode(bytearray(b"x" * 4 * MIB))
        await create(_Context(node), Options(options, owner="qcow2"))
        tables = min(len(wanted), 5 << 16)
        assert bytes(node.content[:tables]) == wanted[:tables]
        path.write_bytes(node.content)
        assert qemu_check(path)["status"] == 0


MEASURED: list[dict[str, Any]] = [
    {},
    {"cluster_size": 512},
    {"cluster_size": "2M"},
    {"refcount_bits": 1},
    {"refcount_bits": 64},
    {"extended_l2": "on"},
    {"preallocation": "metadata"},
    {"preallocation": "falloc"},
    {"preallocation": "full", "extended_l2": "on"},
    {"backing_file": "base", "backing_fmt": "raw"},
    {"compat": "0.10"},
    {"data_file": "data"},
]


@pytest.mark.parametrize("size", [0, 1, 1000, MIB, 1 << 30, 10 << 40])
@pytest.mark.parametrize("options", MEASURED, ids=str)
async def test_measuring_a_size(options: dict[str, Any], size: int) -> None:
    flags = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    done = qemu_img("measure", "-O", "qcow2", "--output=json", "--size", size, *flags, ok=(0, 1))
    wanted = Options({**options, "size": size}, owner="qcow2")
    if done.returncode:
        with pytest.raises(OptionError) as caught:
            await measure(wanted, None)
        assert done.stderr.strip() == f"qemu-img: {caught.value}"
        return
    measured = await measure(wanted, None)
    assert json.loads(done.stdout) == {
        "required": measured.required,
        "fully-allocated": measured.fully_allocated,
    }
    assert measured.bitmaps is None


@pytest.mark.parametrize("options", MEASURED, ids=str)
async def test_measuring_a_source(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(300 * MIB + 512)
        for offset in (0, 5 * MIB + 4096, 5 * MIB + 20480, 200 * MIB):
            file.seek(offset)
            file.write(b"x" * 8192)
    flags = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    done = qemu_img("measure", "-f", "raw", "-O", "qcow2", "--output=json", *flags, path)
    graph = Graph(Catalog())
    node = await graph.open(
        {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}, OpenFlags(read_only=True)
    )
    try:
        measured = await measure(Options(dict(options), owner="qcow2"), node)
    finally:
        await node.aclose()
    assert json.loads(done.stdout) == {
        "required": measured.required,
        "fully-allocated": measured.fully_allocated,
    }
