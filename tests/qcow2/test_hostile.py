"""Images that lie. Each is refused in words that name what is wrong, or does no harm."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from drivers.block.node import OpenFlags
from drivers.errors import ImageError, OptionError
from drivers.testing.memory import MemoryNode
from drivers.testing.model import contents
from tests.golden.unpack import golden
from tests.qcow2.qemu import create, opened, opened_over, qemu_io, run

READ_ONLY = OpenFlags(read_only=True)
SIZE = 1 << 20
L1, REFCOUNT_TABLE = 0x30000, 0x10000

Image = bytearray


def number(offset: int, size: int, value: int) -> Callable[[Image], None]:
    def patch(image: Image) -> None:
        image[offset : offset + size] = value.to_bytes(size, "big")

    return patch


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """1 MiB, version 3, data in the first cluster of 64 KiB."""
    path = golden("qcow2")["v3"].unpack(tmp_path)
    content = Image(path.read_bytes())
    assert struct.unpack_from(">Q", content, 40) == (L1,)
    assert struct.unpack_from(">Q", content, 48) == (REFCOUNT_TABLE,)
    return content


async def refused(image: Image, words: str) -> None:
    for flags in (READ_ONLY, OpenFlags()):
        with pytest.raises((ImageError, OptionError), match=words):
            async with opened_over(MemoryNode(Image(image), name="disk"), flags):
                pass


HEADER = [
    ("magic", number(0, 4, 0x514649FA), "not in qcow2 format"),
    ("version 0", number(4, 4, 0), "version 0"),
    ("version 1", number(4, 4, 1), "version 1"),
    ("version 4", number(4, 4, 4), "version 4"),
    ("tiny clusters", number(20, 4, 8), "cluster size"),
    ("huge clusters", number(20, 4, 22), "cluster size"),
    ("endless clusters", number(20, 4, 0xFFFFFFFF), "cluster size"),
    ("size", number(24, 8, 1 << 63), "too big"),
    ("size that no L1 can hold", number(24, 8, 1 << 62), "too big|too small"),
    ("size beyond the L1", number(24, 8, 1 << 40), "L1 table is too small"),
    ("encryption method", number(32, 4, 3), "encryption method"),
    ("L1 size", number(36, 4, 0xFFFFFFFF), "L1 table too large"),
    ("no L1", number(36, 4, 0), "L1 table is too small"),
    ("L1 inside the header", number(40, 8, 8), "L1 table offset"),
    ("L1 nowhere", number(40, 8, 0), "L1 table offset"),
    ("L1 beyond all files", number(40, 8, 1 << 60), "L1 table offset"),
    ("refcount table not aligned", number(48, 8, 0x10001), "[Rr]ef(erence )?count table offset"),
    ("no refcount table", number(56, 4, 0), "reference count table"),
    ("refcount table size", number(56, 4, 0x7FFFFFFF), "[Rr]eference count table too large"),
    ("snapshots", number(60, 4, 0xFFFFFFFF), "Snapshot table too large"),
    ("unknown feature", number(72, 8, 1 << 63), "8000000000000000"),
    ("refcount order", number(96, 4, 7), "64 bits"),
    ("header length", number(100, 4, 103), "header too short"),
    ("header longer than its cluster", number(100, 4, 0x10008), "exceeds cluster size"),
    ("compression type without its bit", number(104, 1, 1), "Compression type"),
    ("compression bit without a type", number(72, 8, 8), "Compression type"),
    ("extension length", number(116, 4, 0xFFFFFFF0), "extension"),
    ("backing file offset", number(8, 8, 1 << 40), "backing file offset"),
]


@pytest.mark.parametrize(("patch", "words"), [row[1:] for row in HEADER], ids=[row[0] for row in HEADER])
async def test_a_header_that_cannot_be_is_refused_by_name(
    image: Image, patch: Callable[[Image], None], words: str
) -> None:
    patch(image)
    await refused(image, words)


@pytest.mark.parametrize("length", [0, 1, 71, 100, 103])
async def test_a_file_that_ends_inside_the_header(image: Image, length: int) -> None:
    await refused(image[:length], r".")


async def test_a_backing_name_of_more_than_1023_bytes(image: Image) -> None:
    number(8, 8, 1000)(image)
    number(16, 4, 1024)(image)
    await refused(image, "Backing file name too long")


async def test_an_image_that_is_its_own_backing_file_ends(tmp_path: Path) -> None:
    """The lock on the file, or the depth that nodes may have: something says no."""
    path = create(tmp_path / "disk.qcow2", SIZE)
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", path)
    with trio.fail_after(30), pytest.raises((ImageError, OptionError)):
        async with opened(path, READ_ONLY):
            pass
    assert not [name for name in _open_files() if name.startswith(str(tmp_path))]


def _open_files() -> list[str]:
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue
    return found


# --- tables -------------------------------------------------------------------------------------

TABLES = [
    ("L1 entry not aligned", L1, (1 << 63) | 0x40200),
    ("L1 entry with reserved bits", L1, (1 << 63) | 0x40000 | 1 << 56),
    ("L1 entry far behind the end", L1, (1 << 63) | 1 << 55),
    ("L1 entry to the header", L1, 1 << 63),
    ("L1 entry to the L1", L1, (1 << 63) | L1),
]


@pytest.mark.parametrize(("offset", "entry"), [row[1:] for row in TABLES], ids=[row[0] for row in TABLES])
async def test_a_table_that_leads_astray_costs_a_request_at_most(
    image: Image, offset: int, entry: int
) -> None:
    number(offset, 8, entry)(image)
    header = bytes(image[:72])
    with contextlib.suppress(OSError):  # a close may have to tell that something could not be written
        async with opened_over(MemoryNode(image, name="disk"), OpenFlags(discard=True)) as node:
            for call in (
                lambda: node.read_into(0, bytearray(SIZE)),
                lambda: node.block_status(0, SIZE),
                lambda: node.write(0, b"x" * 512),
                lambda: node.write(300 << 10, b"x" * 70000),
                lambda: node.discard(0, SIZE),
                node.flush,
            ):
                try:
                    await call()
                except OSError as error:
                    assert str(error)
    assert image[:72] == header


def l2(image: Image) -> int:
    (entry,) = struct.unpack_from(">Q", image, L1)
    return int(entry) & 0x00FFFFFFFFFFFE00


@pytest.mark.parametrize("where", [L1, REFCOUNT_TABLE, 0x20000], ids=["L1", "table", "block"])
async def test_no_guest_write_reaches_the_metadata(image: Image, where: int) -> None:
    """An L2 entry that claims that data lies where the metadata does."""
    number(l2(image), 8, (1 << 63) | where)(image)
    metadata = bytes(image[where : where + 512])
    node = MemoryNode(image, name="disk")
    try:
        async with opened_over(node, OpenFlags(discard=True)) as disk:
            with pytest.raises(OSError):  # which one is not the point
                await disk.write(0, b"\xff" * 512)
    except (OSError, ImageError):
        pass
    found = bytes(node.content[where : where + 512])
    # The header may tell now that the image is corrupt.
    assert found[80:] == metadata[80:]
    assert found[:72] == metadata[:72]


async def test_a_compressed_cluster_of_rubbish_is_an_error_of_the_read(tmp_path: Path) -> None:
    path = golden("qcow2")["zlib"].unpack(tmp_path)
    data = bytearray(path.read_bytes())
    (l1,) = struct.unpack_from(">Q", data, 40)
    (entry,) = struct.unpack_from(">Q", data, l1)
    (cluster,) = struct.unpack_from(">Q", data, entry & 0x00FFFFFFFFFFFE00)
    assert cluster >> 62 & 1
    start = cluster & ((1 << 54) - 1)
    data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    async with opened(path) as node:
        with pytest.raises(OSError, match=r"."):
            await node.read_into(0, bytearray(512))
        await node.read_into(2 << 16, bytearray(512))


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
async def test_a_compressed_cluster_that_would_fill_the_memory(tmp_path: Path, kind: str) -> None:
    """A stream of zeroes that would become a hundred times a cluster is read as far as a cluster goes."""
    path = create(tmp_path / "disk.qcow2", SIZE, f"compression_type={kind}")
    qemu_io(path, "write -c -P 7 0 64k")
    async with opened(path, READ_ONLY) as node:
        found = await contents(node)
    assert found == (b"\x07" * 65536).ljust(SIZE, b"\0")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_short_run_of_the_fuzzer(seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "qcow2", "--seed", str(seed), "--count", "150", "--trace"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
