"""What --cache, --aio, --discard and --detect-zeroes do to the file, seen from outside."""

import contextlib
import ctypes
import os
from pathlib import Path

import pytest

from tests.interop.programs import KiB, MiB, Servers, attempt, run

pytestmark = pytest.mark.peer("qemu-io")

BOTH = pytest.mark.parametrize("program", [Servers.nbdserve, Servers.qemu_nbd], ids=["nbdserve", "qemu-nbd"])


@pytest.fixture
def full(tmp_path):
    path = tmp_path / "full"
    path.write_bytes(b"\xaa" * 4 * MiB)
    return path


def storage(path):
    """The bytes of storage behind a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # what is written late is allocated late
    os.close(descriptor)
    return path.stat().st_blocks * 512


def change(server, *script):
    words = [word for line in script for word in ("-c", line)]
    run("qemu-io", "-f", "raw", "-d", "unmap", *words, server.uri)


@BOTH
@pytest.mark.parametrize(("mode", "left"), [("ignore", 4), ("off", 4), ("unmap", 3), ("on", 3), (None, 4)])
def test_discard(servers, full, program, mode, left):
    server = program(servers, *([f"--discard={mode}"] if mode else []), full)
    change(server, "discard 1M 1M")
    server.stop()
    assert storage(full) == left * MiB


@BOTH
@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--discard=ignore", "{}"], 3),
        (["--discard=unmap", "{}"], 3),
        (["--image-opts", "driver=raw,file.filename={}"], 3),
        (["--image-opts", "driver=raw,file.filename={},file.discard=ignore"], 4),
    ],
    ids=str,
)
def test_zeroes_that_may_be_a_hole(servers, full, program, options, left):
    """--discard is about discards; only the file's own option forbids holes."""
    server = program(servers, *(word.replace("{}", str(full)) for word in options))
    change(server, "write -z -u 1M 1M", "write -z 2M 1M", "read -P 0 1M 2M")
    server.stop()
    assert storage(full) == left * MiB
    assert full.read_bytes() == b"\xaa" * MiB + bytes(2 * MiB) + b"\xaa" * MiB


@BOTH
@pytest.mark.parametrize(
    ("options", "full_after", "empty_after"),
    [
        ((), 4, 1),
        (("--discard=unmap", "--detect-zeroes=off"), 4, 1),
        (("--detect-zeroes=on",), 4, 1),
        (("--discard=unmap", "--detect-zeroes=unmap"), 3, 0),
    ],
    ids=str,
)
def test_written_zeroes(servers, full, tmp_path, program, options, full_after, empty_after):
    """In a full file, and in one without storage."""
    empty = tmp_path / "empty"
    with empty.open("wb") as file:
        file.truncate(4 * MiB)
    for path in (full, empty):
        server = program(servers, *options, path)
        change(server, "write -P 0 1M 1M", "read -P 0 1M 1M")
        server.stop()
    assert (storage(full), storage(empty)) == (full_after * MiB, empty_after * MiB)


def test_zeroes_are_detected_in_large_and_small_writes_only_if_all_is_zero(servers, full):
    server = servers.nbdserve("--detect-zeroes=unmap", "--discard=unmap", full)
    change(
        server,
        "write -P 0 0 64k",
        "write -P 0 1M 2M",
        "write -P 1 128k 4k",
        "read -P 0 0 64k",
        "read -P 0xaa 64k 64k",
        "read -P 1 128k 4k",
    )
    server.stop()
    assert storage(full) == 2 * MiB - 64 * KiB


@BOTH
@pytest.mark.parametrize("cache", ["none", "writeback", "writethrough", "directsync", "unsafe"])
@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
def test_cache_and_aio(servers, full, program, cache, aio):
    if aio == "native" and cache not in ("none", "directsync"):
        # One message for both programs; see test_nbdserve_command.
        done = attempt("qemu-nbd", f"--cache={cache}", f"--aio={aio}", "-f", "raw", full)
        assert "aio=native was specified" in done.stderr
        return
    server = program(servers, f"--cache={cache}", f"--aio={aio}", full)
    direct = any(flags & os.O_DIRECT for flags in _open_flags(server.pid, full))
    assert direct == (cache in ("none", "directsync"))
    change(server, "write -P 1 0 1M", "write -P 2 1000 3", "write -f -P 3 8k 4k", "flush", "read -P 2 1000 3")
    server.stop()
    content = bytearray(b"\x01" * MiB + b"\xaa" * 3 * MiB)
    content[1000:1003] = b"\x02" * 3
    content[8192:12288] = b"\x03" * 4096
    assert full.read_bytes() == content


def _open_flags(pid, path):
    """The flags of each descriptor under which a process has a file open."""
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # a worker's, closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{number}") == str(path):
                text = Path(f"/proc/{pid}/fdinfo/{number}").read_text(encoding="ascii")
                yield int(text.partition("flags:")[2].split()[0], 8)


def dirty_pages(path):
    """How many pages of a file are not on the disk yet (cachestat, Linux 6.5)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        whole, counts = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
        if ctypes.CDLL(None, use_errno=True).syscall(451, descriptor, whole, counts, 0):
            pytest.skip("the kernel does not tell which pages are dirty")
    finally:
        os.close(descriptor)
    _, dirty, writeback, *_ = counts
    return dirty + writeback


@pytest.fixture
def connect():
    """Opens connections that send what they are told and nothing else."""
    import nbd

    handles = []

    def start(server):
        handle = nbd.NBD()
        handles.append(handle)
        handle.connect_uri(server.uri)
        return handle

    yield start
    for handle in handles:
        handle.shutdown()


@BOTH
@pytest.mark.peer("module:nbd")
@pytest.mark.parametrize("length", [1000, 4096, MiB])
@pytest.mark.parametrize(
    ("cache", "fua", "durable"),
    [
        ("writethrough", False, True),
        ("directsync", False, True),
        ("writeback", False, False),
        ("writeback", True, True),
        ("unsafe", True, False),
    ],
)
def test_what_is_durable_when_it_is_answered(servers, full, connect, program, cache, fua, durable, length):
    import nbd

    disk = connect(program(servers, f"--cache={cache}", full))
    flags = nbd.CMD_FLAG_FUA if fua else 0
    for _ in range(5):
        storage(full)
        assert not dirty_pages(full)
        disk.pwrite(b"\x01" * length, MiB, flags)
        left = dirty_pages(full)
        if durable or left:
            break  # else the kernel may have been quick by itself
    assert bool(left) != durable
    if durable:
        disk.zero(length, MiB, flags)
        assert not dirty_pages(full)


@BOTH
@pytest.mark.peer("module:nbd")
def test_a_flush_covers_what_was_written_before(servers, full, connect, program):
    disk = connect(program(servers, full))
    storage(full)
    disk.pwrite(b"\x01" * MiB, 0)
    disk.flush()
    assert not dirty_pages(full)


@pytest.mark.peer("module:nbd")
@pytest.mark.parametrize("cache", ["writeback", "writethrough", "none"])
def test_all_is_durable_once_it_has_ended(servers, full, connect, cache):
    """SIGTERM flushes, even while a client is connected."""
    server = servers.nbdserve(f"--cache={cache}", full)
    disk = connect(server)
    storage(full)
    disk.pwrite(b"\x01" * MiB, 0)
    server.stop()
    assert not dirty_pages(full)
    assert full.read_bytes()[:MiB] == b"\x01" * MiB
