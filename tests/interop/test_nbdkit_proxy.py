"""nbdkit's nbd plugin as a proxy in front of our server, and our server in front of others."""

import json
import os

import pytest

from tests.interop.conftest import SHAPES
from tests.interop.programs import MiB, run

pytestmark = pytest.mark.peer("nbdkit", "qemu-img", "qemu-io", "nbdinfo", "nbdcopy")


def same(first, second):
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", first, second)


@pytest.mark.parametrize("shape", SHAPES)
def test_reads_and_extents_through_the_proxy(servers, shape_server, shapes, shape):
    proxy = servers.nbdkit("-r", "nbd", f"uri={shape_server.export(shape)}")
    direct, proxied = (
        json.loads(run("nbdinfo", "--map", "--json", uri)) for uri in (shape_server.export(shape), proxy.uri)
    )
    assert direct == proxied
    if shape != "large":
        same(shapes[shape], proxy.uri)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_writes_through_the_proxy(servers, disk, tcp):
    server = servers.nbdserve("-e", "4", "--discard=unmap", disk, tcp=tcp)
    proxy = servers.nbdkit("nbd", f"uri={server.uri}", "shared=true")
    before = bytearray(disk.read_bytes())
    run(
        "qemu-io", "-f", "raw", "-d", "unmap",
        "-c", "write -P 1 1000 100k", "-c", "write -f -P 2 3M 1M", "-c", "write -z -u 4M 64k",
        "-c", "write -z 5M 77", "-c", "discard 6M 1M", "-c", "flush", "-c", "read -P 1 1000 100k", proxy.uri,
    )  # fmt: skip
    before[1000 : 1000 + 102400] = b"\x01" * 102400
    before[3 * MiB : 4 * MiB] = b"\x02" * MiB
    for start, length in ((4 * MiB, 65536), (5 * MiB, 77), (6 * MiB, MiB)):
        before[start : start + length] = bytes(length)
    assert disk.read_bytes() == before


def test_filters_on_top_of_us(servers, disk, tmp_path):
    server = servers.nbdserve("-e", "4", disk)
    before = disk.read_bytes()
    cow = servers.nbdkit("--filter=cow", "--filter=readahead", "--filter=stats", "nbd", f"uri={server.uri}",
                         f"statsfile={tmp_path}/stats")  # fmt: skip
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", "-c", "read -P 1 0 4M", cow.uri)
    run("nbdcopy", cow.uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"\x01" * 4 * MiB + before[4 * MiB :]
    assert disk.read_bytes() == before


def test_the_proxy_comes_back_after_our_restart(servers, disk):
    """nbdkit's retry filter reconnects; the address is taken by a second server of ours."""
    first = servers.nbdserve("-e", "4", disk)
    proxy = servers.nbdkit("--filter=retry", "nbd", f"socket={first.where}", "retry=20", "retry-delay=1")
    data = os.urandom(4096)
    pattern = disk.with_name("pattern")
    pattern.write_bytes(data)
    run("qemu-io", "-f", "raw", "-c", f"write -s {pattern} 0 4k", "-c", "flush", proxy.uri)
    first.stop()
    again = servers.nbdserve("-e", "4", disk)
    os.rename(again.where, first.where)
    again.where = first.where
    run("nbdcopy", proxy.uri, disk.with_name("copy"))
    assert disk.with_name("copy").read_bytes()[:4096] == data
