"""qemu-io on our server: every kind of request, checked against the file behind it."""

import json

import pytest

from tests.interop.programs import GiB, KiB, MiB, attempt, run

pytestmark = pytest.mark.peer("qemu-io", "qemu-img")


def qemu_io(server, *script, options=()):
    """Run commands on our export; the output."""
    return run(
        "qemu-io", "-f", "raw", *options, *(word for line in script for word in ("-c", line)), server.uri
    )


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_writes_of_every_kind_and_verified_reads(servers, disk, tcp):
    before = disk.read_bytes()
    server = servers.nbdserve(disk, tcp=tcp)
    out = qemu_io(
        server,
        "write -P 0x11 0 4k",
        "write -f -P 0x22 4k 4k",  # FUA
        "write -P 0x33 12345 6789",  # no multiple of anything
        "writev -P 0x44 1M 512 1k 64k",
        "write -P 0x55 2M 1M",  # in one request
        "flush",
        "read -P 0x11 0 4k",
        "read -P 0x22 4k 4k",
        "read -P 0x33 12345 6789",
        "read -P 0x44 1M 67072",
        "read -P 0x55 2M 1M",
        "read 5M 3M",
    )
    assert out.count("ops;") == 11
    server.stop()
    expected = bytearray(before)
    for offset, length, value in [
        (0, 4 * KiB, 0x11),
        (4 * KiB, 4 * KiB, 0x22),
        (12345, 6789, 0x33),
        (MiB, 67072, 0x44),
        (2 * MiB, MiB, 0x55),
    ]:
        expected[offset : offset + length] = bytes([value]) * length
    assert disk.read_bytes() == expected


def test_a_read_finds_a_wrong_pattern(servers, disk):
    """The checks above would fail if the bytes were others."""
    server = servers.nbdserve(disk)
    done = attempt("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", "-c", "read -P 2 0 4k", server.uri)
    assert "Pattern verification failed" in done.stdout


def test_many_requests_at_once(servers, disk):
    server = servers.nbdserve(disk)
    writes = [f"aio_write -P {number + 1} {number * 96}k 96k" for number in range(64)]
    qemu_io(server, *writes, "aio_flush")
    reads = [f"aio_read -P {number + 1} {number * 96}k 96k" for number in range(64)]
    assert "verification failed" not in qemu_io(server, *reads, "aio_flush")
    server.stop()
    content = disk.read_bytes()
    assert all(content[number * 96 * KiB] == number + 1 for number in range(64))


@pytest.fixture
def full(tmp_path):
    path = tmp_path / "full"
    path.write_bytes(b"\xaa" * 4 * MiB)
    return path


def holes(path):
    """The runs of `path` that have no storage, as (offset, length)."""
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", path))
    return [(extent["start"], extent["length"]) for extent in extents if not extent["data"]]


def blocks(path):
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(
    ("line", "has_storage"),
    [("write -z 1M 1M", True), ("write -z -u 1M 1M", False), ("write -z -f -u 1M 1M", False)],
)
def test_zeroes_with_and_without_storage(servers, full, line, has_storage):
    server = servers.nbdserve("--discard=unmap", full)
    qemu_io(
        server, line, "read -P 0 1M 1M", "read -P 0xaa 0 1M", "read -P 0xaa 2M 2M", options=["-d", "unmap"]
    )
    server.stop()
    assert blocks(full) == (4 if has_storage else 3) * MiB
    # What was read since may count as data where storage was kept.
    assert has_storage or holes(full) == [(MiB, MiB)]


def test_zeroes_of_any_alignment(servers, full):
    server = servers.nbdserve("--discard=unmap", full)
    qemu_io(server, "write -z -u 12345 1000000", "write -z 3000001 3", options=["-d", "unmap"])
    server.stop()
    expected = bytearray(b"\xaa" * 4 * MiB)
    expected[12345:1012345] = bytes(1000000)
    expected[3000001:3000004] = bytes(3)
    assert full.read_bytes() == expected


def test_discards_become_holes(servers, full):
    server = servers.nbdserve("--discard=unmap", full)
    qemu_io(server, "discard 1M 1M", "discard 3M 64k", "read -P 0xaa 2M 1M", options=["-d", "unmap"])
    server.stop()
    assert holes(full) == [(MiB, MiB), (3 * MiB, 64 * KiB)]
    assert blocks(full) == 3 * MiB - 64 * KiB


def test_block_status_follows_what_is_written(servers, tmp_path):
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 * MiB)
    server = servers.nbdserve("--discard=unmap", "-e", "2", disk)

    def data():
        extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", server.uri))
        return [(extent["start"], extent["length"]) for extent in extents if extent["data"]]

    assert data() == []
    qemu_io(server, "write -P 1 1M 64k", "write -P 1 32M 1M", options=["-d", "unmap"])
    assert data() == [(MiB, 64 * KiB), (32 * MiB, MiB)]
    qemu_io(server, "discard 1M 64k", "write -z -u 32M 512k", options=["-d", "unmap"])
    assert data() == [(32 * MiB + 512 * KiB, 512 * KiB)]
    assert "524288/524288 bytes allocated" in qemu_io(server, "alloc 33280k 512k")


def test_what_is_beyond_the_end_of_an_odd_image(servers, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xaa" * 1000)
    server = servers.nbdserve(disk)
    qemu_io(server, "read -P 0xaa 0 1000", "read -P 0 1000 24", "write -P 5 990 10", "write -z 512 512")
    done = attempt("qemu-io", "-f", "raw", "-c", "write -P 5 512 512", server.uri)
    assert "No space left on device" in done.stdout + done.stderr
    server.stop()
    assert disk.read_bytes() == b"\xaa" * 512 + bytes(488)


def test_a_read_only_export_takes_nothing(servers, disk):
    before = disk.read_bytes()
    server = servers.nbdserve("-r", disk)
    done = attempt("qemu-io", "-f", "raw", "-c", "write -P 5 0 4k", server.uri)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    qemu_io(server, "read 0 8M", options=["-r"])
    assert disk.read_bytes() == before


def test_an_offset_applies_to_writes(servers, disk):
    server = servers.nbdserve("--offset", str(1000 * KiB), disk)
    qemu_io(server, "write -P 0x77 0 512", "read -P 0x77 0 512")
    server.stop()
    content = disk.read_bytes()
    assert content[1000 * KiB : 1000 * KiB + 512] == b"\x77" * 512
    assert len(content) == 8 * MiB


def test_far_out(servers, tmp_path):
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(5 * GiB)
    server = servers.nbdserve(disk)
    qemu_io(server, "write -P 3 4294967290 12", "read -P 3 4294967290 12", "read -P 0 0 1M", "read -P 3 4G 2")
    assert (
        "Pattern verification failed"
        in attempt("qemu-io", "-f", "raw", "-c", "read -P 0 4G 4", server.uri).stdout
    )
