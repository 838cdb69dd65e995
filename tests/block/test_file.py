"""The `file` driver on regular files: opening, holes, sizes, durability."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.graph import Graph
from drivers.block.node import OpenFlags, Preallocation
from drivers.catalog import Catalog
from drivers.errors import OptionError, RequestError
from drivers.protocol.file import holes, syscalls
from drivers.protocol.file.driver import FileNode
from drivers.testing.contract import pattern
from drivers.testing.model import Operation, check_plain, contents, operations, replay

BLOCK = 65536


@asynccontextmanager
async def opened(path: Path | str, flags: OpenFlags | None = None, **options: Any) -> AsyncIterator[FileNode]:
    node = await Graph(Catalog()).open({"driver": "file", "filename": str(path), **options}, flags)
    assert isinstance(node, FileNode)
    yield node
    await node.aclose()


async def refusal(path: Path | str, flags: OpenFlags | None = None, **options: Any) -> str:
    with pytest.raises(OptionError) as caught:
        await Graph(Catalog()).open({"driver": "file", "filename": str(path), **options}, flags)
    return str(caught.value)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(4 * BLOCK))
    return path


# --- opening ------------------------------------------------------------------------------------


async def test_what_cannot_be_opened_says_so_in_qemus_words(tmp_path: Path, disk: Path) -> None:
    missing = tmp_path / "missing"
    assert await refusal(missing) == f"Could not open '{missing}': No such file or directory"
    assert await refusal(tmp_path) == f"Could not open '{tmp_path}': Is a directory"
    regular = "driver requires '{}' to be a regular file"
    assert await refusal("/dev/zero") == "'file' " + regular.format("/dev/zero")
    assert await refusal(tmp_path, OpenFlags(read_only=True)) == "'file' " + regular.format(tmp_path)
    assert await refusal("") == "The 'file' block driver requires a file name"
    assert "null byte" in await refusal("a\0b")
    assert await refusal(disk, aio="native") == (
        "aio=native was specified, but it requires cache.direct=on, which was not specified."
    )
    assert "pr-manager" in await refusal(disk, **{"pr-manager": "pr0"})
    assert "expects one of" in await refusal(disk, locking="maybe")
    assert "doesn't support the option 'colour'" in await refusal(disk, colour="red")


async def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with trio.fail_after(5):
        assert "to be a regular file" in await refusal(tmp_path / "fifo", OpenFlags(read_only=True))


async def test_a_refused_open_leaks_no_descriptor(tmp_path: Path, disk: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await refusal(tmp_path / "missing")
        await refusal(tmp_path, OpenFlags(read_only=True))
        await refusal(disk, colour="red")
        await refusal(disk, OpenFlags(direct=True), colour="red")
        async with opened(disk, OpenFlags(direct=True)):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


async def test_all_ways_of_aio_read_the_same(disk: Path) -> None:
    direct = {"cache": {"direct": "on"}}
    for options, asynchronous in (
        ({"aio": "threads"}, False),
        ({"aio": "io_uring"}, False),
        ({"aio": "threads", **direct}, False),
        ({"aio": "native", **direct}, True),
        ({"aio": "io_uring", **direct}, True),
        (direct, True),
    ):
        async with opened(disk, **options, **{"drop-cache": "off", "aio-max-batch": "0"}) as node:
            assert await contents(node) == disk.read_bytes()
            assert (node._aio is not None) == asynchronous


async def test_auto_read_only_falls_back() -> None:
    # No one may open this one for writing, whoever they are.
    path = "/sys/kernel/notes"
    if not Path(path).exists():
        pytest.skip(f"needs {path}, a file that nobody may write")
    assert await refusal(path) == f"Could not open '{path}': Permission denied"
    async with opened(path, OpenFlags(auto_read_only=True)) as node:
        assert node.flags.read_only
        with pytest.raises(RequestError, match="read-only"):
            await node.write(0, b"x")


# --- requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
async def test_a_file_cut_behind_our_back_reads_as_zeroes_there(disk: Path, direct: bool) -> None:
    content = bytearray(disk.read_bytes())
    async with opened(disk, OpenFlags(direct=direct)) as node:
        assert await contents(node) == content  # so that no buffer is empty by chance
        os.truncate(disk, BLOCK + 100)
        content[BLOCK + 100 :] = bytes(3 * BLOCK - 100)
        assert await contents(node) == content
        extents = await node.block_status(0, node.size)
        assert extents[-1].flags == ExtentFlags.ZERO
        check_plain(node, content, 0, node.size)


@pytest.mark.parametrize("direct", [False, True])
async def test_writing_the_unaligned_tail_keeps_the_files_size(tmp_path: Path, direct: bool) -> None:
    path = tmp_path / "tail.img"
    path.write_bytes(b"a" * 5000)
    async with opened(path, OpenFlags(direct=direct)) as node:
        await node.write(4990, b"b" * 10)
        await node.write(0, b"c" * 5000, fua=True)
        await node.write(4999, b"d")
        assert await contents(node) == b"c" * 4999 + b"d"
    assert path.read_bytes() == b"c" * 4999 + b"d"


async def test_a_direct_file_has_no_plain_spans_and_knows_its_alignment(disk: Path) -> None:
    async with opened(disk, OpenFlags(direct=True)) as node:
        assert node.plain(0, 4096) is None
        assert node.plain_write(0, 4096) is None
        assert node.limits.request_alignment in (512, 1024, 2048, 4096)
        # More than a bounce buffer holds.
        await node.truncate(3 << 20)
        data = pattern((2 << 20) + 3, seed=2)
        await node.write(777, data)
        found = bytearray(len(data))
        await node.read_into(777, found)
        assert found == data


async def test_a_full_file_is_one_plain_span(disk: Path) -> None:
    async with opened(disk) as node:
        assert node.plain(10, 2 * BLOCK) == [(node._fd, 10, 2 * BLOCK)]
        assert node.plain_write(10, 20) == [(node._fd, 10, 20)]
        check_plain(node, disk.read_bytes(), 0, node.size)


async def test_holes_are_plain_zeroes_for_large_reads(disk: Path) -> None:
    async with opened(disk, OpenFlags(discard=True)) as node:
        await node.discard(BLOCK, BLOCK)
        fd = node._fd
        assert node.plain(0, 4 * BLOCK) == [(fd, 0, BLOCK), (-1, 0, BLOCK), (fd, 2 * BLOCK, 2 * BLOCK)]
        assert node.plain(BLOCK, 4096) == [(fd, BLOCK, 4096)]
    async with opened(disk) as again:
        assert [span[0] < 0 for span in again.plain(0, 4 * BLOCK) or ()] == [False, True, False]


async def test_a_file_full_of_holes_is_cut_into_a_bounded_number_of_spans(tmp_path: Path) -> None:
    path = tmp_path / "sieve.img"
    count = 3 * holes.MAX_SPANS
    with path.open("wb") as file:
        for index in range(count):
            file.seek(index * BLOCK)
            file.write(b"x" * 4096)
        file.truncate(count * BLOCK)
    async with opened(path) as node:
        spans = node.plain(0, node.size)
        assert spans is not None
        assert len(spans) == holes.MAX_SPANS
        check_plain(node, path.read_bytes(), 0, node.size)
        assert len(await node.block_status(0, node.size)) == 2 * count


def test_a_filesystem_that_knows_no_holes_has_data_everywhere(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", lseek)
    assert holes.extents(0, 5, 100) == [Extent(100, ExtentFlags.DATA, host_offset=5)]
    assert holes.spans(0, 5, 100) == [(0, 5, 100)]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("end", [1 << 20, 1000001, 300 << 10])
async def test_block_status_is_what_qemu_img_maps(tmp_path: Path, end: int) -> None:
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(end)
        syscalls.fallocate(file.fileno(), 0, 0, BLOCK)  # storage, never written
        file.seek(2 * BLOCK)
        file.write(b"x" * 16384)
        file.flush()
        syscalls.zero_range(file.fileno(), 4 * BLOCK, 8192)
        os.pwrite(file.fileno(), b"y" * 5000, 5 * BLOCK - 20000)
        os.fsync(file.fileno())
    size = path.stat().st_size
    found = []
    async with opened(path, OpenFlags(read_only=True)) as node:
        offset = 0
        for extent in await node.block_status(0, size):
            found.append((offset, extent.length, bool(extent.flags & ExtentFlags.ZERO), extent.host_offset))
            offset += extent.length
    image = f"driver=file,filename={path}"
    output = await run("qemu-img", "map", "--output=json", "--image-opts", image)
    # QEMU counts in sectors: the last one is filled up with zeroes.
    expected = [
        (entry["start"], min(entry["length"], size - entry["start"]), entry["zero"], entry["offset"])
        for entry in json.loads(output)
        if entry["start"] < size
    ]
    assert found == expected


async def run(*command: str) -> bytes:
    completed = await trio.run_process(command, capture_stdout=True)
    return bytes(completed.stdout)


@pytest.mark.parametrize("direct", [False, True])
async def test_zeroing_makes_holes_only_where_that_is_allowed(disk: Path, direct: bool) -> None:
    async with opened(disk, OpenFlags(discard=True, direct=direct)) as node:
        before = disk.stat().st_blocks
        await node.write_zeroes(0, BLOCK, may_unmap=False)
        assert disk.stat().st_blocks == before
        await node.write_zeroes(0, BLOCK, may_unmap=True, fast=True)
        assert disk.stat().st_blocks == before - BLOCK // 512
        assert (await node.block_status(0, BLOCK))[0].flags == ExtentFlags.ZERO
    assert disk.read_bytes()[:BLOCK] == bytes(BLOCK)


@pytest.mark.parametrize(
    "refused", [["punch_hole"], ["zero_range"], ["punch_hole", "zero_range", "fallocate"]]
)
async def test_where_the_filesystem_cannot_zero_another_way_is_found(
    disk: Path, monkeypatch: pytest.MonkeyPatch, refused: Sequence[str]
) -> None:
    def unable(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for name in refused:
        monkeypatch.setattr(syscalls, name, unable)
    content = bytearray(disk.read_bytes())
    async with opened(disk, OpenFlags(discard=True)) as node:
        for may_unmap in (False, True):
            content[100:70000] = bytes(69900)
            await node.write_zeroes(100, 69900, may_unmap=may_unmap)
            await node.discard(0, 0)
            assert await contents(node) == content
        if len(refused) == 3:
            with pytest.raises(RequestError) as caught:
                await node.write_zeroes(BLOCK, BLOCK, fast=True)
            assert caught.value.errno == errno.ENOTSUP
            await node.discard(BLOCK, BLOCK)
            assert await contents(node) == content


# --- durability ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dsync_works", [True, False])
async def test_fua_is_one_durable_write_or_a_write_and_a_sync(
    disk: Path, monkeypatch: pytest.MonkeyPatch, dsync_works: bool
) -> None:
    calls: list[Any] = []
    pwritev, fdatasync = os.pwritev, os.fdatasync

    def recorded_write(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags and not dsync_works:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        calls.append(flags)
        return pwritev(fd, buffers, offset, flags)

    def recorded_sync(fd: int) -> None:
        calls.append("sync")
        fdatasync(fd)

    async with opened(disk) as node:
        monkeypatch.setattr(os, "pwritev", recorded_write)
        monkeypatch.setattr(os, "fdatasync", recorded_sync)
        await node.write(0, b"one", fua=True)
        await node.write(3, b"two", fua=True)
        await node.write(6, b"three")
        assert calls == ([os.RWF_DSYNC, os.RWF_DSYNC, 0] if dsync_works else [0, "sync", 0, "sync", 0])
    assert disk.read_bytes()[:11] == b"onetwothree"


async def test_after_a_failed_sync_no_flush_succeeds(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    node = await Graph(Catalog()).open({"driver": "file", "filename": str(disk)})
    await node.flush()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            await node.flush()
    for request in (node.flush(), node.write_zeroes(0, 512, fua=True), node.aclose()):
        with pytest.raises(OSError, match="Input/output error"):
            await request
    assert node.closed


async def test_a_lost_durable_write_fails_later_flushes_too(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    node = await Graph(Catalog()).open({"driver": "file", "filename": str(disk)})
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", failing)
        with pytest.raises(OSError, match="Input/output error"):
            await node.write(0, b"x", fua=True)
    with pytest.raises(OSError, match="Input/output error"):
        await node.flush()
    with pytest.raises(OSError, match="Input/output error"):
        await node.aclose()


async def test_an_unsafe_cache_syncs_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    flags_seen: list[int] = []
    pwritev = os.pwritev

    def recorded(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        return pwritev(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "fdatasync", failing)
    monkeypatch.setattr(os, "pwritev", recorded)
    async with opened(disk, OpenFlags(no_flush=True)) as node:
        await node.write(0, b"x", fua=True)
        await node.flush()
    assert flags_seen == [0]


@pytest.mark.parametrize("direct", [False, True])
async def test_short_transfers_are_continued_and_errors_reported(
    disk: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    preadv, pwritev = os.preadv, os.pwritev
    async with opened(disk, OpenFlags(direct=direct), aio="threads") as node:

        def part(fd: int) -> int:
            return 4096 if direct and fd == node._fd else 1000

        monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][: part(fd)]], at))
        monkeypatch.setattr(
            os, "pwritev", lambda fd, bufs, at, flags: pwritev(fd, [bufs[0][: part(fd)]], at, flags)
        )
        data = pattern(25500, seed=3)
        await node.write(123, data)
        found = bytearray(25500)
        await node.write(2 * BLOCK, pattern(25500, seed=4))  # so that no buffer holds the answer by chance
        await node.read_into(123, found)
        assert found == data
        monkeypatch.setattr(os, "pwritev", lambda *arguments: 0)
        with pytest.raises(OSError, match="Input/output error"):
            await node.write(0, b"x")


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("how", [Preallocation.FALLOC, Preallocation.FULL])
async def test_growing_with_preallocation_takes_the_storage_at_once(
    disk: Path, how: Preallocation, direct: bool
) -> None:
    before = disk.read_bytes()
    async with opened(disk, OpenFlags(direct=direct)) as node:
        with pytest.raises(RequestError, match="shrinking"):
            await node.truncate(512, preallocation=how)
        await node.truncate(1000001, preallocation=how)
        assert node.size == 1000001
        assert disk.stat().st_blocks * 512 >= 1000001
        assert await contents(node) == before + bytes(1000001 - len(before))
        with pytest.raises(RequestError, match="metadata"):
            await node.truncate(1 << 21, preallocation=Preallocation.METADATA)
    assert disk.stat().st_size == 1000001


async def test_a_failed_growth_leaves_the_size_as_it_was(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, offset + length // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    size = disk.stat().st_size
    async with opened(disk) as node:
        with pytest.raises(OSError, match="No space left"):
            await node.truncate(1 << 20, preallocation=Preallocation.FALLOC)
        assert node.size == size
    assert disk.stat().st_size == size


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=operations())
@pytest.mark.parametrize("direct", [False, True])
def test_any_sequence_of_requests_agrees_with_a_bytearray(
    tmp_path: Path, direct: bool, steps: list[Operation]
) -> None:
    async def main() -> None:
        path = tmp_path / "model.img"
        content = pattern(100001)
        path.write_bytes(content)
        async with opened(path, OpenFlags(discard=True, direct=direct)) as node:
            model = bytearray(content)
            await replay(node, model, steps)
        assert path.read_bytes() == model

    trio.run(main)


# --- the threads --------------------------------------------------------------------------------


async def test_a_hung_file_leaves_other_files_alone(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More reads hang than there are threads for one file; another file still answers."""
    release = threading.Event()
    preadv = os.preadv

    async with (
        opened(disk, OpenFlags(read_only=True)) as hung,
        opened(disk, OpenFlags(read_only=True)) as other,
    ):
        hung_fd = hung._fd

        def hanging(fd: int, buffers: Any, offset: int) -> int:
            if fd == hung_fd:
                release.wait(30)
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", hanging)
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(hung.read_into, 0, bytearray(512))
            await trio.testing.wait_all_tasks_blocked()
            found = bytearray(512)
            try:
                with trio.fail_after(5):
                    await other.read_into(0, found)
            finally:
                release.set()
    assert found == disk.read_bytes()[:512]
