"""Clusters that are given up and used again: nobody who comes late sees or destroys somebody else's
bytes."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
import trio
import trio.testing

from drivers.block.node import OpenFlags
from drivers.testing.faulty import FaultyNode
from drivers.testing.memory import MemoryNode
from drivers.testing.powercut import PowerCutNode
from tests.qcow2.qemu import check, create, opened_over

pytestmark = pytest.mark.peer("qemu-img")

CLUSTER = 64 << 10
SIZE = 1 << 20
DISCARDING = OpenFlags(discard=True)


async def faulty(tmp_path: Path) -> tuple[FaultyNode, PowerCutNode]:
    path = create(tmp_path / "disk.qcow2", SIZE)
    below = PowerCutNode(path.read_bytes(), name="below")
    disk = FaultyNode(below, name="disk")
    await disk.use("file", below)
    return disk, below


async def test_compressed_data_are_not_packed_into_what_the_host_is_told_to_forget(tmp_path: Path) -> None:
    disk, _ = await faulty(tmp_path)
    async with opened_over(disk, DISCARDING, {"pass-discard-other": True}) as node:
        await node.write_compressed(0, b"a" * CLUSTER)
        await node.flush()
        await node.discard(0, CLUSTER)
        gate = disk.gates["discard"] = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.flush)
            await disk.arrived("discard")
            nursery.start_soon(node.write_compressed, CLUSTER, b"b" * CLUSTER)
            for _ in range(50):  # compressing takes a thread
                await trio.testing.wait_all_tasks_blocked(0.001)
            gate.set()
        await node.flush()
        found = bytearray(CLUSTER)
        await node.read_into(CLUSTER, found)
        assert found == b"b" * CLUSTER


async def test_what_was_decompressed_is_not_taken_for_what_lies_there_later(tmp_path: Path) -> None:
    disk, _ = await faulty(tmp_path)
    async with opened_over(disk, DISCARDING) as node:
        await node.write(CLUSTER, b"p" * CLUSTER)
        for turn in range(40):
            # Of one length, so that one follows the other with the same descriptor.
            data = random.Random(turn).randbytes(8000).ljust(CLUSTER, b"\0")
            await node.write_compressed(0, data)
            await node.flush()
            found = bytearray(CLUSTER)
            await node.read_into(0, found)
            assert found == data, turn
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.read_into, 0, bytearray(2 * CLUSTER))
                await trio.lowlevel.checkpoint()
                nursery.start_soon(node.discard, 0, CLUSTER)
            await node.flush()


async def test_a_host_that_cannot_discard_loses_no_clusters(tmp_path: Path) -> None:
    disk, below = await faulty(tmp_path)
    async with opened_over(disk, DISCARDING) as node:
        for at in range(0, 4 * CLUSTER, 2 * CLUSTER):
            await node.write(at, b"a" * CLUSTER)
        disk.fail = {"discard": errno.EIO}
        await node.discard(0, 4 * CLUSTER)
        await node.flush()
    path = tmp_path / "disk.qcow2"
    path.write_bytes(below.content)
    check(path)


async def test_one_long_discard_of_scattered_clusters(tmp_path: Path) -> None:
    """What it frees waits for its own end; that must not cost more with every commit meanwhile."""
    size, cluster = 16 << 20, 512
    path = create(tmp_path / "disk.qcow2", size, "cluster_size=512")
    below = MemoryNode(bytearray(path.read_bytes()), name="below", flags=DISCARDING)
    async with opened_over(below, DISCARDING, {"pass-discard-request": False}) as node:
        places = list(range(0, size, cluster))
        random.Random(1).shuffle(places)
        for at in places:
            spans = node.plain_write(at, cluster)
            assert spans is None
            await node.write(at, b"x" * cluster)
        await node.flush()
        metadata = node.image.metadata  # type: ignore[attr-defined]
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(metadata._dropped) + len(metadata._freed))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await node.discard(0, size)
            nursery.cancel_scope.cancel()
        assert most < 24576
        await node.flush()
        assert not metadata._dropped
    path.write_bytes(below.content)
    check(path)
