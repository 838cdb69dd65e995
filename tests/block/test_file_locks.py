"""Locks on image files, against real QEMU processes: each refuses the other, in both directions."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from drivers.block.edge import Edge, attach
from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.block.permission import ALL, NONE, Permission
from drivers.catalog import Catalog
from drivers.errors import OptionError
from drivers.protocol.file import locks
from drivers.protocol.file.locks import ImageLocks

pytestmark = pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io")

# What an NBD export holds and shares.
READ = Permission.CONSISTENT_READ
READ_WRITE = READ | Permission.WRITE
SHARED = ALL & ~Permission.RESIZE


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@asynccontextmanager
async def exported(
    path: Path, needed: Permission = READ_WRITE, shared: Permission = SHARED, **options: Any
) -> AsyncIterator[tuple[Node, Edge]]:
    """The image as a server holds it: raw over file, used with these permissions."""
    flags = OpenFlags(read_only=not needed & Permission.WRITE, force_share=options.pop("force_share", False))
    child = {"driver": "file", "filename": str(path), **options}
    node = await Graph(Catalog()).open({"driver": "raw", "file": child}, flags)
    try:
        edge = await attach("root", node, user="export", needed=needed, shared=shared)
    except BaseException:
        await node.aclose()
        raise
    yield node, edge
    await edge.detach()


def lock_bytes(path: Path) -> set[int]:
    """The bytes of `path` that anyone has locked."""
    inode = path.stat().st_ino
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        if match := re.search(rf"OFDLCK .* READ .*:{inode} (\d+) (\d+)$", line):
            found |= set(range(int(match[1]), int(match[2]) + 1))
    return found


@asynccontextmanager
async def qemu_nbd(*arguments: str, socket: Path) -> AsyncIterator[None]:
    """A qemu-nbd that has opened its image."""
    command = ["qemu-nbd", "-t", "-k", str(socket), *arguments]
    process = subprocess.Popen(command)
    try:
        with trio.fail_after(20):
            # It listens before it opens the image, and greets after.
            while not await greeted(socket):
                assert process.poll() is None
        yield
    finally:
        process.kill()  # a SIGTERM that comes while it starts is lost on it
        await trio.to_thread.run_sync(process.wait)


async def greeted(socket: Path) -> bool:
    try:
        stream = await trio.open_unix_socket(str(socket))
    except (FileNotFoundError, ConnectionRefusedError):
        await trio.lowlevel.checkpoint()
        return False
    async with stream:
        return await stream.receive_some(8) == b"NBDMAGIC"


async def qemu(*command: str | Path) -> tuple[int, str]:
    completed = await trio.run_process(
        [str(part) for part in command], capture_stdout=True, capture_stderr=True, check=False
    )
    return completed.returncode, (completed.stdout + completed.stderr).decode()


@pytest.mark.parametrize(
    ("options", "needed", "image"),
    [
        ([], READ_WRITE, "driver=raw,file.driver=file,file.filename={}"),
        (["-r"], READ, "driver=raw,file.driver=file,file.filename={}"),
        ([], READ_WRITE, "driver=raw,file.driver=file,file.locking=off,file.filename={}"),
        (["-r"], READ, "driver=raw,read-only=on,force-share=on,file.driver=file,file.filename={}"),
    ],
    ids=["writable", "read-only", "off", "force-share"],
)
async def test_we_lock_the_bytes_that_qemu_nbd_locks(
    tmp_path: Path, disk: Path, options: list[str], needed: Permission, image: str
) -> None:
    async with qemu_nbd(*options, "--image-opts", image.format(disk), socket=tmp_path / "s"):
        expected = lock_bytes(disk)
    assert lock_bytes(disk) == set()
    ours = {"locking": "off"} if "locking=off" in image else {}
    async with exported(disk, needed, force_share="force-share" in image, **ours):
        assert lock_bytes(disk) == expected
    assert lock_bytes(disk) == set()


async def test_qemu_is_refused_what_conflicts_with_us_and_given_the_rest(disk: Path) -> None:
    asked = f"Is another process using the image [{disk}]?"
    async with exported(disk):
        code, output = await qemu("qemu-img", "resize", "-f", "raw", disk, "2M")
        assert code == 1
        assert 'Failed to get "resize" lock' in output
        assert asked in output
        assert (await qemu("qemu-img", "info", disk))[0] == 0
        assert (await qemu("qemu-img", "info", "-U", disk))[0] == 0
        assert (await qemu("qemu-io", "-f", "raw", "-c", "write 0 512", disk))[0] == 0
        code, output = await qemu("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", disk, disk)
        assert code == 1
        assert 'Failed to get shared "write" lock' in output
    assert (await qemu("qemu-img", "resize", "-f", "raw", disk, "2M"))[0] == 0


async def test_who_shares_no_writing_keeps_qemus_writers_out(disk: Path) -> None:
    async with exported(disk, READ, READ):
        code, output = await qemu("qemu-io", "-f", "raw", "-c", "write 0 512", disk)
        assert code == 1
        assert 'Failed to get "write" lock' in output
        assert (await qemu("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", disk))[0] == 0
    async with exported(disk, READ, READ, locking="off"):
        assert (await qemu("qemu-io", "-f", "raw", "-c", "write 0 512", disk))[0] == 0


async def test_we_are_refused_what_conflicts_with_qemu(tmp_path: Path, disk: Path) -> None:
    async with qemu_nbd("-f", "raw", str(disk), socket=tmp_path / "s"):
        with pytest.raises(OptionError) as caught:
            async with exported(disk, READ_WRITE | Permission.RESIZE):
                pass
        assert str(caught.value) == (
            f'Failed to get "resize" lock\nIs another process using the image [{disk}]?'
        )
        with pytest.raises(OptionError, match='Failed to get shared "write" lock'):
            async with exported(disk, READ, READ):
                pass
        before = lock_bytes(disk)
        async with exported(disk):
            pass  # qemu-nbd shares writing, and so do we
        async with exported(disk, READ, READ, force_share=True):
            pass
        assert lock_bytes(disk) == before
    async with exported(disk, READ_WRITE | Permission.RESIZE):
        pass


async def test_two_of_our_own_images_conflict_too(disk: Path) -> None:
    async with exported(disk):
        with pytest.raises(OptionError, match='Failed to get "resize" lock'):
            async with exported(disk, Permission.RESIZE):
                pass
        async with exported(disk):
            pass


async def test_a_refused_change_leaves_permissions_and_locks_as_they_were(disk: Path) -> None:
    async with exported(disk) as (node, edge), exported(disk, READ, SHARED):
        before = lock_bytes(disk)
        with pytest.raises(OptionError, match="resize"):
            await edge.set_permissions(READ_WRITE | Permission.RESIZE, NONE)
        assert (edge.needed, edge.shared) == (READ_WRITE, SHARED)
        child = node.children["file"]
        assert (child.needed, child.shared) == (READ_WRITE, SHARED)
        assert lock_bytes(disk) == before
        await edge.set_permissions(READ, ALL)
    async with exported(disk) as (node, edge):
        await edge.set_permissions(READ, ALL)
        assert lock_bytes(disk) == {100}
    assert lock_bytes(disk) == set()


async def test_a_cancelled_user_gives_its_locks_up_all_the_same(disk: Path) -> None:
    async with exported(disk, READ, ALL) as (node, _):
        edge = await attach("root", node, user="second", needed=READ, shared=READ)
        assert lock_bytes(disk) == {100, 201, 202, 203}
        with trio.CancelScope() as scope:
            scope.cancel()
            await edge.detach()
        assert lock_bytes(disk) == {100}


async def test_a_part_of_a_file_relies_on_its_size(disk: Path) -> None:
    tree = {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": str(disk)}}
    node = await Graph(Catalog()).open(tree, OpenFlags(read_only=True))
    edge = await attach("root", node, user="test", needed=READ, shared=ALL)
    assert lock_bytes(disk) == {100, 203}
    await edge.detach()


def test_a_foreign_exclusive_lock_is_reported(disk: Path) -> None:
    with disk.open("r+b") as foreign, disk.open("rb") as ours:
        fcntl.lockf(foreign, fcntl.LOCK_EX, 1, 100)
        with pytest.raises(OptionError, match="Failed to lock byte 100"):
            ImageLocks(ours.fileno(), "disk").change(READ, ALL)


async def test_without_ofd_locks_only_auto_opens(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(fd: int, byte: int) -> bool:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(locks, "_holder_exists", unable)
    async with exported(disk):
        assert lock_bytes(disk) == set()
    with pytest.raises(OptionError, match="no OFD locks"):
        async with exported(disk, locking="on"):
            pass


def test_the_descriptor_takes_its_locks_with_it(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR)
    ImageLocks(fd, "disk").change(ALL, NONE)
    assert lock_bytes(disk) == {100, 101, 102, 103, 200, 201, 202, 203}
    # A POSIX lock would be lost with this.
    os.close(os.open(disk, os.O_RDONLY))
    assert len(lock_bytes(disk)) == 8
    os.close(fd)
    assert lock_bytes(disk) == set()
