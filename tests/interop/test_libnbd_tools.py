"""nbdinfo and nbdcopy on our server."""

import json
import os

import pytest

from tests.interop.conftest import SHAPES
from tests.interop.programs import GiB, KiB, MiB, attempt, run

pytestmark = pytest.mark.peer("nbdinfo", "nbdcopy", "qemu-img")

# What nbdinfo finds out or makes up itself.
NOT_OURS = ("content", "uri", "export-size-str")


def sectors(size):
    return -(-size // 512) * 512


def compare(first, second):
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", first, second)


@pytest.mark.parametrize("shape", SHAPES)
def test_info(shape_server, shapes, shape):
    uri, size = shape_server.export(shape), sectors(shapes[shape].stat().st_size)
    [export] = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert {key: value for key, value in export.items() if key not in NOT_OURS} == {
        "export-name": shape,
        "contexts": ["base:allocation", "qemu:allocation-depth"],
        "export-size": size,
        "is_rotational": False,
        "is_read_only": True,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": False,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": False,
        "can_zero": False,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MiB,
    }
    assert run("nbdinfo", "--size", uri) == f"{size}\n"


@pytest.mark.parametrize("shape", SHAPES)
def test_map(shape_server, shapes, shape):
    uri, path = shape_server.export(shape), shapes[shape]
    extents = json.loads(run("nbdinfo", "--map", "--json", uri))
    real = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", path))
    assert [(extent["offset"], extent["length"], extent["type"] == 0) for extent in extents] == [
        (extent["start"], extent["length"], extent["data"]) for extent in real
    ]
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", uri))
    assert sum(total["size"] for total in totals) == sectors(path.stat().st_size)
    depths = json.loads(run("nbdinfo", "--map=qemu:allocation-depth", "--json", uri))
    assert sum(extent["length"] for extent in depths) == sectors(path.stat().st_size)
    assert {extent["type"] for extent in depths} == {1}


def test_list(shape_server):
    listed = json.loads(run("nbdinfo", "--list", "--json", shape_server.uri))
    assert [export["export-name"] for export in listed["exports"]] == list(SHAPES)
    assert (listed["protocol"], listed["TLS"], listed["structured"]) == ("newstyle-fixed", False, True)


def test_questions(servers, disk):
    # (option, what it answers on a writable export and on a read-only one that is for one client)
    answers = {
        "--is=read-only": (2, 0),
        "--can=write": (0, 2),
        "--is=rotational": (2, 2),
        "--can=cache": (0, 0),
        "--can=df": (0, 0),
        "--can=fast-zero": (0, 2),
        "--can=flush": (0, 0),
        "--can=fua": (0, 0),
        "--can=multi-conn": (0, 2),
        "--can=trim": (0, 2),
        "--can=zero": (0, 2),
        "--can=structured-reply": (0, 0),
        "--is=tls": (2, 2),
        "--can=connect": (0, 0),
    }
    servers_asked = servers.nbdserve("-e", "2", disk), servers.nbdserve("-r", disk)
    for option, expected in answers.items():
        assert (
            tuple(attempt("nbdinfo", option, server.uri).returncode for server in servers_asked) == expected
        )


def test_nothing_of_that_name(shape_server):
    done = attempt("nbdinfo", shape_server.export("nosuch"))
    assert done.returncode == 1
    assert "No such file or directory for export: nosuch" in done.stderr


# The others than the first would read all of the 5 GiB.
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (options, shape)
        for options in ((), ("--connections=1", "--synchronous"), ("--no-extents",))
        for shape in SHAPES
        if not options or shape != "large"
    ],
    ids=str,
)
def test_copy_to_a_file(shape_server, shapes, shape, options, tmp_path):
    source, target = shapes[shape], tmp_path / "target"
    run("nbdcopy", *options, shape_server.export(shape), target)
    assert target.stat().st_size == sectors(source.stat().st_size)
    compare(source, target)
    assert target.stat().st_blocks <= source.stat().st_blocks + 64 or "--no-extents" in options


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (("--flush",), "full"),
        (("--flush",), "large"),
        (("--allocated",), "sparse"),
        (("--connections=4", "--requests=8"), "sparse"),
        (("--connections=4", "--requests=8"), "full"),
    ],
    ids=str,
)
def test_copy_from_a_file(servers, shapes, shape, options, tmp_path, tcp):
    source, target = shapes[shape], tmp_path / "target"
    size = source.stat().st_size
    with target.open("wb") as file:
        file.write(b"\xee" * min(size, 8 * MiB))
        file.truncate(size)
    server = servers.nbdserve("-e", "0", "--discard=unmap", target, tcp=tcp)
    run("nbdcopy", *options, source, server.uri)
    server.stop()
    compare(source, target)
    if "--allocated" in options:
        assert target.stat().st_blocks * 512 >= size
    else:
        assert target.stat().st_blocks <= source.stat().st_blocks + 64


def test_copy_between_two_of_our_servers(servers, shape_server, shapes, tmp_path):
    target = tmp_path / "target"
    with target.open("wb") as file:
        file.truncate(5 * GiB)
    server = servers.nbdserve("-e", "0", "--discard=unmap", target)
    run("nbdcopy", shape_server.export("large"), server.uri)
    server.stop()
    compare(shapes["large"], target)


def test_copy_of_small_blocks(servers, tmp_path):
    """The pieces of a fine-grained image come out where they belong."""
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        for number in range(0, 2048, 2):
            os.pwrite(file.fileno(), os.urandom(4096), number * 4 * KiB)
        file.truncate(8 * MiB)
    server = servers.nbdserve("-r", "-e", "4", source)
    run("nbdcopy", server.uri, target)
    compare(source, target)
