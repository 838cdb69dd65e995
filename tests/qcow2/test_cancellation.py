"""Every request is cancelled at each of its steps, before and after it had its effect: the image stays in
order, and each sector is as it was or as it was to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from drivers.block.node import OpenFlags
from drivers.errors import Error
from drivers.testing.faulty import FaultyNode
from drivers.testing.memory import MemoryNode
from drivers.testing.model import contents
from tests.qcow2 import test_faults
from tests.qcow2.qemu import check, opened_over, raw_content
from tests.qcow2.test_faults import OPERATIONS, Operation, content_of, one_or_the_other

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

image = test_faults.image


class Interrupting(FaultyNode):
    """Cancels `scope` in the call with the number `at`; `before` it has an effect, or after it."""

    at = -1
    before = False
    scope: trio.CancelScope | None = None

    async def _step(self, operation: str, offset: int = 0, length: int = 0) -> None:
        await super()._step(operation, offset, length)
        if len(self.calls) - 1 == self.at and self.scope is not None:
            self.scope.cancel()
            if self.before:
                await trio.lowlevel.checkpoint()


async def attempt(
    image: bytes, operation: Operation, at: int, *, before: bool
) -> tuple[MemoryNode, bytearray, int]:
    """The disk, what the guest read when all was over, and how many calls there were."""
    below = MemoryNode(bytearray(image), name="below")
    disk = Interrupting(below, name="disk")
    await disk.use("file", below)
    async with opened_over(disk, OpenFlags(discard=True)) as node:
        first = len(disk.calls)
        disk.at, disk.before = first + at if at >= 0 else -1, before
        with trio.CancelScope() as disk.scope:
            await operation.do(node)
            await node.flush()
        calls = len(disk.calls) - first
        found = await contents(node)
        # It goes on as if nothing had happened.
        await node.write(0, bytes(found[:512]))
        await node.flush()
    return below, found, calls


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
async def test_every_step_is_cancelled(
    tmp_path: Path, image: bytes, operation: Operation, before: bool
) -> None:
    old = await content_of(image)
    disk, new, calls = await attempt(image, operation, -1, before=before)
    for at in range(calls):
        try:
            disk, found, _ = await attempt(image, operation, at, before=before)
        except (OSError, Error) as error:
            raise AssertionError(f"call {at} of {calls}") from error
        assert one_or_the_other(found, old, new), at
        path = tmp_path / "disk.qcow2"
        path.write_bytes(disk.content)
        check(path, leaks=True)
        assert raw_content(path) == found, at
