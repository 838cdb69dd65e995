"""Servers that are stopped in the end, and images of many shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.programs import GiB, KiB, MiB, Server, Servers


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    started = Servers(tmp_path)
    try:
        yield started
    finally:
        started.stop()


def _file(path: Path, size: int, *pieces: tuple[int, int]) -> None:
    """A file with random bytes in `pieces`, (offset, length), and holes elsewhere."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in pieces:
            os.pwrite(file.fileno(), os.urandom(length), offset)


SHAPES = ("full", "sparse", "unwritten", "odd", "short", "large")


def make_image(directory: Path, shape: str) -> Path:
    path = directory / f"{shape}.raw"
    match shape:
        case "full":
            _file(path, 3 * MiB, (0, 3 * MiB))
        case "sparse":
            pieces = [(start * MiB + 64 * KiB, 192 * KiB) for start in range(0, 8, 2)]
            _file(path, 8 * MiB, *pieces, (8 * MiB - 4096, 4096))
        case "unwritten":
            _file(path, 4 * MiB, (MiB, MiB))
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, 4 * MiB)
        case "odd":
            _file(path, MiB + 700, (0, 64 * KiB), (MiB - 4096, 4096 + 700))
        case "short":
            _file(path, 1000, (0, 1000))
        case "large":
            _file(path, 5 * GiB, (0, 64 * KiB), (4 * GiB - 64 * KiB, 128 * KiB), (5 * GiB - 4096, 4096))
        case _:
            raise AssertionError(shape)
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images that nobody writes to, one of each shape."""
    directory = tmp_path_factory.mktemp("shapes")
    return {shape: make_image(directory, shape) for shape in SHAPES}


@pytest.fixture(scope="module", params=["unix", "tcp"])
def shape_server(
    request: pytest.FixtureRequest, shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """nbdserve with all shapes as exports, to be read only."""
    started = Servers(tmp_path_factory.mktemp("server"))
    exports = [f"--export={shape}=driver=raw,file.filename={path}" for shape, path in shapes.items()]
    try:
        yield started.nbdserve("-r", "-e", "0", "-A", *exports, tcp=request.param == "tcp")
    finally:
        started.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """8 MiB with several holes, to be written to."""
    return make_image(tmp_path, "sparse")
