"""Many requests at once on one image: each byte is what its last writer wrote, and the image is whole."""

import os
import random
import subprocess

import pytest
import trio
import trio.testing

from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.errors import RequestError
from drivers.testing.faulty import FaultyNode
from drivers.testing.model import contents

SIZE = 4 << 20
# Tasks and blocks interleave: every cluster is written to by all of them.
TASKS = 8
BLOCK = 4096

IMAGES = [
    "",
    "cluster_size=512",
    "cluster_size=4k",
    "extended_l2=on,cluster_size=16k",
    "compat=0.10",
    "lazy_refcounts=on",
    "refcount_bits=1",
    "cluster_size=2M",
]


def _create(path, options, backing=None):
    command = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        command += ["-o", options]
    if backing is not None:
        command += ["-b", str(backing), "-F", "raw"]
    subprocess.run([*command, str(path), str(SIZE)], check=True)


async def _open(path, **more) -> Node:
    tree = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **more}
    return await Graph(Catalog()).open(tree, OpenFlags(discard=True))


async def _write(node: Node, offset: int, data: bytes, *, inline: bool) -> None:
    """As the server does: where the bytes lie, if that is known at once, or as a request."""
    spans = node.plain_write(offset, len(data)) if inline else None
    if spans is not None and len(spans) == 1:
        assert os.pwrite(spans[0][0], data, spans[0][1]) == len(data)
        await trio.lowlevel.checkpoint()
    elif not (inline and node.write_now(offset, memoryview(data))):
        await node.write(offset, data)


async def _work(node: Node, model: bytearray, mine: int, seed: int) -> None:
    rng = random.Random(f"{seed}-{mine}")
    for step in range(120):
        block = rng.randrange(SIZE // BLOCK // TASKS) * TASKS + mine
        offset, kind = block * BLOCK, rng.choice("wwwwwiiiizf")
        if kind in "wi":
            data = rng.randbytes(rng.choice([512, 1000, BLOCK]))
            model[offset : offset + len(data)] = data
            await _write(node, offset, data, inline=kind == "i")
        elif kind == "z":
            model[offset : offset + BLOCK] = bytes(BLOCK)
            await node.write_zeroes(offset, BLOCK, may_unmap=bool(step & 1))
        else:
            await node.flush()
        found = bytearray(BLOCK)
        await node.read_into(offset, found)
        assert found == model[offset : offset + BLOCK]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("options", IMAGES)
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
async def test_writers_that_share_clusters(tmp_path, options, backed):
    model = bytearray(SIZE)
    base = tmp_path / "base"
    if backed:
        model[: SIZE // 2] = os.urandom(SIZE // 2)
        base.write_bytes(model[: SIZE // 2])
    path = tmp_path / "image.qcow2"
    try:
        _create(path, options, base if backed else None)
    except subprocess.CalledProcessError:
        # A header cluster of 512 bytes has no room for a long name.
        os.chdir(tmp_path)
        _create(path, options, "base")
    for seed in range(2):
        # Caches as small as they can be: tables come and go while they are used.
        node = await _open(path, **{"l2-cache-size": 512, "l2-cache-entry-size": 512})
        try:
            async with trio.open_nursery() as nursery:
                for mine in range(TASKS):
                    nursery.start_soon(_work, node, model, mine, seed)
            assert await contents(node) == model
        finally:
            await node.aclose()
        subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True)
    assert raw.read_bytes() == model


@pytest.mark.peer("qemu-img")
async def test_discards_and_reads_side_by_side(tmp_path):
    """A freed cluster goes to another place only when nobody reads it any more: a reader sees what
    was there, or zeroes, never somebody else's bytes."""
    path = tmp_path / "image.qcow2"
    _create(path, "")
    node = await _open(path)
    clusters = SIZE >> 16

    async def rewrite(cluster: int) -> None:
        rng = random.Random(cluster)
        for _ in range(12):
            await node.write(cluster << 16, bytes([cluster + 1]) * 65536)
            await node.flush()
            await node.discard(cluster << 16, 65536)
            if rng.random() < 0.5:
                await node.flush()

    async def watch(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            cluster = rng.randrange(clusters)
            found = bytearray(65536)
            await node.read_into(cluster << 16, found)
            assert set(found) <= {0, cluster + 1}

    try:
        async with trio.open_nursery() as nursery:
            for cluster in range(clusters):
                nursery.start_soon(rewrite, cluster)
            for seed in range(4):
                nursery.start_soon(watch, seed)
    finally:
        await node.aclose()
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)


@pytest.mark.peer("qemu-img")
async def test_a_cancelled_write_leaves_the_image_whole(tmp_path):
    path = tmp_path / "image.qcow2"
    _create(path, "")
    node = await _open(path)
    try:
        for number in range(40):
            with trio.CancelScope() as scope:
                scope.cancel()
                await node.write(number * 100_000, b"x" * 70_000)
            with trio.move_on_after(number / 20_000):
                await node.write(number * 50_000, b"y" * 70_000)
    finally:
        await node.aclose()
    subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)


@pytest.mark.peer("qemu-img")
async def test_a_write_outside_fails_alone(tmp_path):
    path = tmp_path / "image.qcow2"
    _create(path, "")
    node = await _open(path)
    try:
        with pytest.raises(RequestError):
            await node.write(SIZE - 10, bytes(20))
        await node.write(SIZE - 10, b"0123456789")
    finally:
        await node.aclose()


@pytest.mark.peer("qemu-img")
async def test_a_slow_read_keeps_a_discarded_cluster_from_being_used_again(tmp_path):
    path = tmp_path / "image.qcow2"
    _create(path, "")
    graph = Graph(Catalog())
    file = FaultyNode(await graph.open({"driver": "file", "filename": str(path)}))
    graph.nodes["faulty"] = file
    node = await graph.open({"driver": "qcow2", "file": "faulty"}, OpenFlags(discard=True))
    try:
        await node.write(0, b"a" * 65536)
        gate = file.gates["read_into"] = trio.Event()
        found = bytearray(65536)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.read_into, 0, found)
            await trio.testing.wait_all_tasks_blocked()
            await node.discard(0, 65536)
            await node.flush()
            for number in range(1, 8):
                await node.write(number << 16, b"b" * 65536)
                await node.flush()
            gate.set()
        assert set(found) <= set(b"\0a")
        before = os.path.getsize(path)
        await node.flush()
        await node.write(8 << 16, b"b" * 65536)
        await node.flush()
        assert os.path.getsize(path) == before, "the cluster is used again when nobody reads it"
    finally:
        await node.aclose()
        await file.aclose()
