"""nbdimg with an NBD server on either side."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.both import nbdimg

SERVERS = {"qemu-nbd": ("qemu-nbd",), "nbdserve": (sys.executable, "-m", "nbdserve")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "16M"], check=True)
    commands = ("-c", "write -P 5 1M 3M", "-c", "write -z 10M 1M", "-c", "write -P 6 15M 1000")
    subprocess.run(["qemu-io", *commands, path], check=True, stdout=subprocess.DEVNULL)
    return path


@contextlib.contextmanager
def served(server: str, path: Path, image_format: str) -> Iterator[str]:
    """The URI of the image, from when the server listens."""
    socket, pid_file = path.with_suffix(".sock"), path.with_suffix(".pid")
    options = ["-t", "-e", "0", "-f", image_format, "-k", socket, "--fork", "--pid-file", pid_file]
    subprocess.run([*SERVERS[server], *options, path], check=True)
    pid = int(pid_file.read_text())
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(ProcessLookupError):
            # No child of ours: it is gone when its lock on the image can be had.
            while pid_file.exists():
                os.kill(pid, 0)


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["qemu-img", "compare", "-q", one, other], check=False).returncode == 0


@pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_to_a_server_and_back(tmp_path: Path, source: Path, server: str, image_format: str) -> None:
    target, back = tmp_path / "target", tmp_path / "back.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, target, "16M"], check=True)
    with served(server, target, image_format) as uri:
        assert nbdimg("convert", "-n", "-O", "raw", source, uri, directory=tmp_path) == (0, "", "")
        assert nbdimg("convert", "-O", "qcow2", uri, back, directory=tmp_path) == (0, "", "")
        compared = nbdimg("compare", source, uri, directory=tmp_path)
        assert compared == (0, "Images are identical.\n", "")
    assert same(source, target)
    assert same(source, back)
    # What is a hole or zeroes in the source takes no storage on the way.
    assert back.stat().st_blocks * 512 < 4 << 20
    assert target.stat().st_blocks * 512 < 4 << 20


@pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd")
def test_the_map_over_nbd_is_that_of_the_image(tmp_path: Path, source: Path) -> None:
    with served("nbdserve", source, "qcow2") as uri:
        ours = nbdimg("map", "--output=json", uri, directory=tmp_path)
        theirs = subprocess.run(
            ["qemu-img", "map", "--output=json", uri], capture_output=True, text=True, check=True
        )
    assert ours == (0, theirs.stdout, "")
