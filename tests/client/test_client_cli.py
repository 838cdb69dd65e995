"""The subcommands list, info, map and dump, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path
from typing import Any

import pytest

from drivers.errors import OptionError
from nbdclient.cli import plot
from nbdclient.cli.arguments import parse

KiB, MiB = 1 << 10, 1 << 20


def nbdclient(*arguments: str, status: int = 0, **environment: str) -> str:
    """Standard output; standard error where an error is expected."""
    done = subprocess.run(
        [sys.executable, "-m", "nbdclient", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | environment,
    )
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr.startswith("nbdclient: ") and done.stderr.count("\n") == 1
        return done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.peer("nbdkit")
def test_list(peers: Any, tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "one\x1b[2J").write_bytes(bytes(1536))
    uri = peers.nbdkit("file", f"dir={tmp_path}/exports")
    assert nbdclient("list", uri) == '"one\N{REPLACEMENT CHARACTER}[2J"\t1.5 KiB\n'
    (export,) = json.loads(nbdclient("list", "--json", uri))["exports"]
    assert (export["export-name"], export["export-size"]) == ("one\x1b[2J", 1536)


@pytest.mark.peer("qemu-nbd", "nbdinfo")
def test_info_says_what_nbdinfo_says(peers: Any, image: Path) -> None:
    uri = peers.qemu_nbd(image, "-x", "disk", "-D", "a disk", "-r", "-A").replace("///", "///disk")
    ours = json.loads(nbdclient("info", "--json", uri))
    theirs = subprocess.run(["nbdinfo", "--json", uri], capture_output=True, check=True).stdout
    (expected,) = json.loads(theirs)["exports"]
    common = set(ours) & set(expected) - {"export-size-str"}
    assert {"export-name", "export-size", "is_read_only", "can_multi_conn", "block_size_minimum"} <= common
    assert {key: ours[key] for key in common} == {key: expected[key] for key in common}
    text = nbdclient("info", uri)
    assert 'export:      "disk"\n' in text and "description: a disk\n" in text
    assert "size:        1048576 bytes (1 MiB)\n" in text and "qemu:allocation-depth" in text


@pytest.mark.peer("nbdkit")
def test_map(peers: Any) -> None:
    uri = peers.nbdkit("data", "data=@65536 1", "size=1M")
    table = [line.split() for line in nbdclient("map", uri).splitlines()]
    assert table == [
        ["0", "65536", "3", "hole,zero"],
        ["65536", "32768", "0", "data"],
        ["98304", "950272", "3", "hole,zero"],
    ]
    rows = json.loads(nbdclient("map", "--json", uri))
    assert rows[1] == {"offset": 65536, "length": 32768, "type": 0, "description": "data"}
    totals = nbdclient("map", "--totals", uri).splitlines()
    assert [line.split()[0] for line in totals] == ["32768", "1015808"] and "96.9%" in totals[1]
    refused = nbdclient("map", "--context", "x:y", uri, status=1)
    assert "does not offer the context 'x:y'" in refused


@pytest.mark.peer("nbdkit")
def test_plot(peers: Any, tmp_path: Path) -> None:
    uri = peers.nbdkit("data", "data=@524288 1*524288", "size=1M")
    bar, *_, first, second = nbdclient("map", "--plot", uri, COLUMNS="42", TERM="dumb").splitlines()
    assert bar == "." * 20 + "#" * 20
    assert first.split() == [".", "hole,zero", "512", "KiB", "50.0%"]
    assert second.split() == ["#", "data", "512", "KiB", "50.0%"]
    assert "\x1b[" in nbdclient("map", uri, "--plot", FORCE_COLOR="1", COLORTERM="truecolor")

    nbdclient("map", "--plot", f"{tmp_path}/disk.svg", uri)
    titles = [e.text for e in ElementTree.parse(tmp_path / "disk.svg").iter() if e.tag.endswith("title")]
    assert titles == ["hole,zero: 524288 bytes at 0", "data: 524288 bytes at 524288"]
    nbdclient("map", "--plot", f"{tmp_path}/disk.png", uri)
    pixel = png_pixels((tmp_path / "disk.png").read_bytes())
    assert pixel(20, 20) == (225, 225, 225) and pixel(1000, 20) == (31, 119, 180)
    assert "writes .svg and .png" in nbdclient("map", "--plot", f"{tmp_path}/disk.gif", uri, status=1)


def png_pixels(data: bytes) -> Any:
    """A function from x and y to the colour there; checks the file's structure."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(body),)
        chunks[body[:4]] = body[4:]
        at += 12 + length
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    rows = zlib.decompress(chunks[b"IDAT"])
    assert len(rows) == height * (1 + 3 * width)
    return lambda x, y: tuple(rows[y * (1 + 3 * width) + 1 + 3 * x :][:3])


def test_a_plot_of_very_many_extents_stays_small() -> None:
    extents = [(at * 512, 512, "data" if at % 2 else "hole") for at in range(30_000)]
    picture = plot.Picture(30_000 * 512, extents)
    assert len(plot.svg(picture)) < 200_000
    for colour in picture.columns(100):
        assert colour == pytest.approx((94.5, 138.5, 169), abs=1)
    with pytest.raises(OptionError, match="empty"):
        plot.draw(plot.Picture(0, []), "-")


@pytest.mark.peer("nbdkit")
def test_dump(peers: Any) -> None:
    uri = peers.nbdkit("data", "data=@48 0x41*20", "size=1M")
    assert nbdclient("dump", uri, "--offset", "8", "--length", "72") == (
        "0000000008  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n"
        "*\n"
        "0000000028  00 00 00 00 00 00 00 00  41 41 41 41 41 41 41 41  |........AAAAAAAA|\n"
        "0000000038  41 41 41 41 41 41 41 41  41 41 41 41 00 00 00 00  |AAAAAAAAAAAA....|\n"
        "0000000048  00 00 00 00 00 00 00 00                           |........|\n"
        "0000000050\n"
    )
    assert nbdclient("dump", uri, "--offset", "1M") == "0000100000\n"
    assert "ends behind the export" in nbdclient("dump", uri, "--length", "2M", status=1)


@pytest.mark.peer("nbdkit")
def test_a_reader_that_leaves_and_an_interrupt_are_quiet(peers: Any) -> None:
    uri = peers.nbdkit("pattern", "64M")
    argv = [sys.executable, "-m", "nbdclient"]
    with subprocess.Popen([*argv, "dump", uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(100)
        process.stdout.close()
        assert (process.wait(20), process.stderr.read()) == (141, b"")
    slow = peers.nbdkit("--filter=delay", "pattern", "64M", "delay-read=60")
    with subprocess.Popen([*argv, "copy", "--progress", slow, "null:"], stderr=subprocess.PIPE) as process:
        assert process.stderr
        process.stderr.read(10)  # the bar is there, so it is at work
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert b"Traceback" not in process.stderr.read()
    peers.stop(signal.SIGKILL)


def test_errors_are_one_line(tmp_path: Path) -> None:
    for arguments in (
        ("list", f"nbd+unix:///?socket={tmp_path}/none"),
        ("info", "http://localhost/"),
        ("info", "nbds://localhost/"),
        ("dump", "nbd://localhost:1/"),
        ("copy", f"{tmp_path}/none", "null:"),
    ):
        nbdclient(*arguments, status=1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["copy", "a", "b", "--requests", "0"],
        ["copy", "a", "b", "--requests", "x"],
        ["copy", "a", "b", "--request-size", "1"],
        ["copy", "a", "b", "--connections", "1000"],
        ["dump", "a", "--length", "x"],
        ["map"],
        [],
    ],
)
def test_the_command_line_refuses_nonsense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_command_line_imports_little() -> None:
    listing = "import sys, nbdclient.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", listing], capture_output=True, check=True, text=True)
    assert not {"trio", "rich", "asyncio", "json", "ssl"} & set(loaded.stdout.split())


@pytest.mark.peer("nbdkit")
def test_a_map_of_a_large_sparse_disk_takes_no_time(peers: Any) -> None:
    totals = nbdclient("map", "--totals", peers.nbdkit("memory", "1T"))
    assert totals.split()[0] == str(1 << 40)
