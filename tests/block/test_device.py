"""The `host_device` driver, on loop devices (which take root to make)."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from drivers.block.extents import ExtentFlags
from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags, Preallocation
from drivers.block.opening import open_image
from drivers.catalog import Catalog
from drivers.errors import OptionError, RequestError
from drivers.testing.contract import NodeContract, pattern
from drivers.testing.model import contents

SIZE = 1 << 20


def attached(path: Path, *options: str) -> Iterator[str]:
    try:
        completed = subprocess.run(
            ["losetup", "-f", "--show", *options, path], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make loop devices here: {error}")
    device = completed.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(SIZE))
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[str]:
    yield from attached(backing)


@pytest.fixture
def protected_device(backing: Path) -> Iterator[str]:
    yield from attached(backing, "-r")


@pytest.mark.parametrize("direct", [False, True])
class TestHostDevice(NodeContract):
    granularity = 512
    resizable = False

    @pytest.fixture(autouse=True)
    def _device(self, device: str, direct: bool) -> None:
        self.device = device
        self.direct = direct

    @property
    def size(self) -> int:
        return SIZE

    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        Path(self.device).write_bytes(content)
        tree = {"driver": "host_device", "filename": self.device, "cache": {"direct": self.direct}}
        node = await Graph(Catalog()).open(tree, flags)
        yield node
        await node.aclose()


async def test_discards_and_zeroes_reach_the_device(device: str, backing: Path) -> None:
    flags = OpenFlags(discard=True)
    node = await open_image(Graph(Catalog()), device, "raw", flags, warn=print)
    before = backing.stat().st_blocks
    await node.discard(0, 65536)
    await node.write_zeroes(65536, 65536, may_unmap=True, fast=True)
    await node.flush()
    assert backing.stat().st_blocks == before - 256
    with pytest.raises(RequestError) as caught:
        await node.write_zeroes(0, 4096, may_unmap=False, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert (await contents(node))[: 2 * 65536] == bytes(2 * 65536)
    assert [extent.flags for extent in await node.block_status(0, SIZE)] == [ExtentFlags.DATA]
    await node.aclose()


async def test_a_plain_name_of_a_device_is_a_host_device(device: str) -> None:
    node = await open_image(Graph(Catalog()), device, "raw", warn=print)
    child = node.children["file"].child
    assert (child.driver_name, child.limits.request_alignment) == ("host_device", 512)
    for size, how in ((512, Preallocation.OFF), (SIZE * 2, Preallocation.OFF), (SIZE, Preallocation.FULL)):
        with pytest.raises(RequestError):
            await node.truncate(size, preallocation=how)
    await node.truncate(SIZE)
    await node.aclose()
    with pytest.raises(OptionError, match=f"'file' driver requires '{device}' to be a regular file"):
        await Graph(Catalog()).open({"driver": "file", "filename": device})


async def test_a_regular_file_is_no_device(backing: Path) -> None:
    with pytest.raises(OptionError, match="to be a block device"):
        await Graph(Catalog()).open({"driver": "host_device", "filename": str(backing)})


async def test_a_write_protected_device_is_refused_or_opened_read_only(protected_device: str) -> None:
    tree = {"driver": "host_device", "filename": protected_device}
    with pytest.raises(OptionError, match="Permission denied"):
        await Graph(Catalog()).open(tree)
    node = await Graph(Catalog()).open(tree, OpenFlags(auto_read_only=True))
    assert node.flags.read_only
    await node.aclose()
