"""The command nbdclient on every kind of server: what it lists, tells, maps and copies."""

import json

import pytest

from tests.interop.programs import CLIENT, KiB, MiB, attempt, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-nbd", "nbdkit", "nbd-server")

FILTERS = [
    (),
    ("--no-sr",),
    ("--mask-handshake=0",),
    ("--mask-handshake=1",),
    ("--filter=delay", "delay-read=1ms", "delay-write=1ms"),
    ("--filter=blocksize-policy", "blocksize-minimum=4K", "blocksize-maximum=64K"),
    ("--filter=noextents", "--filter=nozero"),
    ("--filter=nofilter", "--filter=fua", "fuamode=discard"),
]
KINDS = [
    ("qemu_nbd", ()),
    ("qemu_nbd", ("-A", "-e", "8")),
    ("nbdserve", ("-A", "-e", "8")),
    ("nbd_server", ()),
    *(("nbdkit", options) for options in FILTERS),
]


@pytest.fixture(params=KINDS, ids=lambda kind: " ".join([kind[0], *kind[1]]))
def start(request, servers):
    """Starts the same kind of server on any image."""
    kind, options = request.param

    def start(path):
        if kind == "nbd_server":
            return servers.nbd_server(path, "flush = true", "fua = true", "trim = true")
        if kind == "nbdkit":
            flags = [word for word in options if word.startswith("--")]
            return servers.nbdkit(*flags, "file", path, *(word for word in options if word not in flags))
        return getattr(servers, kind)("--discard=unmap", *options, path)

    # What has no structured replies has no block status.
    start.has_status = kind != "nbd_server" and not {"--no-sr", "--mask-handshake=0"} & set(options)
    start.tells_holes = start.has_status and "--filter=noextents" not in options
    start.tells_size = kind != "nbd_server"  # before it is opened, every image is empty to it
    return start


def test_info_map_and_dump(start, disk):
    uri = start(disk).uri
    info = json.loads(run(*CLIENT, "info", "--json", uri))
    assert (info["export-size"], info["is_read_only"]) == (8 * MiB if start.tells_size else 0, False)
    if start.has_status:
        extents = json.loads(run(*CLIENT, "map", "--json", uri))
        real = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", disk))
        found = [(extent["offset"], extent["length"]) for extent in extents if extent["type"] == 0]
        data = [(extent["start"], extent["length"]) for extent in real if extent["data"]]
        assert found == (data if start.tells_holes else [(0, 8 * MiB)])
    else:
        done = attempt(*CLIENT, "map", uri)
        assert done.stderr.startswith("nbdclient: the server does not offer the context")
        assert done.returncode == 1
    dumped = run(*CLIENT, "dump", uri, "--offset", str(64 * KiB), "--length", "16")
    assert disk.read_bytes()[64 * KiB : 64 * KiB + 16].hex(" ") in " ".join(dumped.split())


def test_copy_both_ways(start, disk, tmp_path):
    server, target, back = start(disk), tmp_path / "target", tmp_path / "back"
    run(*CLIENT, "copy", server.uri, back)
    assert back.read_bytes() == disk.read_bytes()
    assert not start.tells_holes or back.stat().st_blocks <= disk.stat().st_blocks + 64
    target.write_bytes(b"\xee" * 8 * MiB)
    other = start(target)
    run(*CLIENT, "copy", disk, other.uri)
    other.stop()
    assert target.read_bytes() == disk.read_bytes()


def test_copy_from_server_to_server(start, servers, disk, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"\xee" * 8 * MiB)
    behind = servers.nbdserve("-e", "0", "--discard=unmap", target)
    run(*CLIENT, "copy", start(disk).uri, behind.uri)
    behind.stop()
    assert target.read_bytes() == disk.read_bytes()


def test_list(servers, disk):
    described = servers.qemu_nbd("-x", "name", "-D", "text", disk)
    listed = json.loads(run(*CLIENT, "list", "--json", described.uri))
    assert "name" in json.dumps(listed) and "text" in json.dumps(listed)
