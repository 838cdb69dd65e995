"""nbdserve in front of other projects' servers, and in front of itself."""

import json
import os

import pytest

from tests.interop.conftest import make_image
from tests.interop.programs import KiB, MiB, attempt, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "nbdcopy", "nbdinfo")

SCRIPT = [
    "write -P 1 12345 100k",
    "write -f -P 2 1M 2M",
    "write -z -u 2M 64k",
    "write -z 4M 77",
    "discard 6M 64k",
    "flush",
    "read -P 1 12345 100k",
    "read -P 0 2M 64k",
]


def changed(content):
    """What SCRIPT makes of an image, but for what was discarded."""
    content = bytearray(content)
    pieces = ((12345, 100 * KiB, 1), (MiB, 2 * MiB, 2), (2 * MiB, 64 * KiB, 0), (4 * MiB, 77, 0))
    for offset, length, value in pieces:
        content[offset : offset + length] = bytes([value]) * length
    return content


def exercise(server, disk):
    """Requests of all kinds through `server`, which in the end leads to `disk`."""
    before = disk.read_bytes()
    words = [word for line in SCRIPT for word in ("-c", line)]
    run("qemu-io", "-f", "raw", "-d", "unmap", *words, server.uri)
    expected, content = changed(before), disk.read_bytes()
    for start, end in ((0, 6 * MiB), (6 * MiB + 64 * KiB, 8 * MiB)):
        assert content[start:end] == expected[start:end]
    run("nbdcopy", server.uri, disk.with_name("copy"))
    assert disk.with_name("copy").read_bytes() == disk.read_bytes()
    done = attempt("qemu-io", "-f", "raw", "-c", "write -P 1 8M 512", server.uri)
    assert done.returncode == 1
    assert disk.stat().st_size == 8 * MiB


def holes(disk):
    """The runs of an image that have no storage, as (offset, length)."""
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", disk))
    return [(extent["start"], extent["length"]) for extent in extents if not extent["data"]]


@pytest.mark.peer("qemu-nbd")
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_qemu_nbd(servers, disk, tcp):
    behind = servers.qemu_nbd("-e", "4", "--discard=unmap", "-x", "a name", disk, tcp=tcp)
    behind.name = "a%20name"
    server = servers.nbdserve("-e", "4", "--discard=unmap", behind.uri, tcp=tcp)
    direct, passed_on = (
        json.loads(run("nbdinfo", "--map", "--json", uri)) for uri in (behind.uri, server.uri)
    )
    assert direct == passed_on
    exercise(server, disk)
    assert (2 * MiB, 64 * KiB) in holes(disk)  # that zeroes may be one was passed on


@pytest.mark.peer("nbdkit")
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--no-sr",),
        ("--mask-handshake=0",),
        ("--filter=delay", "delay-write=1ms"),
        ("--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-maximum=64K"),
        ("--filter=nozero",),
        ("--filter=noextents", "--filter=nocache"),
        ("--filter=fua", "fuamode=emulate"),
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_nbdkit(servers, disk, options):
    behind = servers.nbdkit(*(word for word in options if word.startswith("--")), "file", disk,
                            *(word for word in options if not word.startswith("--")))  # fmt: skip
    exercise(servers.nbdserve("-e", "4", "--discard=unmap", behind.uri), disk)


@pytest.mark.peer("nbd-server")
def test_nbd_server(servers, disk):
    behind = servers.nbd_server(disk, "flush = true", "fua = true", "trim = true")
    exercise(servers.nbdserve("-e", "4", "--discard=unmap", behind.uri), disk)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_chain_of_three(servers, disk, tcp):
    first = servers.nbdserve("-e", "4", "--discard=unmap", "-A", disk, tcp=tcp)
    second = servers.nbdserve("-e", "4", "--discard=unmap", first.uri, tcp=not tcp)
    third = servers.nbdserve("-e", "4", "--discard=unmap", second.uri, tcp=tcp)
    maps = [json.loads(run("nbdinfo", "--map", "--json", server.uri)) for server in (first, second, third)]
    assert maps[0] == maps[1] == maps[2]
    exercise(third, disk)
    assert (2 * MiB, 64 * KiB) in holes(disk)


def test_an_image_of_odd_length_keeps_it_through_a_chain(servers, tmp_path):
    disk = make_image(tmp_path, "odd")
    before = disk.read_bytes()
    first = servers.nbdserve("-e", "4", disk)
    second = servers.nbdserve("-e", "4", first.uri)
    run("nbdcopy", second.uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == before + bytes(-len(before) % 512)
    run("qemu-io", "-f", "raw", "-c", f"write -P 5 {len(before) - 100} 100", second.uri)
    assert disk.read_bytes() == before[:-100] + b"\x05" * 100


@pytest.mark.peer("nbdkit")
@pytest.mark.parametrize(
    ("error", "text"), [("ENOSPC", "No space left on device"), ("EIO", "Input/output error")]
)
def test_errors_come_through_and_pass(servers, disk, error, text):
    trigger = disk.with_name("trigger")
    behind = servers.nbdkit(
        "--filter=error", "file", disk, f"error={error}", "error-rate=100%", f"error-file={trigger}"
    )
    server = servers.nbdserve("-e", "4", behind.uri)
    trigger.touch()
    for line in ("read 0 4k", "write 0 4k", "write -z 0 4k"):
        done = attempt("qemu-io", "-f", "raw", "-c", line, server.uri)
        assert text in done.stdout + done.stderr
    trigger.unlink()
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", "-c", "read -P 1 0 4k", server.uri)


def test_a_server_behind_that_is_gone_and_comes_back(servers, disk):
    """With reconnect-delay requests wait for it; what was written before is there."""
    behind = servers.nbdserve("-e", "4", disk)
    options = f"driver=nbd,server.type=unix,server.path={behind.where},reconnect-delay=20"
    server = servers.nbdserve("-e", "4", "--image-opts", options)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", "-c", "flush", server.uri)
    behind.stop()
    again = servers.nbdserve("-e", "4", disk)
    os.rename(again.where, behind.where)
    again.where = behind.where
    run("qemu-io", "-f", "raw", "-c", "read -P 1 0 4k", "-c", "write -P 2 4k 4k", server.uri)
    server.stop()  # before the one that its last flush needs
    assert disk.read_bytes()[: 8 * KiB] == b"\x01" * 4096 + b"\x02" * 4096


def test_a_server_behind_that_is_gone_for_good(servers, disk):
    """Requests fail, one by one, and the server lives on."""
    behind = servers.nbdserve("-e", "4", disk)
    server = servers.nbdserve("-e", "4", behind.uri)
    behind.stop()
    for _ in range(2):
        done = attempt("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", server.uri)
        assert done.returncode == 1 and "Input/output error" in done.stdout + done.stderr
    assert server.running()
    assert run("nbdinfo", "--size", server.uri) == f"{8 * MiB}\n"
