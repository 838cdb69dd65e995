"""What the node contract promises when requests meet each other, failures and cancellation."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings

from drivers.block.edge import attach
from drivers.block.graph import Driver, Graph, OpenContext
from drivers.block.limits import Limits
from drivers.block.node import OpenFlags
from drivers.block.permission import ALL, NONE, Permission
from drivers.errors import OptionError, RequestError
from drivers.options.schema import Options
from drivers.testing.faulty import FaultyNode
from drivers.testing.memory import MemoryNode
from drivers.testing.model import Operation, operations, replay


async def faulty(
    size: int = 8192, *, alignment: int = 1, flags: OpenFlags | None = None
) -> tuple[FaultyNode, bytearray]:
    content = bytearray(b"\xaa" * size)
    child = MemoryNode(content, flags=OpenFlags(discard=True))
    node = FaultyNode(child, flags=flags)
    node.limits = Limits(request_alignment=alignment)
    await node.use("file", child)
    return node, content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=operations(max_size=1 << 14))
def test_any_sequence_of_requests_agrees_with_a_bytearray(steps: list[Operation]) -> None:
    async def main() -> None:
        for alignment in (1, 512):
            node, content = await faulty(5000, alignment=alignment, flags=OpenFlags(discard=True))
            await replay(node, bytearray(content), steps)
            await node.aclose()

    trio.run(main)


async def test_closing_waits_for_a_truncate_that_is_under_way() -> None:
    node, _ = await faulty()
    gate = node.gates["truncate"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.truncate, 512)
        await node.arrived("truncate")
        nursery.start_soon(node.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert not node.closed
        gate.set()
    assert node.closed
    assert node.size == 512


async def test_two_closers_close_once() -> None:
    node, _ = await faulty()
    gate = node.gates["flush"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.aclose)
        await node.arrived("flush")
        nursery.start_soon(node.aclose)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert [call[0] for call in node.calls].count("close") == 1


@pytest.mark.parametrize("operation", ["read_into", "write", "write_zeroes", "block_status"])
async def test_a_request_that_waited_for_a_truncate_is_checked_against_the_new_size(operation: str) -> None:
    node, content = await faulty()
    gate = node.gates["truncate"] = trio.Event()
    argument = {"read_into": bytearray(100), "write": b"x" * 100}.get(operation, 100)

    async def request() -> None:
        with pytest.raises(RequestError) as caught:
            await getattr(node, operation)(4000, argument)
        assert caught.value.errno == errno.EINVAL

    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.truncate, 512)
        await node.arrived("truncate")
        nursery.start_soon(request)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert len(content) == 512
    assert [call[0] for call in node.calls] == ["truncate"]
    await node.aclose()


@pytest.mark.parametrize("operation", ["read_into", "flush", "truncate"])
async def test_a_request_that_waited_for_the_close_finds_the_node_closed(operation: str) -> None:
    node, _ = await faulty()
    gate = node.gates["flush"] = trio.Event()
    arguments = {"read_into": (0, bytearray(1)), "flush": (), "truncate": (512,)}[operation]

    async def request() -> None:
        with pytest.raises(RequestError) as caught:
            await getattr(node, operation)(*arguments)
        assert caught.value.errno == errno.ENOMEDIUM

    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.aclose)
        await node.arrived("flush")
        nursery.start_soon(request)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert [call[0] for call in node.calls] == ["flush", "close"]


async def test_closing_waits_for_a_flush_that_is_under_way() -> None:
    node, _ = await faulty()
    gate = node.gates["flush"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.flush)
        await node.arrived("flush")
        nursery.start_soon(node.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert not node.closed
        gate.set()


async def test_a_tail_that_grew_while_a_write_waited_is_not_overwritten() -> None:
    """The write ended at the node's size when it came; when it is done there is more behind it."""
    node, content = await faulty(1000, alignment=512)
    gate = node.gates["truncate"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.truncate, 2048)
        await node.arrived("truncate")
        nursery.start_soon(node.write, 990, b"t" * 10)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert content == b"\xaa" * 990 + b"t" * 10 + bytes(1048)
    assert ("write", 512, 512) in node.calls
    await node.aclose()


@pytest.mark.parametrize("operation", ["write_zeroes", "discard"])
async def test_a_tail_that_grew_while_zeroes_waited_is_not_sent_unaligned(operation: str) -> None:
    node, content = await faulty(1000, alignment=512, flags=OpenFlags(discard=True))
    gate = node.gates["truncate"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.truncate, 2048)
        await node.arrived("truncate")
        nursery.start_soon(getattr(node, operation), 512, 488)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert (operation, 512, 488) not in node.calls
    tail = bytes(488) if operation == "write_zeroes" else b"\xaa" * 488
    assert content == b"\xaa" * 512 + tail + bytes(1048)
    await node.aclose()


async def test_the_fast_path_is_closed_while_a_block_is_read_modified_and_written() -> None:
    node, content = await faulty(alignment=512)
    gate = node.gates["write"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write, 100, b"x")
        await node.arrived("write")
        assert node.requests.guarded == 1
        gate.set()
    assert node.requests.guarded == 0
    assert content[100] == ord("x")
    await node.aclose()


async def test_held_spans_delay_whoever_would_move_them() -> None:
    node, _ = await faulty()
    request = node.hold(0, 512)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.truncate, 512)
        await trio.testing.wait_all_tasks_blocked()
        assert node.plain(0, 1) is None
        assert node.calls == []
        node.release(request)
    assert node.size == 512
    await node.aclose()


async def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    node, _ = await faulty(alignment=512)
    gate = node.gates["write"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.write, 1, b"x")
        await node.arrived("write")
        with trio.move_on_after(0) as waiting:
            await node.write(2, b"y")
        assert waiting.cancelled_caught
        gate.set()
    assert node.requests.guarded == 0
    with trio.fail_after(5):
        await node.truncate(512)
        await node.aclose()


async def test_a_failure_reaches_the_caller_and_the_node_lives_on() -> None:
    node, content = await faulty()
    node.fail["write"] = errno.ENOSPC
    with pytest.raises(OSError, match=r"No space left") as caught:
        await node.write(0, b"x", fua=True)
    assert caught.value.errno == errno.ENOSPC
    del node.fail["write"]
    await node.write(0, b"x")
    assert content[0] == ord("x")
    await node.aclose()


async def test_a_late_flush_failure_reaches_the_caller() -> None:
    node, _ = await faulty()
    node.supports_fua = False  # type: ignore[misc]
    node.fail["flush"] = errno.EIO
    for request in (node.flush(), node.write(0, b"x", fua=True), node.write_zeroes(0, 1, fua=True)):
        with pytest.raises(OSError, match="Input/output error"):
            await request
    with pytest.raises(OSError, match="Input/output error"):
        await node.aclose()
    assert node.closed
    assert node.calls[-1][0] == "close"


async def test_an_unsafe_cache_never_flushes() -> None:
    node, _ = await faulty(flags=OpenFlags(no_flush=True))
    node.supports_fua = False  # type: ignore[misc]
    await node.write(0, b"x", fua=True)
    await node.write_zeroes(0, 1, fua=True)
    await node.flush()
    await node.aclose()
    assert "flush" not in [call[0] for call in node.calls]


async def test_zeroes_are_written_where_they_cannot_be_made_but_never_when_fast() -> None:
    node, content = await faulty()
    node.fail["write_zeroes"] = errno.ENOTSUP
    with pytest.raises(OSError, match="Operation not supported"):
        await node.write_zeroes(0, 4096, fast=True)
    assert content == b"\xaa" * 8192
    await node.write_zeroes(0, 4096)
    assert content == bytes(4096) + b"\xaa" * 4096
    await node.aclose()


async def test_a_read_only_node_is_not_to_be_used_for_writing() -> None:
    node = MemoryNode(bytearray(512), flags=OpenFlags(read_only=True))
    with pytest.raises(OptionError, match="Block node is read-only"):
        await attach("root", node, user="test", needed=Permission.WRITE, shared=ALL)
    assert node.parents == []
    await attach("root", node, user="test", needed=Permission.CONSISTENT_READ, shared=ALL)


async def test_users_that_exclude_each_other() -> None:
    node = MemoryNode(bytearray(512))
    first = await attach("root", node, user="first", needed=Permission.WRITE, shared=ALL & ~Permission.RESIZE)
    with pytest.raises(OptionError, match="Conflicts with use by first as 'root'"):
        await attach("root", node, user="second", needed=Permission.RESIZE, shared=ALL)
    with pytest.raises(OptionError, match="does not allow 'write'"):
        await attach("root", node, user="second", needed=Permission.CONSISTENT_READ, shared=Permission.RESIZE)
    assert node.parents == [first]
    await first.detach()
    assert node.closed


class Broken(MemoryNode):
    """Attaches its child and then finds that the image is malformed."""

    driver_name = "broken"

    @classmethod
    async def open(cls, context: OpenContext, options: Options, /) -> MemoryNode:
        await cls(bytearray(), name=context.name).use("file", await context.child(options))
        raise OptionError("broken")


class TwoDrivers:
    """A catalog that keeps the nodes of its memory driver in sight."""

    def __init__(self) -> None:
        self.opened: list[MemoryNode] = []

    def driver(self, name: str) -> Driver:
        opened = self.opened

        class Seen(MemoryNode):
            def __init__(self, content: bytearray, **arguments: Any) -> None:
                super().__init__(content, **arguments)
                opened.append(self)

        return Broken if name == "broken" else Seen


async def test_an_open_that_fails_late_leaves_nothing_open() -> None:
    catalog = TwoDrivers()
    graph = Graph(catalog)
    with pytest.raises(OptionError, match="broken"):
        await graph.open({"driver": "broken", "file": {"driver": "memory", "size": 512}})
    assert [node.closed for node in catalog.opened] == [True]
    assert graph.nodes == {}


async def test_a_close_that_fails_gives_everything_back() -> None:
    class Stubborn(MemoryNode):
        async def _flush(self) -> None:
            raise OSError(errno.EIO, "the disk is gone")

        async def _close(self) -> None:
            raise OSError(errno.EIO, "the disk is gone")

    class Pair(MemoryNode):
        def _child_permissions(
            self, role: str, needed: Permission, shared: Permission, /
        ) -> tuple[Permission, Permission]:
            return NONE, ALL

    told: list[str] = []
    children = [Stubborn(bytearray(512), name=f"child{number}") for number in range(2)]
    node = Pair(bytearray(512), name="parent")
    node.on_close(lambda: told.append("parent"))
    for child in children:
        await node.use(child.name, child)
    with pytest.raises(OSError, match="the disk is gone"):
        await node.aclose()
    assert told == ["parent"]
    assert all(child.closed for child in children)
