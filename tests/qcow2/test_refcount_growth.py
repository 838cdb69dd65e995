"""The refcount table moves to where it has room: whatever goes wrong just then, what it led to stays in
use."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from drivers.block.node import OpenFlags
from drivers.errors import Error
from drivers.testing.faulty import FaultyNode
from drivers.testing.memory import MemoryNode
from drivers.testing.model import contents
from tests.qcow2.qemu import check, create, opened_over, raw_content

pytestmark = pytest.mark.peer("qemu-img")

SIZE = 4 << 20
# Just before a table of one cluster of 512 bytes is full: it leads to 64 blocks of 64 clusters each.
FILLED = 1920 << 10
PIECE = 32 << 10


class Interrupting(FaultyNode):
    """Cancels `scope` during the call with the number `at`: before it has an effect, or after it."""

    at = -1
    before = False
    scope: trio.CancelScope | None = None

    async def _step(self, operation: str, offset: int = 0, length: int = 0) -> None:
        await super()._step(operation, offset, length)
        if len(self.calls) - 1 == self.at and self.scope is not None:
            self.scope.cancel()
            if self.before:
                await trio.lowlevel.checkpoint()


@pytest.fixture
async def image(tmp_path: Path) -> bytes:
    path = create(tmp_path / "disk.qcow2", SIZE, "cluster_size=512,refcount_bits=64")
    disk = MemoryNode(bytearray(path.read_bytes()), name="disk")
    async with opened_over(disk) as node:
        await node.write(0, b"f" * FILLED)
    return bytes(disk.content)


async def attempt(
    image: bytes, *, fault: int = -1, cancel: int = -1, before: bool = False
) -> tuple[list[tuple[str, int, int]], MemoryNode, bytes]:
    """Write until the table has grown, with an error or a cancellation on the way; try again, and go on.
    The calls there were, the disk, what the guest has written."""
    below = MemoryNode(bytearray(image), name="below")
    disk = Interrupting(below, name="disk")
    await disk.use("file", below)
    expected = bytearray(b"f" * FILLED).ljust(SIZE, b"\0")
    async with opened_over(disk, OpenFlags(discard=True)) as node:
        first = len(disk.calls)
        disk.fail_call = {first + fault: errno.EIO} if fault >= 0 else {}
        disk.at, disk.before = (first + cancel if cancel >= 0 else -1), before
        for at in range(FILLED, FILLED + 4 * PIECE, PIECE):
            data = bytes((at // PIECE & 0xFF | 1,)) * PIECE
            for _ in range(2):
                try:
                    with trio.CancelScope() as disk.scope:
                        await node.write(at, data)
                        await node.flush()
                        break
                except (OSError, Error):
                    pass
            else:
                raise AssertionError("it fails for good")
            expected[at : at + PIECE] = data
        made = disk.calls[first:]
        await node.discard(0, PIECE)
        expected[:PIECE] = bytes(PIECE)
        await node.flush()
        await node.write(0, b"n" * PIECE)
        expected[:PIECE] = b"n" * PIECE
        assert await contents(node) == expected
    return made, below, bytes(expected)


@pytest.mark.parametrize("kind", ["fault", "cancelled before", "cancelled after"])
async def test_the_refcount_table_grows(tmp_path: Path, image: bytes, kind: str) -> None:
    calls, _, _ = await attempt(image)
    path = tmp_path / "disk.qcow2"
    header = calls.index(("write", 0, 512))
    for index in range(header - 10, header + 10):
        if kind == "fault":
            _, disk, expected = await attempt(image, fault=index)
        else:
            _, disk, expected = await attempt(image, cancel=index, before=kind.endswith("before"))
        path.write_bytes(disk.content)
        check(path, leaks=True)
        assert raw_content(path) == expected, index
