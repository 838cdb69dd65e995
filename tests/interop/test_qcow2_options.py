"""The options that say how an image is opened, with qcow2 and real clients; qemu-img has the last word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.interop.programs import KiB, MiB, Servers, run
from tests.interop.test_fio import fio
from tests.qcow2.qemu import check, create, qemu_io, raw_content

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "fio")

BOTH = pytest.mark.parametrize("program", [Servers.nbdserve, Servers.qemu_nbd], ids=["nbdserve", "qemu-nbd"])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2", 32 * MiB)


def change(server, *script: str) -> None:
    words = [word for line in script for word in ("-c", line)]
    run("qemu-io", "-f", "raw", "-d", "unmap", *words, server.uri)


def storage(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path.stat().st_blocks * 512


MODES = [
    ("--cache=writeback",),
    ("--cache=writethrough",),
    ("--cache=none",),
    ("--cache=none", "--aio=threads"),
    ("--cache=none", "--aio=native"),
    ("--cache=none", "--aio=io_uring"),
    ("--cache=directsync",),
    ("--cache=unsafe",),
    ("--cache=writeback", "--aio=io_uring"),
]


@pytest.mark.parametrize("layout", ["", "cluster_size=512", "extended_l2=on"])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_every_cache_mode_keeps_what_was_written(
    servers: Servers, tmp_path: Path, mode: tuple[str, ...], layout: str
) -> None:
    path = create(tmp_path / "disk.qcow2", 16 * MiB, layout)
    server = servers.nbdserve("-e", "0", "-f", "qcow2", "--discard=unmap", *mode, path)
    slow = "writethrough" in mode[0] or "directsync" in mode[0]
    fio(
        server, "--rw=randwrite", "--bssplit=512/10:4k/40:64k/30:100k/20", "--verify=crc32c",
        "--verify_fatal=1", "--iodepth=8", "--numjobs=2", "--offset_increment=4m", "--size=4m",
        f"--io_size={'256k' if slow else '1m'}", "--randseed=5", "--fsync=64",
    )  # fmt: skip
    change(server, "write -P 5 11111k 3k", "discard 12M 128k", "write -z 13M 100k", "flush")
    run("qemu-io", "-f", "raw", "-c", "read -P 5 11111k 3k", "-c", "read -P 0 13M 100k", server.uri)
    served = run("qemu-img", "convert", "-O", "raw", server.uri, tmp_path / "served")
    assert served == ""
    server.stop()
    check(path)
    assert raw_content(path) == (tmp_path / "served").read_bytes()


@BOTH
def test_a_temporary_overlay_leaves_the_image_alone(servers: Servers, disk: Path, program) -> None:
    qemu_io(disk, "write -P 1 0 1M")
    before = disk.read_bytes()
    server = program(servers, "-e", "0", "-f", "qcow2", "-s", disk)
    change(server, "write -P 2 64k 64k", "discard 0 64k", "write -z 128k 64k", "flush")
    run("qemu-io", "-f", "raw", "-c", "read -P 2 64k 64k", "-c", "read -P 0 128k 64k", server.uri)
    server.stop()
    assert disk.read_bytes() == before


@BOTH
@pytest.mark.parametrize(("mode", "freed"), [("ignore", False), ("unmap", True)])
def test_discard(servers: Servers, disk: Path, program, mode: str, freed: bool) -> None:
    qemu_io(disk, "write -P 1 0 8M")
    before = storage(disk)
    server = program(servers, "-f", "qcow2", f"--discard={mode}", disk)
    change(server, "discard 0 4M", "flush")
    server.stop()
    check(disk)
    assert abs(storage(disk) - before + (4 * MiB if freed else 0)) <= 64 * KiB
    assert set(raw_content(disk)[: 4 * MiB]) == ({0} if freed else {1})


@BOTH
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((), True),
        (("--detect-zeroes=on",), False),
        (("--discard=unmap", "--detect-zeroes=unmap"), False),
    ],
    ids=["off", "on", "unmap"],
)
def test_detect_zeroes(servers: Servers, disk: Path, program, options: tuple[str, ...], kept: bool) -> None:
    """Zeroes that are written into an empty image take no clusters, where they are noticed."""
    server = program(servers, "-f", "qcow2", *options, disk)
    change(server, "write -P 0 0 8M", "write -P 7 8M 64k", "flush")
    server.stop()
    check(disk)
    assert raw_content(disk)[: 8 * MiB + 64 * KiB] == bytes(8 * MiB) + b"\x07" * 64 * KiB
    assert (disk.stat().st_size > 8 * MiB) is kept
