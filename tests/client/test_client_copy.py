"""`nbdclient copy`: the engine and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import Error, OptionError, RequestError
from nbdclient import copy as copy_module
from nbdclient.copy import CopyOptions, Progress, copy
from nbdclient.endpoints import Piece

KiB, MiB = 1 << 10, 1 << 20


def make_sparse(path: Path) -> bytes:
    """Data, a hole, written zeroes, and an odd tail."""
    with path.open("wb") as file:
        file.write(os.urandom(MiB))
        file.seek(5 * MiB)
        file.write(bytes(MiB))
        file.write(os.urandom(MiB + 777))
    return path.read_bytes()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.peer("qemu-nbd")
@pytest.mark.parametrize("requests", [1, 8])
async def test_to_a_file_holes_stay_holes(peers: Any, tmp_path: Path, requests: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = make_sparse(source)
    target.write_bytes(b"x" * 9 * MiB)
    seen: list[int] = []
    progress = await copy(
        peers.qemu_nbd(source, "-e", "8"),
        str(target),
        CopyOptions(requests=requests, flush=True),
        lambda progress: seen.append(progress.done),
    )
    # The last sector is qemu's: it pads an odd size.
    assert target.read_bytes() == content + bytes(-len(content) % 512)
    assert allocated(target) <= 2 * MiB + 64 * KiB
    assert seen == sorted(seen) and seen[-1] == progress.done == progress.total
    assert progress.zeroes >= 5 * MiB


@pytest.mark.peer("nbdkit")
async def test_allocated_gives_zeroes_storage(peers: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = make_sparse(source)
    await copy(peers.nbdkit("file", str(source)), str(target), CopyOptions(allocated=True))
    assert target.read_bytes() == content and allocated(target) >= len(content)


@pytest.mark.peer("nbdkit")
async def test_from_a_file_and_from_server_to_server(peers: Any, tmp_path: Path) -> None:
    source, middle, target = tmp_path / "source", tmp_path / "middle", tmp_path / "target"
    content = make_sparse(source)
    for path in (middle, target):
        path.write_bytes(b"x" * len(content))
    first, second = peers.nbdkit("file", str(middle)), peers.nbdkit("file", str(target))
    await copy(str(source), first, CopyOptions())
    assert middle.read_bytes() == content and allocated(middle) < 3 * MiB
    await copy(first, second, CopyOptions())
    assert target.read_bytes() == content and allocated(target) < 3 * MiB


@pytest.mark.peer("nbdkit")
async def test_destination_is_zero_skips_zeroes(peers: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = make_sparse(source)
    target.write_bytes(b"x" * len(content))
    uri = peers.nbdkit("file", str(target))
    await copy(str(source), uri, CopyOptions(destination_is_zero=True))
    # They were not zero: what was skipped shows.
    assert target.read_bytes()[2 * MiB : 6 * MiB] == b"x" * 4 * MiB


@pytest.mark.peer("nbdkit")
async def test_block_sizes_of_both_ends_are_kept(peers: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.write(os.urandom(10_000))
        file.truncate(MiB)
        file.seek(500_001)
        file.write(b"islet")
    target.write_bytes(b"x" * MiB)
    uri = peers.nbdkit(
        "--filter=blocksize-policy",
        "file",
        str(target),
        "blocksize-minimum=64k",
        "blocksize-preferred=64k",
        "blocksize-maximum=256k",
        "blocksize-error-policy=error",
    )
    await copy(str(source), uri, CopyOptions(request_size=100_000))
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.peer("nbdkit")
@pytest.mark.parametrize("kind", ["pread", "pwrite", "zero", "extents"])
async def test_cve_2022_0485_an_error_of_either_end_fails_the_copy(
    peers: Any, tmp_path: Path, kind: str
) -> None:
    source = tmp_path / "source"
    make_sparse(source)
    (tmp_path / "target").write_bytes(b"x" * source.stat().st_size)
    bad = (f"error-{kind}=EIO", f"error-{kind}-rate=100%")
    reading = kind in ("pread", "extents")
    first = peers.nbdkit("--filter=error", "file", str(source), *(bad if reading else ()))
    target = str(tmp_path / "target")
    second = peers.nbdkit("--filter=error", "file", target, *(() if reading else bad))
    with pytest.raises(RequestError, match="0.sock" if reading else "1.sock"):
        await copy(first, second, CopyOptions())


@pytest.mark.peer("nbdkit")
async def test_cve_2022_0485_one_bad_read_among_many_fails_the_copy(peers: Any, tmp_path: Path) -> None:
    uri = peers.nbdkit("--filter=error", "pattern", "64M", "error-pread=EIO", "error-pread-rate=2%")
    with pytest.raises(RequestError, match="reading"):
        await copy(uri, "null:", CopyOptions(request_size=64 * KiB))


@pytest.mark.peer("nbdkit")
async def test_what_cannot_be_copied_is_refused_before_anything_is_touched(
    peers: Any, tmp_path: Path
) -> None:
    small, large = peers.nbdkit("memory", "1M"), peers.nbdkit("memory", "2M")
    read_only = peers.nbdkit("-r", "memory", "1M")
    path = tmp_path / "file"
    path.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(path)
    for source, target, reason in (
        (large, small, "too small"),
        (small, read_only, "is read-only"),
        (str(path), str(tmp_path / "link"), "is the source too"),
        (str(tmp_path), small, "is a directory"),
        (str(tmp_path / "none"), small, "No such file"),
        (f"nbd+unix:///?socket={tmp_path}/none", str(path), "Failed to connect"),
    ):
        with pytest.raises(Error, match=reason):
            await copy(source, target, CopyOptions())
    assert path.read_bytes() == b"precious"
    with pytest.raises(OptionError):
        await copy(small, str(tmp_path / "none" / "x"), CopyOptions())


class _Given:
    """A source made of these pieces."""

    name = "given"

    def __init__(self, pieces: list[Piece], block: int) -> None:
        self.given = pieces
        self.block = block
        self.size: int | None = sum(piece.length for piece in pieces)

    async def pieces(self) -> Any:
        for piece in self.given:
            yield piece


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=30),
    st.sampled_from([1, 512, 1024]),
    st.sampled_from([512, 1000, 4096]),
)
def test_pieces_cover_everything_once_aligned_and_never_call_data_zero(
    runs: list[tuple[int, bool]], block: int, request_size: int
) -> None:
    import trio

    pieces, offset = [], 0
    for length, zero in runs:
        pieces.append(Piece(offset, length, zero=zero))
        offset += length

    async def steps() -> list[Piece]:
        source: Any = _Given(pieces, block)
        target: Any = _Given([], 1)
        job = copy_module._Copy(source, target, CopyOptions(request_size=request_size), lambda _: None)
        return [piece async for piece in job._steps()]

    found = trio.run(steps)
    zero_bytes = {at for p in pieces if p.zero for at in range(p.offset, p.offset + p.length)}
    position = 0
    for piece in found:
        assert piece.offset == position and piece.offset % block == 0 and piece.length > 0
        position += piece.length
        assert position % block == 0 or position == offset
        if piece.zero:
            assert zero_bytes.issuperset(range(piece.offset, position))
        else:
            assert piece.length <= -(-request_size // block) * block
    assert position == offset


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "nbdclient", *arguments], capture_output=True, timeout=30, **options
    )


@pytest.mark.peer("nbdkit")
def test_pipes_both_ways(peers: Any, tmp_path: Path) -> None:
    content = make_sparse(tmp_path / "source")
    (tmp_path / "target").write_bytes(b"x" * len(content))
    uri = peers.nbdkit("file", str(tmp_path / "target"))
    into = command("copy", "-", uri, input=content)
    assert (into.returncode, into.stderr) == (0, b"")
    assert (tmp_path / "target").read_bytes() == content
    out = command("copy", "--requests", "16", "--request-size", "64k", uri, "-")
    assert (out.returncode, out.stderr) == (0, b"") and out.stdout == content


@pytest.mark.peer("nbdkit")
def test_progress_is_shown_only_when_asked_off_a_terminal(peers: Any) -> None:
    uri = peers.nbdkit("pattern", "8M")
    shown = command("copy", "--progress", uri, "/dev/null")
    assert shown.returncode == 0 and b"100%" in shown.stderr
    assert command("copy", uri, "null:").stderr == b""


@pytest.mark.peer("nbdkit")
def test_an_error_is_one_line_and_status_1(peers: Any) -> None:
    uri = peers.nbdkit("--filter=error", "memory", "1M", "error=EIO", "error-rate=100%")
    failed = command("copy", uri, "null:")
    assert failed.returncode == 1 and failed.stdout == b""
    assert failed.stderr.startswith(b"nbdclient: ") and failed.stderr.count(b"\n") == 1


def test_progress_starts_unknown() -> None:
    assert Progress() == Progress(None, 0, 0)
