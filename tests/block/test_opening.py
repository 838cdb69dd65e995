"""Opening images by name: probing, its warning, and what stays open after a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from drivers.block.graph import Graph
from drivers.block.node import OpenFlags
from drivers.block.opening import open_image, open_options
from drivers.catalog import Catalog
from drivers.errors import ImageError, OptionError, RequestError


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.peer("qemu-nbd", "qemu-io")
async def test_a_probed_writable_raw_image_warns_as_qemu_does(disk: Path) -> None:
    completed = await trio.run_process(["qemu-io", "-c", "quit", str(disk)], capture_stderr=True)
    warnings: list[str] = []
    node = await open_image(Graph(Catalog()), str(disk), warn=warnings.append)
    assert warnings == [completed.stderr.decode().rstrip("\n")]
    with pytest.raises(RequestError, match="qcow2"):
        await node.write(0, b"QFI\xfb\0\0\0\3")
    await node.aclose()


async def test_naming_the_format_or_not_writing_needs_no_warning(disk: Path) -> None:
    warnings: list[str] = []
    node = await open_image(Graph(Catalog()), str(disk), "raw", warn=warnings.append)
    await node.write(0, b"QFI\xfb\0\0\0\3")
    await node.aclose()
    graph = Graph(Catalog())
    with pytest.raises(ImageError):
        await open_image(graph, str(disk), warn=warnings.append)
    assert graph.nodes == {}
    await trio.to_thread.run_sync(disk.write_bytes, bytes(512))
    node = await open_image(graph, str(disk), flags=OpenFlags(read_only=True), warn=warnings.append)
    assert node.driver_name == "raw"
    await node.aclose()
    assert graph.nodes == {}
    assert warnings == []


async def test_options_without_a_driver_are_probed(disk: Path) -> None:
    warnings: list[str] = []
    graph = Graph(Catalog())
    tree = {"offset": "512", "file": {"driver": "file", "filename": str(disk)}}
    node = await open_options(graph, tree, warn=warnings.append)
    assert node.size == (1 << 20) - 512
    assert len(warnings) == 1
    await node.aclose()
    assert graph.nodes == {}
    with pytest.raises(OptionError, match="Must specify either driver or file"):
        await open_options(graph, {}, warn=warnings.append)


async def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"Could not open '.*/missing': No such file or directory"):
        await open_image(Graph(Catalog()), str(tmp_path / "missing"), warn=print)


async def test_an_empty_file_is_raw(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    node = await open_image(Graph(Catalog()), str(path), flags=OpenFlags(read_only=True), warn=print)
    assert (node.driver_name, node.size) == ("raw", 0)
    await node.aclose()
