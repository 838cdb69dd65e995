"""The power fails, or the server is killed: what was flushed is there, and the image is in order."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import trio

import nbdclient
from drivers.block.image import ImageNode
from drivers.errors import Error
from drivers.options.schema import Value
from drivers.testing.memory import MemoryNode
from drivers.testing.model import contents
from drivers.testing.powercut import PlainPowerCutNode, PowerCutNode
from tests.interop.programs import Server, Servers
from tests.interop.test_fio import fio
from tests.qcow2.history import History
from tests.qcow2.qemu import check, create, opened, opened_over, raw_content

pytestmark = pytest.mark.peer("qemu-img")

SIZE = 256 << 10
# States looked at in one test: each takes two processes.
MAX_STATES = 60

OPTIONS = [
    "compat=0.10,cluster_size=4k",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on,cluster_size=4k",
    "refcount_bits=64,cluster_size=512",
]

Scenario = Callable[[History, ImageNode, random.Random], Awaitable[None]]


class Crash:
    """A scenario on a disk that loses power, played once; then the power is cut everywhere."""

    def __init__(self, tmp_path: Path, options: str, seed: int, *, plain: bool = False) -> None:
        self.options = options
        self.seed = seed
        self.lazy = "lazy_refcounts=on" in options
        self.directory = tmp_path
        blank = create(tmp_path / "blank.qcow2", SIZE, options)
        kind = PlainPowerCutNode if plain else PowerCutNode
        self.disk = kind(blank.read_bytes())

    async def play(self, scenario: Scenario, options: Mapping[str, Value] | None = None) -> History:
        async with opened_over(self.disk, options=options) as node:
            history = History(node, bytes(SIZE), lambda: self.disk.position)
            await scenario(history, node, random.Random(self.seed))
            return history

    def states(self) -> list[tuple[int, bytearray]]:
        """A seeded choice of moments, and of what the disk may hold then."""
        chance = random.Random(self.seed)
        positions = set(
            chance.sample(range(self.disk.position + 1), min(MAX_STATES // 3, self.disk.position + 1))
        )
        return [
            (position, state)
            for position, found in self.disk.cuts(seed=self.seed, limit=16)
            if position in positions
            for state in _some(list(found), chance)
        ]

    async def check(
        self, history: History, state: bytearray, position: int, *, also: Scenario | None = None
    ) -> None:
        path = self.directory / "state.qcow2"
        path.write_bytes(state)
        if not self.lazy:  # refcounts are told to be out of date, and are repaired at the next open
            check(path, leaks=True)
            history.check(raw_content(path), position)
        disk = MemoryNode(bytearray(state), name="disk")
        async with opened_over(disk) as node:
            assert node.size == SIZE
            history.check(await contents(node), position)
            await node.write(0, b"alive" * 1000)
        path.write_bytes(disk.content)
        check(path, leaks=True)
        assert raw_content(path)[:5000] == b"alive" * 1000


def _some(states: list[bytearray], chance: random.Random) -> list[bytearray]:
    """The extremes, if they are there, and one between."""
    if len(states) <= 3:
        return states
    return [*states[:2], chance.choice(states[2:])]


async def requests(history: History, node: ImageNode, chance: random.Random) -> None:
    """A guest that writes, zeroes and discards, several at a time, and flushes now and then."""
    for turn in range(12):
        async with trio.open_nursery() as nursery:
            places = sorted(chance.sample(range(SIZE // 512), 8))
            for start, end in zip(places[::2], places[1::2], strict=True):
                end = min(end, start + chance.choice((1, 8, 40, 200)))
                offset, length = start * 512, (end - start) * 512
                roll = chance.random()
                if roll < 0.7:
                    data = bytes((turn * 4 + 1 + start % 4,)) * length
                    nursery.start_soon(history.write, offset, data)
                elif roll < 0.85:
                    nursery.start_soon(history.zero, offset, length)
                else:
                    nursery.start_soon(history.discard, offset, length)
            if chance.random() < 0.3:
                nursery.start_soon(history.flush)
        if chance.random() < 0.4:
            await history.flush()


TASKS = 4


async def side_by_side(history: History, node: ImageNode, chance: random.Random) -> None:
    """Guests that write as the server does, and others, into the same clusters but other blocks of
    them; snapshots and bitmaps come and go meanwhile."""
    await node.add_bitmap("dirty", 4096)

    async def guest(mine: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            offset = (rng.randrange(SIZE // 2048 // TASKS) * TASKS + mine) * 2048
            data = bytes((rng.randrange(1, 256),)) * rng.choice((512, 1024, 2048))
            roll = rng.random()
            if roll < 0.7:
                await history.write(offset, data, inline=roll < 0.5)
            elif roll < 0.8:
                await history.zero(offset, 2048)
            elif roll < 0.9:
                await history.flush()
            else:
                await trio.lowlevel.checkpoint()

    async def keeper() -> None:
        assert node.snapshots is not None
        for turn in range(4):
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            await node.snapshots.create(f"turn {turn}")
            if turn % 2:
                await node.snapshots.delete(f"turn {turn - 1}")
        await node.remove_bitmap("dirty")

    async with trio.open_nursery() as nursery:
        for mine in range(TASKS):
            nursery.start_soon(guest, mine, chance.randrange(1 << 30))
        nursery.start_soon(keeper)


@pytest.mark.parametrize("plain", [True, False], ids=["inline", "requests"])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("options", OPTIONS[1:])
async def test_the_power_fails_under_many_requests(
    tmp_path: Path, options: str, seed: int, plain: bool
) -> None:
    """With caches as small as they can be: tables are written and read again all the time."""
    crash = Crash(tmp_path, options, seed, plain=plain)
    tiny: dict[str, Value] = {"l2-cache-size": 1024, "l2-cache-entry-size": 512}
    history = await crash.play(side_by_side, tiny)
    for position, state in crash.states():
        await crash.check(history, state, position)


async def with_snapshots(history: History, node: ImageNode, chance: random.Random) -> None:
    """Writes between snapshots that come and go, and are returned to."""
    assert node.snapshots is not None
    taken: dict[str, bytes] = {}
    for turn in range(10):
        offset = chance.randrange(SIZE // 512 - 40) * 512
        await history.write(offset, bytes((turn + 1,)) * 512 * chance.randrange(1, 40))
        roll = chance.random()
        if roll < 0.4:
            await node.snapshots.create(f"turn {turn}")
            taken[f"turn {turn}"] = bytes(history.content)
        elif taken and roll < 0.6:
            name = chance.choice(list(taken))
            history.becomes(taken[name])
            await node.snapshots.apply(name)
            history.became()
        elif taken and roll < 0.8:
            name = chance.choice(list(taken))
            await node.snapshots.delete(name)
            del taken[name]
        else:
            await history.flush()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
async def test_the_power_fails_after_any_write(tmp_path: Path, options: str, seed: int) -> None:
    crash = Crash(tmp_path, options, seed)
    history = await crash.play(requests)
    for position, state in crash.states():
        await crash.check(history, state, position)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
async def test_the_power_fails_between_snapshots(tmp_path: Path, options: str, seed: int) -> None:
    crash = Crash(tmp_path, options, seed)
    history = await crash.play(with_snapshots)
    for position, state in crash.states():
        await crash.check(history, state, position)


@pytest.mark.parametrize("options", OPTIONS[1:])
async def test_the_power_fails_while_the_image_is_resized(tmp_path: Path, options: str) -> None:
    crash = Crash(tmp_path, options, 3)
    sizes = [SIZE]
    async with opened_over(crash.disk) as node:
        await node.write(0, b"k" * 8192)
        await node.flush()
        kept = crash.disk.position
        for size in (16 << 20, SIZE // 2, 1 << 20):
            sizes.append(size)
            await node.truncate(size)
            await node.write(size - 8192, b"x" * 8192)
    for position, state in crash.states():
        if position < kept:
            continue
        path = tmp_path / "state.qcow2"
        path.write_bytes(state)
        if not crash.lazy:
            check(path, leaks=True)
        disk = MemoryNode(bytearray(state), name="disk")
        async with opened_over(disk) as node:
            assert node.size in sizes
            found = bytearray(8192)
            await node.read_into(0, found)
            assert found == b"k" * 8192
        path.write_bytes(disk.content)
        check(path, leaks=True)


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_power_fails_while_bitmaps_are_kept(tmp_path: Path, seed: int) -> None:
    """After a power cut a bitmap is known to be out of date, or has everything that was written."""
    crash = Crash(tmp_path, "cluster_size=4k", seed)
    written: list[int] = []
    chance = random.Random(seed)
    async with opened_over(crash.disk) as node:
        await node.add_bitmap("all", 512)
    # It is closed now, and the bitmap stored: from here on the power may fail.
    crash.disk = PowerCutNode(bytes(crash.disk.content))
    async with opened_over(crash.disk) as node:
        for _ in range(6):
            offset = chance.randrange(SIZE // 512) * 512
            written.append(offset)
            await node.write(offset, b"w" * 512)
            await node.flush()
    for position, state in crash.states():
        path = tmp_path / "state.qcow2"
        path.write_bytes(state)
        check(path, leaks=True)
        async with opened_over(MemoryNode(bytearray(state), name="disk")) as node:
            bitmap = node.bitmaps["all"]
            found = await contents(node)
            for offset in written:
                if found[offset] and not bitmap.inconsistent:
                    assert bitmap.bits[offset // 512 // 8] >> (offset // 512 % 8) & 1, position


# --- the server is killed -----------------------------------------------------------------------


@pytest.mark.peer("fio")
@pytest.mark.parametrize("options", ["", "lazy_refcounts=on", "extended_l2=on", "cluster_size=4k"])
def test_the_server_is_killed_under_load(servers: Servers, tmp_path: Path, options: str) -> None:
    """fio fills one half of the disk; into the other goes what is flushed and known."""
    path = create(tmp_path / "disk.qcow2", 64 << 20, options)
    server = servers.nbdserve("-e", "0", "-f", "qcow2", "--discard=unmap", path)
    load = subprocess.Popen(
        ["fio", "--ioengine=nbd", f"--uri={server.uri}", "--name=load", "--thread", "--rw=randwrite",
         "--bssplit=4k/50:64k/30:100k/20", "--verify=crc32c", "--do_verify=0", "--verify_state_save=0",
         "--iodepth=8", "--numjobs=2", "--size=32m", "--time_based", "--runtime=60", "--fsync=32"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        flushed, unflushed = trio.run(_write_until_killed, server, 40)
    finally:
        load.terminate()
        load.wait(20)
    if "lazy" not in options:
        check(path, leaks=True)
    trio.run(_verify, path, flushed, unflushed)
    check(path, leaks=True)
    fio(
        servers.nbdserve("-e", "0", "-f", "qcow2", path), "--rw=randwrite", "--bs=64k", "--verify=crc32c",
        "--iodepth=8", "--size=16m", "--verify_fatal=1",
    )  # fmt: skip
    servers.stop()
    check(path, leaks=True)


async def _write_until_killed(server: Server, flushes: int) -> tuple[dict[int, bytes], dict[int, set[bytes]]]:
    """Write blocks to the upper half and kill the server after so many flushes, in the midst of
    further writes. Gives what was flushed last, and what may have followed, by offset."""
    chance = random.Random(1)
    flushed: dict[int, bytes] = {}
    current: dict[int, bytes] = {}
    since: dict[int, set[bytes]] = {}
    async with nbdclient.connect(server.uri) as client:
        for turn in range(flushes):
            for _ in range(4):
                offset = (32 << 20) + chance.randrange(4096) * 8192
                current[offset] = bytes((turn + 1,)) * 8192
                since.setdefault(offset, set()).add(current[offset])
                await client.write(offset, current[offset])
            await client.flush()
            flushed = dict(current)
            since.clear()
        with contextlib.suppress(OSError, Error):
            async with trio.open_nursery() as nursery:
                for index in range(16):
                    offset = (32 << 20) + index * 8192 * 7
                    since.setdefault(offset, set()).add(b"last" * 2048)
                    nursery.start_soon(_write_or_lose, client, offset)
                os.kill(server.pid, signal.SIGKILL)
    assert server.ended()
    return flushed, since


async def _write_or_lose(client: nbdclient.Disk, offset: int) -> None:
    with contextlib.suppress(OSError, Error):
        await client.write(offset, b"last" * 2048)


async def _verify(path: Path, flushed: dict[int, bytes], since: dict[int, set[bytes]]) -> None:
    async with opened(path) as node:
        for offset, expected in flushed.items():
            found = bytearray(8192)
            await node.read_into(offset, found)
            for start in range(0, 8192, 512):
                part = bytes(found[start : start + 512])
                allowed = {expected[start : start + 512]}
                allowed |= {data[start : start + 512] for data in since.get(offset, ())}
                assert part in allowed, offset + start
