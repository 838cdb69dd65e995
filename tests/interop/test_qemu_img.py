"""qemu-img on our server sees what it sees in the file itself."""

import json
import os

import pytest

from tests.interop.conftest import SHAPES
from tests.interop.programs import GiB, MiB, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")


def sectors(size):
    return -(-size // 512) * 512


@pytest.mark.parametrize("shape", SHAPES)
def test_info_map_and_compare(shape_server, shapes, shape):
    uri, path = shape_server.export(shape), shapes[shape]
    info = json.loads(run("qemu-img", "info", "--output=json", uri))
    assert info["virtual-size"] == sectors(path.stat().st_size)
    assert info["format"] == "raw"
    seen, real = (run("qemu-img", "map", "--output=json", "-f", "raw", image) for image in (uri, path))
    assert seen == real
    if shape != "large":
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", path, uri)


@pytest.mark.peer("qemu-nbd")
@pytest.mark.parametrize("shape", ["sparse", "odd", "short"])
def test_sees_the_same_through_qemu_nbd(servers, shape_server, shapes, shape):
    genuine = servers.qemu_nbd("-r", "-A", shapes[shape])
    for context in ("base:allocation", "qemu:allocation-depth"):
        ours, theirs = (
            run(
                "qemu-img", "map", "--output=json", "--image-opts",
                f"driver=nbd,{where},x-dirty-bitmap={context}",
            )
            for where in (_options(shape_server, shape), _options(genuine, ""))
        )  # fmt: skip
        assert ours == theirs


def _options(server, export):
    if not server.tcp:
        return f"server.type=unix,server.path={server.where},export={export}"
    host, _, port = server.where.rpartition(":")
    return f"server.type=inet,server.host={host},server.port={port},export={export}"


@pytest.mark.parametrize("shape", SHAPES)
def test_convert_from_us(shape_server, shapes, shape, tmp_path):
    source, target = shapes[shape], tmp_path / "target"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", shape_server.export(shape), target)
    assert target.stat().st_size == sectors(source.stat().st_size)
    # Holes stay holes: 5 GiB with 200 KiB of data do not become 5 GiB.
    assert target.stat().st_blocks <= source.stat().st_blocks + 64
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, target)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("shape", ["full", "sparse", "odd", "short", "large"])
def test_convert_to_us(servers, shapes, shape, tmp_path, tcp):
    source, target = shapes[shape], tmp_path / "target"
    with target.open("wb") as file:
        # What is not written over must be zeroed.
        file.write(b"\xee" * min(source.stat().st_size, 16 * MiB))
        file.truncate(source.stat().st_size)
    server = servers.nbdserve("-e", "4", "--discard=unmap", target, tcp=tcp)
    run("qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", source, server.uri)
    server.stop()
    assert target.stat().st_size == source.stat().st_size
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, target)
    assert target.stat().st_blocks <= source.stat().st_blocks + 64


def test_a_qcow2_image_inside_our_raw_export(servers, tmp_path):
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 * MiB)
    server = servers.nbdserve("-e", "2", "--discard=unmap", disk)
    run("qemu-img", "create", "-q", "-f", "qcow2", server.uri, "64M")
    script = ["write -P 0x5a 1M 3M", "write -P 7 63M 1M", "write -z 2M 1M", "discard 63M 64k", "flush"]
    run(
        "qemu-io",
        "-f",
        "qcow2",
        "-d",
        "unmap",
        *(word for line in script for word in ("-c", line)),
        server.uri,
    )
    run("qemu-io", "-f", "qcow2", "-c", "read -P 0x5a 1M 1M", "-c", "read -P 0 2M 1M", server.uri)
    run("qemu-img", "snapshot", "-c", "one", server.uri)
    check = json.loads(run("qemu-img", "check", "--output=json", "-f", "qcow2", server.uri))
    assert "corruptions" not in check and "leaks" not in check
    server.stop()
    # The same image, now straight from the file.
    assert "virtual size: 64 MiB" in run("qemu-img", "info", "-f", "qcow2", disk)
    run("qemu-img", "check", "-f", "qcow2", disk)
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x5a 1M 1M", "-c", "read -P 7 64640k 896k", disk)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
def test_bench(servers, tmp_path, aio, tcp):
    disk = tmp_path / "disk"
    disk.write_bytes(os.urandom(16 * MiB))
    direct = ["--cache=none", f"--aio={aio}"] if aio != "threads" else []
    server = servers.nbdserve(*direct, disk, tcp=tcp)
    bench = ["qemu-img", "bench", "-f", "raw", "-d", "32"]
    for options in (["-c", "400"], ["-s", "256k", "-c", "32"]):
        assert "Run completed" in run(*bench, *options, server.uri)
    assert "Run completed" in run(
        *bench, "-w", "--pattern=0x42", "-c", "400", "--flush-interval=64", server.uri
    )
    server.stop()
    content = disk.read_bytes()
    assert content[: 400 * 4096] == b"\x42" * (400 * 4096)
    assert len(content) == 16 * MiB


def test_an_offset_hides_what_lies_before_it(servers, disk):
    content = disk.read_bytes()
    server = servers.nbdserve("-o", str(MiB + 512), "-r", disk)
    tail = disk.with_name("tail")
    tail.write_bytes(content[MiB + 512 :])
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", tail, server.uri)


def test_an_empty_image(servers, tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    server = servers.nbdserve(empty)
    assert json.loads(run("qemu-img", "info", "--output=json", server.uri))["virtual-size"] == 0
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", server.uri))
    assert sum(extent["length"] for extent in extents) == 0
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size == 0


def test_requests_beyond_4_gib(servers, tmp_path):
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(6 * GiB)
    server = servers.nbdserve("--discard=unmap", disk)
    script = ["write -P 9 4G 1M", "write -P 8 4294836224 256k", "write -z -u -n 0 5G", "write -P 7 5G 4k"]
    run(
        "qemu-io", "-f", "raw", "-d", "unmap", *(word for line in script for word in ("-c", line)), server.uri
    )
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", server.uri))
    assert [(extent["start"], extent["length"]) for extent in extents if extent["data"]] == [(5 * GiB, 4096)]
