"""Clients that know extended headers (libnbd 1.22, QEMU 10), from a chroot.

    debootstrap trixie DIR && chroot DIR apt-get install -y --no-install-recommends \\
        qemu-utils libnbd-bin python3-libnbd
    NEWER_PEERS=DIR pytest tests/interop/test_newer_peers.py

It takes root to enter it. Everything that both sides use lies inside.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.interop.conftest import SHAPES, make_image
from tests.interop.programs import CLIENT, GiB, MiB, Server, Servers, run

ROOT = os.environ.get("NEWER_PEERS", "")

pytestmark = pytest.mark.skipif(not ROOT, reason="NEWER_PEERS does not name a directory with newer peers")


class Newer:
    """The chroot: `directory` is a place in it, as seen from outside."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, *command):
        """Run a program of the chroot; paths that begin with the chroot's lose that."""
        return run("chroot", ROOT, *(str(word).replace(ROOT, "") for word in command))

    def script(self, text, *arguments):
        """Run a Python script that has connected `disk`; what it prints, as JSON."""
        return json.loads(self.run("python3", "-c", SCRIPT + text, *arguments))


SCRIPT = """
import errno, json, nbd, sys
disk = nbd.NBD()
def connect(*contexts, **settings):
    for context in contexts:
        disk.add_meta_context(context)
    disk.connect_uri(sys.argv[1])
def status(length, offset, flags=0):
    found = {}
    def extents(context, offset, entries, error):
        found[context] = found.get(context, []) + [list(entry) for entry in entries]
    disk.block_status_64(length, offset, extents, flags)
    return found
def refused(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return errno.errorcode[error.errnum]
"""


@pytest.fixture
def newer():
    directory = Path(tempfile.mkdtemp(dir=f"{ROOT}/tmp"))
    yield Newer(directory)
    shutil.rmtree(directory)


@pytest.fixture
def servers(newer):
    started = Servers(newer.directory)
    try:
        yield started
    finally:
        started.stop()


def compare(newer, first, second):
    assert "identical" in newer.run("qemu-img", "compare", "-f", "raw", "-F", "raw", first, second)


@pytest.fixture
def large(newer):
    """7 GiB in one hole."""
    path = newer.directory / "large"
    with path.open("wb") as file:
        file.truncate(7 * GiB)
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tools_see_every_shape_as_it_is(newer, servers, shape):
    path = make_image(newer.directory, shape)
    server = servers.nbdserve("-e", "0", "-A", "-r", path)
    real = json.loads(newer.run("qemu-img", "map", "--output=json", "-f", "raw", path))
    assert json.loads(newer.run("qemu-img", "map", "--output=json", "-f", "raw", server.uri)) == real
    extents = json.loads(newer.run("nbdinfo", "--map", "--json", server.uri))
    assert [(extent["offset"], extent["length"], extent["type"] == 0) for extent in extents] == [
        (extent["start"], extent["length"], extent["data"]) for extent in real
    ]
    target = newer.directory / "target"
    newer.run("nbdcopy", server.uri, target)
    assert target.stat().st_blocks <= path.stat().st_blocks + 64
    if shape == "large":
        newer.run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, target)
    compare(newer, path, target)


def test_extended_headers_are_negotiated(newer, servers, large):
    server = servers.nbdserve("-e", "0", large)
    answer = newer.script("""
connect("base:allocation")
print(json.dumps([disk.get_extended_headers_negotiated(), disk.can_block_status_payload(), disk.get_size()]))
""", server.uri)  # fmt: skip
    assert answer == [True, True, 7 * GiB]
    newer.run("nbdinfo", "--can=extended-headers", server.uri)


def test_one_request_and_one_extent_of_7_gib(newer, servers, large):
    server = servers.nbdserve("-e", "0", "-A", "--discard=unmap", large)
    answer = newer.script("""
connect("base:allocation", "qemu:allocation-depth")
size = disk.get_size()
found = [status(size, 0)]
disk.pwrite(b"x" * 4096, 6 << 30)
found.append(status(size, 0))
disk.zero(size - 1, 1)
disk.cache(1 << 33 if size >= 1 << 33 else size, 0)
disk.trim(size, 0)
found.append(status(size, 0, nbd.CMD_FLAG_REQ_ONE))
found.append(status(size - 5, 5))
print(json.dumps(found))
""", server.uri)  # fmt: skip
    whole = {"base:allocation": [[7 * GiB, 3]], "qemu:allocation-depth": [[7 * GiB, 1]]}
    pieces = [[6 * GiB, 3], [4096, 0], [GiB - 4096, 3]]
    rest = {"base:allocation": [[7 * GiB - 5, 3]], "qemu:allocation-depth": [[7 * GiB - 5, 1]]}
    assert answer == [whole, {**whole, "base:allocation": pieces}, whole, rest]


def test_status_of_the_contexts_that_a_payload_names(newer, servers, large):
    server = servers.nbdserve("-e", "0", "-A", large)
    answer = newer.script("""
connect("base:allocation", "qemu:allocation-depth")
def only(contexts):
    found = {}
    def extents(context, offset, entries, error):
        found[context] = [list(entry) for entry in entries]
    disk.block_status_filter(disk.get_size(), 0, contexts, extents)
    return found
found = [only(["base:allocation"]), only(["qemu:allocation-depth"])]
found.append(sorted(only(["qemu:allocation-depth", "base:allocation"])))
found.append(disk.pread(4, 0).decode())
print(json.dumps(found))
""", server.uri)  # fmt: skip
    assert answer == [
        {"base:allocation": [[7 * GiB, 3]]},
        {"qemu:allocation-depth": [[7 * GiB, 1]]},
        ["base:allocation", "qemu:allocation-depth"],
        "\0\0\0\0",
    ]


def test_reads_and_writes_with_extended_headers(newer, servers):
    path = newer.directory / "disk"
    path.write_bytes(b"\xaa" * 8 * MiB)
    server = servers.nbdserve("-e", "0", "--discard=unmap", path)
    answer = newer.script("""
connect()
disk.pwrite(b"1" * 1000, 12345)
disk.pwrite(b"2" * (3 << 20), 1 << 20, nbd.CMD_FLAG_FUA)
disk.pwrite(b"3" * (2 << 20), 4 << 20)
disk.zero(4096, 0)
disk.zero(4096, 65536, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
disk.trim(65536, 7 << 20)
disk.flush()
chunks = []
data = disk.pread_structured(8 << 20, 0, lambda data, offset, kind, error: chunks.append(len(data)))
assert disk.pread_structured(8 << 20, 0, lambda *_: 0, nbd.CMD_FLAG_DF) == data
open(sys.argv[2], "wb").write(data)
disk.set_strict_mode(0)
print(json.dumps([
    refused(disk.pread, 512, 8 << 20),
    refused(disk.pwrite, b"x" * 600, (8 << 20) - 1),
    refused(disk.zero, 1 << 40, 0),
    refused(disk.trim, 1 << 40, 0),
    refused(disk.pread, 1 << 25 | 512, 0),
    refused(disk.flush, 1 << 14),
    sum(chunks),
]))
""", server.uri, newer.directory / "read")  # fmt: skip
    assert answer[:-1] == ["EINVAL", "ENOSPC", "ENOSPC", "EINVAL", "EINVAL", "EINVAL"]
    assert answer[-1] <= 8 * MiB
    expected = bytearray(b"\xaa" * 8 * MiB)
    expected[12345:13345] = b"1" * 1000
    expected[MiB : 4 * MiB] = b"2" * 3 * MiB
    expected[4 * MiB : 6 * MiB] = b"3" * 2 * MiB
    for offset, length in ((0, 4096), (65536, 4096), (7 * MiB, 65536)):
        expected[offset : offset + length] = bytes(length)
    assert (newer.directory / "read").read_bytes() == expected == path.read_bytes()


@pytest.mark.parametrize("shape", ["full", "sparse", "large"])
@pytest.mark.parametrize("tool", ["nbdcopy", "qemu-img"])
def test_copies_to_us(newer, servers, shape, tool):
    source, target = make_image(newer.directory, shape), newer.directory / "target"
    with target.open("wb") as file:
        file.write(b"\xee" * min(source.stat().st_size, 8 * MiB))
        file.truncate(source.stat().st_size)
    server = servers.nbdserve("-e", "0", "--discard=unmap", target)
    if tool == "nbdcopy":
        newer.run("nbdcopy", "--flush", source, server.uri)
    else:
        newer.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, server.uri)
    server.stop()
    compare(newer, source, target)
    assert target.stat().st_blocks <= source.stat().st_blocks + 64


@pytest.mark.parametrize("fua", ["", " -f"])
def test_qemu_io(newer, servers, fua):
    """Its client sends writes without the flag that announces their payload."""
    path = newer.directory / "disk"
    path.write_bytes(b"\xaa" * 8 * MiB)
    server = servers.nbdserve("-e", "0", "--discard=unmap", path)
    script = ["write{} -P 1 0 4k", "write{} -P 2 1M 3M", "write{} -P 3 4097 77", "write{} -z -u 5M 1M"]
    lines = [*(line.format(fua) for line in script), "discard 6M 1M"]
    words = [word for line in lines for word in ("-c", line)]
    newer.run("qemu-io", "-f", "raw", "-d", "unmap", *words, server.uri)
    expected = bytearray(b"\xaa" * 8 * MiB)
    pieces = ((0, 4096, 1), (MiB, 3 * MiB, 2), (4097, 77, 3), (5 * MiB, 2 * MiB, 0))
    for offset, length, value in pieces:
        expected[offset : offset + length] = bytes([value]) * length
    assert path.read_bytes() == expected


@pytest.fixture
def qemu_nbd(newer):
    """Starts the chroot's qemu-nbd."""
    started = []

    def start(*arguments):
        number = len(started)
        where, pid_file = newer.directory / f"qemu{number}.sock", newer.directory / f"qemu{number}.pid"
        place = ["-k", where, "--fork", "--pid-file", pid_file]
        newer.run("qemu-nbd", *place, "-t", "-e", "0", "-f", "raw", *arguments)
        started.append(Server(int(pid_file.read_text()), str(where)))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def test_our_client_reads_from_a_newer_qemu_nbd(newer, qemu_nbd):
    image, copy = make_image(newer.directory, "large"), newer.directory / "copy"
    server = qemu_nbd("-r", "-A", image)
    info = json.loads(run(*CLIENT, "info", "--json", server.uri))
    assert (info["protocol"], info["can_block_status_payload"]) == ("extended", True)
    extents = json.loads(run(*CLIENT, "map", "--json", server.uri))
    real = json.loads(newer.run("qemu-img", "map", "--output=json", "-f", "raw", image))
    assert [(extent["offset"], extent["length"], extent["type"] == 0) for extent in extents] == [
        (extent["start"], extent["length"], extent["data"]) for extent in real
    ]
    run(*CLIENT, "copy", server.uri, copy)
    compare(newer, image, copy)
    assert copy.stat().st_blocks <= image.stat().st_blocks + 64


@pytest.mark.parametrize("shape", ["sparse", "large"])
def test_our_client_writes_to_a_newer_qemu_nbd(newer, qemu_nbd, shape):
    image, target = make_image(newer.directory, shape), newer.directory / "target"
    with target.open("wb") as file:
        file.write(b"\xee" * 8 * MiB)
        file.truncate(image.stat().st_size)
    server = qemu_nbd("--discard=unmap", target)
    run(*CLIENT, "copy", image, server.uri)
    server.stop()
    compare(newer, image, target)
    assert target.stat().st_blocks <= image.stat().st_blocks + 64


def test_we_pass_a_newer_qemu_nbd_on(newer, servers, qemu_nbd):
    """Extended headers on both sides of us."""
    image, copy = make_image(newer.directory, "large"), newer.directory / "copy"
    behind = qemu_nbd("--discard=unmap", image)
    proxy = servers.nbdserve("-e", "0", "--discard=unmap", behind.uri)

    def maps():
        return [
            json.loads(newer.run("qemu-img", "map", "--output=json", "-f", "raw", server.uri))
            for server in (behind, proxy)
        ]

    before = maps()
    assert before[0] == before[1]
    script = ["write -P 1 4G 1M", "write -z -u -n 1M 4G", "read -P 0 4G 1M", "write -P 7 4098M 5000"]
    words = [word for line in script for word in ("-c", line)]
    newer.run("qemu-io", "-f", "raw", "-d", "unmap", *words, proxy.uri)
    after = maps()
    assert after[0] == after[1] != before[0]
    newer.run("nbdcopy", proxy.uri, copy)
    compare(newer, image, copy)
