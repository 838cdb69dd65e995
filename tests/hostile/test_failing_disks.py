"""Images that fail, fill up, shrink or answer late while they are served."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from errno import EIO, ENOSPC
from pathlib import Path

import pytest

from drivers.wire.nbd.constants import Command, CommandFlag
from tests.hostile.client import STYLES, Client
from tests.hostile.conftest import SIZE, Serve, until

Fuse = Callable[..., Path]
MIB = 1 << 20
FUSE_SIZE = 16 * MIB

real_disk = pytest.mark.peer("nbdkit", "nbdfuse")


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Fuse]:
    """Mounts what an nbdkit plugin serves as a file: the kernel's page cache, then a disk whose
    every failure and delay is the test's to choose."""
    if os.geteuid() or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("mounting needs root and /dev/fuse")
    with contextlib.ExitStack() as cleanup:

        def mount(*nbdkit: str) -> Path:
            path = tmp_path / "fuse"
            path.touch()
            command = ["nbdfuse", str(path), "--command", "nbdkit", "-s", "--exit-with-parent", *nbdkit]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

            def unmount() -> None:
                subprocess.run(["umount", "-l", path], check=True)
                process.terminate()
                process.wait(10)

            cleanup.callback(unmount)
            until(lambda: path.stat().st_size == FUSE_SIZE)
            return path

        yield mount


def eval_plugin(**scripts: str) -> list[str]:
    """nbdkit's arguments for a disk of zeroes with some of its methods replaced."""
    methods = {
        "get_size": f"echo {FUSE_SIZE}",
        "pread": "dd if=/dev/zero count=$3 iflag=count_bytes",
        "pwrite": "cat >/dev/null",
        "can_write": "exit 0",
        "can_flush": "exit 0",
        "flush": "exit 0",
        **scripts,
    }
    return ["eval", *(f"{name}={script}" for name, script in methods.items())]


@real_disk
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("offset", "length"), [(3 * MIB, 4096), (3 * MIB, 70_000), (MIB, 4 * MIB)])
def test_a_read_that_fails_never_looks_like_data(
    fuse: Fuse, serve: Serve, style: str, offset: int, length: int
) -> None:
    """From 2 MiB on the disk is bad. An error, or where it is found too late to say so an end to the
    connection; a whole reply only for what could be read."""
    pread = '[ "$4" -lt 2097152 ] || { echo EIO >&2; exit 1; }; head -c $3 /dev/zero | tr "\\0" x'
    path = fuse(*eval_plugin(pread=pread))
    server = serve("-r", "-t", "-e", "0", "-f", "raw", str(path))
    with server.good(style) as client, server.good(style) as other:
        assert client.read(0, 100_000) == b"x" * 100_000
        client.send(client.begin(Command.READ, offset, length))
        try:
            assert client.reply().error == EIO
        except EOFError:
            assert style == "simple"
            assert client.at_end()
        else:
            assert client.read(0, 4096) == b"x" * 4096
        assert other.read(MIB, 4096) == b"x" * 4096


@real_disk
def test_a_flush_that_failed_is_reported_to_whoever_flushes(fuse: Fuse, serve: Serve) -> None:
    path = fuse(*eval_plugin(flush="echo EIO >&2; exit 1"))
    server = serve("-t", "-e", "0", "-f", "raw", str(path))
    with server.good() as client, server.good() as other:
        assert client.write(0, b"x" * 4096) == 0
        assert client.flush() == EIO
        assert client.flush() == EIO
        assert other.flush() == EIO
        assert client.write(0, b"x" * 4096, CommandFlag.FUA) == EIO
        assert client.write(0, b"x" * MIB, CommandFlag.FUA) == EIO
        assert client.call(Command.TRIM, 0, 4096, flags=CommandFlag.FUA).error == EIO
        assert client.read(0, 4096) == b"x" * 4096
    # What cannot be made durable is told when the image is closed, too.
    assert "Input/output error" in server.end(expected=1)


@real_disk
@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
def test_one_slow_disk_does_not_hold_up_the_other(
    fuse: Fuse, serve: Serve, disk: Path, command: Command
) -> None:
    """A file system that cannot be asked what is in the page cache; each request takes 0.1 s."""
    path = fuse(*eval_plugin(pread="sleep 0.1; head -c $3 /dev/zero", pwrite="sleep 0.1; cat >/dev/null"))
    server = serve(
        "-t", "-e", "0",
        "--export", f"slow=driver=raw,file.filename={path}",
        "--export", f"fast=driver=raw,file.filename={disk}",
    )  # fmt: skip
    with server.connect().go(name=b"slow") as slow, server.connect().go(name=b"fast") as fast:
        data = b"x" * 512 if command == Command.WRITE else b""
        slow.send(*(slow.begin(command, i * 900_000, 512, data=data, cookie=i) for i in range(16)))
        began = time.monotonic()
        for _ in range(100):
            fast.read(0, 4096)
        assert time.monotonic() - began < 0.9
        assert [slow.reply().error for _ in range(16)] == [0] * 16


def fills_up(client: Client, room: int) -> None:
    """Writes, short and long ones, beyond `room` get ENOSPC and the connection lives on."""
    for length in (512, 4096, 200_000, 3 * MIB):
        for flags in (0, CommandFlag.FUA):
            beyond = room + 2 * MIB
            assert client.write(beyond, b"\xaa" * length, flags) == ENOSPC
            assert client.read(beyond, length) == bytes(length)
    data = os.urandom(8192)
    assert client.write(0, data) == 0
    # From where there is room to where there is none.
    assert client.write(room - 4096, b"\xbb" * 3 * MIB) == ENOSPC
    assert client.read(0, 8192) == data
    assert client.flush() == 0


@pytest.mark.parametrize("style", STYLES)
def test_enospc_in_the_middle_of_a_write_is_reported(serve: Serve, disk: Path, style: str) -> None:
    room = 32 * MIB
    server = serve(
        "-t", "-e", "0", "-f", "raw", str(disk),
        setup=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )  # fmt: skip
    with server.good(style) as client:
        fills_up(client, room)
        fills_up(client, room)


@pytest.mark.parametrize("style", STYLES)
def test_a_file_system_in_memory_that_fills_up(serve: Serve, tmp_path: Path, style: str) -> None:
    """tmpfs: no RWF_NOWAIT, no zeroing of ranges; room for 8 MiB of an image of 64."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mountpoint], check=True)
    try:
        image = mountpoint / "image"
        with image.open("wb") as file:
            file.truncate(SIZE)
        server = serve("-t", "-e", "0", "--discard=unmap", "-f", "raw", str(image))
        with server.good(style) as client:
            block = b"\xaa" * MIB
            errors = [client.write(i * MIB, block) for i in range(20)]
            assert errors[0] == 0
            assert set(errors[9:]) == {ENOSPC}
            assert client.read(0, MIB) == block
            assert client.write(30 * MIB, b"x" * 4096) == ENOSPC
            # Room is made, and it goes on.
            assert client.call(Command.TRIM, 0, 4 * MIB).error == 0
            assert client.write(30 * MIB, block) == 0
            assert client.call(Command.WRITE_ZEROES, 30 * MIB, MIB).error == 0
            assert client.read(30 * MIB, MIB) == bytes(MIB)
            assert client.read(0, 4 * MIB) == bytes(4 * MIB)
            assert client.flush() == 0
        assert server.end() == ""
    finally:
        subprocess.run(["umount", mountpoint], check=True)


@pytest.mark.parametrize("style", STYLES)
def test_a_file_cut_while_it_is_served_reads_as_zeroes(serve: Serve, disk: Path, style: str) -> None:
    server = serve()
    with server.good(style) as client:
        assert client.write(0, b"x" * 4 * MIB) == 0
        os.truncate(disk, MIB + 100)
        for offset, length in [(MIB, 4096), (MIB, 60_000), (0, 4 * MIB), (SIZE - 4096, 4096)]:
            expected = (b"x" * (MIB + 100)).ljust(SIZE, b"\0")[offset : offset + length]
            assert client.read(offset, length) == expected
        assert client.write(3 * MIB, b"y" * 4096) == 0
        assert client.read(2 * MIB, 2 * MIB) == bytes(MIB) + b"y" * 4096 + bytes(MIB - 4096)
        os.truncate(disk, 0)
        assert client.read(0, SIZE // 4) == bytes(SIZE // 4)
    os.truncate(disk, SIZE)
    server.check()


def test_an_image_removed_while_it_is_served_is_still_there(serve: Serve, disk: Path) -> None:
    server = serve()
    server.check()
    disk.unlink()
    with server.good() as client:
        assert client.write(0, b"x" * 4096) == 0
        assert client.flush() == 0
        assert client.read(0, 4096) == b"x" * 4096
