"""-B, -A over backing files, and -l: clients see of our server what they see of qemu-nbd."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.interop.programs import OURS, Server, Servers, attempt, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """b0 and b1 are enabled, b2 is not; b0 is finer than a cluster."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "b0")
    run("qemu-img", "bitmap", "--add", path, "b1")
    run("qemu-img", "bitmap", "--add", "--disable", path, "b2")
    run("qemu-io", "-f", "qcow2", "-c", "write 1000 10000", "-c", "write -z 5M 1M", path)
    return path


def mapped(server: Server, context: str) -> list[tuple[int, int, int]]:
    rows = json.loads(run("nbdinfo", f"--map={context}", "--json", server.uri))
    out: list[tuple[int, int, int]] = []
    for row in rows:
        if out and out[-1][2] == row["type"]:
            out[-1] = (out[-1][0], out[-1][1] + row["length"], row["type"])
        else:
            out.append((row["offset"], row["length"], row["type"]))
    return out


def contexts(server: Server) -> list[str]:
    info = json.loads(run("nbdinfo", "--json", server.uri))
    return list(info["exports"][0]["contexts"])


@pytest.mark.parametrize("flags", [["-r"], []], ids=["read-only", "writable"])
def test_bitmaps_are_seen_as_of_qemu_nbd(servers: Servers, image: Path, flags: list[str]) -> None:
    names = ["b0", "b1", "b2"]
    command = [*flags, "-t", "-f", "qcow2", "-A", *(word for name in names for word in ("-B", name)), image]
    theirs = servers.qemu_nbd(*command)
    expected = {name: mapped(theirs, f"qemu:dirty-bitmap:{name}") for name in names}
    listed = contexts(theirs)
    theirs.stop()
    ours = servers.nbdserve(*command)
    assert contexts(ours) == listed
    assert {name: mapped(ours, f"qemu:dirty-bitmap:{name}") for name in names} == expected
    assert expected["b0"][:3] == [(0, 512, 0), (512, 10752, 1), (11264, (5 << 20) - 11264, 0)]


def test_writes_of_clients_are_seen_at_once_and_stored(servers: Servers, image: Path) -> None:
    server = servers.nbdserve("-t", "-f", "qcow2", "-B", "b0", "-B", "b2", image)
    run("qemu-io", "-f", "raw", "-c", "write 8M 4k", "-c", "write 0 512", server.uri)
    rows = mapped(server, "qemu:dirty-bitmap:b0")
    assert (8 << 20, 4096, 1) in rows
    assert rows[0] == (0, 11264, 1)
    assert mapped(server, "qemu:dirty-bitmap:b2") == [(0, 10 << 20, 0)]
    server.stop()
    theirs = servers.qemu_nbd("-r", "-t", "-f", "qcow2", "-B", "b0", image)
    assert mapped(theirs, "qemu:dirty-bitmap:b0") == rows
    theirs.stop()
    run("qemu-img", "check", image)


def test_qemu_maps_a_bitmap_through_our_server(servers: Servers, image: Path) -> None:
    """As backup tools do it: x-dirty-bitmap tells what is clean as data."""
    server = servers.nbdserve("-r", "-t", "-f", "qcow2", "-B", "b1", image)
    options = f"driver=nbd,server.type=unix,server.path={server.where},x-dirty-bitmap=qemu:dirty-bitmap:b1"
    rows = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    dirty = [(row["start"], row["length"]) for row in rows if not row["data"]]
    assert dirty == [(0, 65536), (5 << 20, 1 << 20)]


def test_a_bitmap_is_found_in_the_backing_file(servers: Servers, image: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top, "20M")
    run("qemu-io", "-f", "qcow2", "-c", "write 15M 64k", top)
    command = ["-r", "-t", "-f", "qcow2", "-A", "-B", "b1", top]
    theirs = servers.qemu_nbd(*command)
    depth = mapped(theirs, "qemu:allocation-depth")
    theirs.stop()
    ours = servers.nbdserve(*command)
    assert mapped(ours, "qemu:dirty-bitmap:b1") == [
        (0, 65536, 1), (65536, (5 << 20) - 65536, 0), (5 << 20, 1 << 20, 1), (6 << 20, 14 << 20, 0)
    ]  # fmt: skip
    assert mapped(ours, "qemu:allocation-depth") == depth
    ours.stop()
    ours = servers.nbdserve("-s", "-t", "-f", "qcow2", "-B", "b1", image)
    assert mapped(ours, "qemu:dirty-bitmap:b1")[0] == (0, 65536, 1)


def test_depths_over_a_chain_are_those_of_qemu_nbd(servers: Servers, tmp_path: Path) -> None:
    names = [tmp_path / f"{number}.qcow2" for number in range(4)]
    for number, path in enumerate(names):
        backing = ["-b", names[number - 1], "-F", "qcow2"] if number else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, f"{4 + number}M")
        run("qemu-io", "-f", "qcow2", "-c", f"write {number}M 1M", "-c", "write -z 3M 64k", path)
    seen = []
    for start in (servers.qemu_nbd, servers.nbdserve):
        server = start("-r", "-t", "-A", "-f", "qcow2", names[-1])
        seen.append((mapped(server, "qemu:allocation-depth"), mapped(server, "base:allocation")))
        server.stop()
    assert seen[0] == seen[1]


def refused(*command: object) -> str:
    done = attempt(*command)
    assert done.returncode == 1
    return done.stderr.strip()


def both(tmp_path: Path, *words: object) -> tuple[str, str]:
    socket = tmp_path / "refused.sock"
    theirs = refused("qemu-nbd", "-k", socket, *words).splitlines()[0]
    return theirs.removeprefix("qemu-nbd: "), refused(*OURS, "-k", socket, *words).removeprefix("nbdserve: ")


def test_what_is_refused_is_refused_in_the_same_words(image: Path, tmp_path: Path) -> None:
    stale = tmp_path / "stale.qcow2"
    data = bytearray(image.read_bytes())
    extension = data.index(struct.pack(">I", 0x23852875)) + 8
    (directory,) = struct.unpack_from(">Q", data, extension + 16)
    assert data[directory + 24 : directory + 26] == b"b0"
    data[directory + 15] |= 1  # in use
    stale.write_bytes(data)
    run("qemu-img", "snapshot", "-c", "one", image)
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(1 << 20))
    for words in (
        ["-f", "qcow2", "-B", "none", image],
        ["-f", "qcow2", "-B", "", image],
        ["-f", "raw", "-B", "b0", image],
        ["-f", "qcow2", "-B", "b0", stale],
        ["-f", "qcow2", "-r", "-B", "b0", stale],
        ["-f", "qcow2", "-l", "none", image],
        ["-f", "qcow2", "-l", "snapshot.id=9", image],
        ["-f", "qcow2", "-l", "snapshot.name=none", image],
        ["-f", "qcow2", "-l", "snapshot.name=one,snapshot.id=2", image],
        ["-f", "raw", "-l", "one", raw],
    ):
        theirs, ours = both(tmp_path, *words)
        assert ours == theirs, words


@pytest.mark.parametrize("choice", ["one", "1", "snapshot.id=1", "snapshot.name=one"])
def test_internal_snapshots_are_served_as_by_qemu_nbd(servers: Servers, image: Path, choice: str) -> None:
    run("qemu-img", "snapshot", "-c", "one", image)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 10M", image)
    command = ["-t", "-f", "qcow2", "-l", choice, image]
    seen = []
    for start in (servers.qemu_nbd, servers.nbdserve):
        server = start(*command)
        info = json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]
        raw = image.with_suffix(".raw")
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, raw)
        seen.append((info["export-size"], info["is_read_only"], raw.read_bytes()))
        server.stop()
    assert seen[0] == seen[1]
    assert seen[1][1]
    assert seen[1][2][1000] == 0xCD


def test_snapshots_and_bitmaps_are_of_file_alone(servers: Servers, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", other, "1M")
    run("qemu-img", "snapshot", "-c", "one", image)
    server = servers.nbdserve(
        "-t", "-f", "qcow2", "-l", "one", "-B", "b2",
        "--export", f"more=driver=qcow2,file.filename={other}", image,
    )  # fmt: skip
    run("qemu-io", "-f", "raw", "-c", "write 0 4k", server.export("more"))
    assert "qemu:dirty-bitmap:b2" in contexts(server)
