"""Every I/O of an operation fails once: the guest is told, and the image stays in order."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from drivers.block.image import ImageNode
from drivers.errors import Error
from drivers.testing.faulty import FaultyNode
from drivers.testing.memory import MemoryNode
from drivers.testing.model import contents
from tests.qcow2.qemu import check, create, opened_over, qemu_io, raw_content, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 256 << 10
# What nobody need be told of: advice, and questions that have another answer.
ADVICE = ("discard", "block_status", "write_zeroes")


@dataclass(frozen=True)
class Operation:
    """`do` it, and then a flush. `reads`: what a disk that read so before reads like afterwards."""

    name: str
    do: Callable[[ImageNode], Awaitable[object]]
    reads: Callable[[bytearray], None] = lambda content: None


def _lay(offset: int, data: bytes) -> Callable[[bytearray], None]:
    def reads(content: bytearray) -> None:
        content[offset : offset + len(data)] = data

    return reads


def _write(name: str, offset: int, length: int) -> Operation:
    data = b"W" * length
    return Operation(name, lambda node: node.write(offset, data), _lay(offset, data))


OPERATIONS = [
    _write("write into an allocated cluster", 512, 1024),
    _write("write into an unallocated cluster", 128 << 10, 4096),
    _write("write a part of an unallocated cluster", (128 << 10) + 512, 512),
    _write("write across many clusters", 60 << 10, 100 << 10),
    _write("write into a cluster that a snapshot has", 16 << 10, 512),
    _write("write into a compressed cluster", 200 << 10, 512),
    Operation("zero", lambda node: node.write_zeroes(0, 96 << 10), _lay(0, bytes(96 << 10))),
    Operation("zero a part", lambda node: node.write_zeroes(512, 5000), _lay(512, bytes(5000))),
    Operation("discard", lambda node: node.discard(0, 64 << 10), _lay(0, bytes(64 << 10))),
    Operation("grow", lambda node: node.truncate(8 << 20)),
    Operation("shrink", lambda node: node.truncate(SIZE // 2)),
    Operation("take a snapshot", lambda node: node.snapshots.create("new")),  # type: ignore[union-attr]
    Operation("delete a snapshot", lambda node: node.snapshots.delete("old")),  # type: ignore[union-attr]
    Operation(
        "go back to a snapshot",
        lambda node: node.snapshots.apply("old"),  # type: ignore[union-attr]
        _lay(16 << 10, b"\x01" * 512),
    ),
    Operation("add a bitmap", lambda node: node.add_bitmap("new")),
    Operation("remove a bitmap", lambda node: node.remove_bitmap("old")),
]


@pytest.fixture(scope="module", params=["cluster_size=4k", "extended_l2=on,cluster_size=16k"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Data, a snapshot that shares it, a compressed cluster, a bitmap."""
    path = create(tmp_path_factory.mktemp("faults") / "disk.qcow2", SIZE, request.param)
    qemu_io(path, "write -P 1 0 64k", "write -c -P 2 192k 16k")
    run("qemu-img", "snapshot", "-c", "old", path)
    qemu_io(path, "write -P 3 0 16k")
    run("qemu-img", "bitmap", "--add", path, "old")
    return path.read_bytes()


async def attempt(
    disk: FaultyNode, operation: Operation, fault: dict[int, int] | None = None
) -> tuple[list[OSError | Error], int]:
    """Open, do it, flush, close: the errors on the way, and the first of the disk's calls after the
    opening; from there on `fault` counts, call to errno."""
    errors: list[OSError | Error] = []
    first = 0
    try:
        async with opened_over(disk) as node:
            first = len(disk.calls)
            disk.fail_call = {first + index: number for index, number in (fault or {}).items()}
            for step in (lambda: operation.do(node), node.flush):
                try:
                    await step()
                except (OSError, Error) as error:
                    errors.append(error)
    except (OSError, Error) as error:
        errors.append(error)
    return errors, first


async def over(image: bytes) -> tuple[FaultyNode, MemoryNode]:
    below = MemoryNode(bytearray(image))
    disk = FaultyNode(below, name="disk")
    await disk.use("file", below)
    return disk, below


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
async def test_every_io_fails_once(tmp_path: Path, image: bytes, operation: Operation, number: int) -> None:
    disk, below = await over(image)
    errors, first = await attempt(disk, operation)
    assert not errors
    after = await content_of(bytes(below.content))
    before = await content_of(image)
    calls = disk.calls[first:]
    assert calls
    for index, (kind, offset, length) in enumerate(calls):
        if kind == "close":
            continue
        disk, below = await over(image)
        errors, _ = await attempt(disk, operation, {index: number})
        told = f"{kind} {offset} {length}, call {index} of {len(calls)}"
        assert errors or kind in ADVICE, f"nobody was told of: {told}"
        for error in errors:
            assert isinstance(error, Error) or error.errno in (number, errno.EIO), told
        path = tmp_path / "disk.qcow2"
        path.write_bytes(below.content)
        check(path, leaks=True)
        found = await content_of(bytes(below.content))
        assert one_or_the_other(found, before, after), told
        assert raw_content(path) == found


async def content_of(image: bytes) -> bytearray:
    async with opened_over(MemoryNode(bytearray(image), name="disk")) as node:
        return await contents(node)


def one_or_the_other(found: bytearray, before: bytearray, after: bytearray) -> bool:
    """Each sector is as it was, or as it was to be."""
    if len(found) not in (len(before), len(after)):
        return False
    size = max(len(before), len(after))
    first, second, both = (data.ljust(size, b"\0") for data in (before, after, found))
    sectors = range(0, len(found), 512)
    return all(both[at : at + 512] in (first[at : at + 512], second[at : at + 512]) for at in sectors)


@pytest.mark.parametrize("operation", OPERATIONS[:9], ids=lambda operation: operation.name)
async def test_after_an_error_the_guest_tries_again_and_goes_on(
    tmp_path: Path, image: bytes, operation: Operation
) -> None:
    disk, below = await over(image)
    _, first = await attempt(disk, operation)
    for index in range(len(disk.calls) - first):
        disk, below = await over(image)
        expected = await content_of(image)
        async with opened_over(disk) as node:
            disk.fail_call = {len(disk.calls) + index: errno.ENOSPC}
            try:
                await operation.do(node)
                await node.flush()
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EIO)
                # What failed may have been done in part.
                await operation.do(node)
            disk.fail_call = {}
            await node.flush()
            operation.reads(expected)
            assert await contents(node) == expected
            await node.write(220 << 10, b"alive")
            expected[220 << 10 : (220 << 10) + 5] = b"alive"
        path = tmp_path / "disk.qcow2"
        path.write_bytes(below.content)
        check(path, leaks=True)
        assert raw_content(path) == expected


async def test_a_disk_that_fails_for_good_tells_so_and_can_be_closed(image: bytes) -> None:
    disk, below = await over(image)
    with pytest.raises(OSError, match="Input/output"):
        async with opened_over(disk) as node:
            disk.fail = {"write": errno.EIO, "flush": errno.EIO, "write_zeroes": errno.EIO}
            with pytest.raises(OSError, match="Input/output"):
                await node.write(128 << 10, b"x" * 70000)
                await node.flush()
    assert disk.closed
    assert await content_of(bytes(below.content)) == await content_of(image)
