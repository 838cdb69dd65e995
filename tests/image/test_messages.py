"""What is said where, and in which order, when an image is damaged or cannot do what is asked."""

import os
import struct
import subprocess

import pytest

from tests.image.both import OURS, THEIRS, Both, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd")

MIB = 1 << 20


def qemu(directory, *words):
    subprocess.run(words, cwd=directory, check=True, capture_output=True)


def poke(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def prepare(directory):
    qemu(directory, "qemu-img", "create", "-q", "-f", "qcow2", "a", "1M")
    qemu(directory, "qemu-io", "-c", "write 0 512", "a")
    for name, offset, layout, value in (("place", 0, ">Q", 0x400200), ("length", 8, ">I", 1 << 28)):
        (directory / name).write_bytes((directory / "a").read_bytes())
        qemu(directory, "qemu-img", "snapshot", "-c", "one", name)
        (table,) = struct.unpack_from(">Q", (directory / name).read_bytes(), 64)
        poke(directory / name, table + offset, struct.pack(layout, value))
    qemu(directory, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "external", "1M")


@pytest.fixture
def both(tmp_path):
    return Both(tmp_path, prepare)


def test_snapshots_that_cannot_be(both):
    both.agree(
        *(f"snapshot -{action} one {name}" for name in ("place", "length") for action in ("a", "d")),
        *(f"convert -l one {name} out" for name in ("place", "length")),
        "snapshot -c one external",
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_in_one_pipe_errors_come_before_what_was_printed(both, unbuffered):
    """As from any C program, for scripts that keep both."""
    texts = []
    for program, directory in ((OURS, both.ours), (THEIRS, both.theirs)):
        # A cluster that nothing refers to is found twice, if it may not be freed.
        poke(directory / "a", 0x40000, struct.pack(">Q", 1 << 63 | 0x50200))
        done = subprocess.run(
            [*program, "check", "-r", "all", "a"],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
        assert "Double checking" in done.stdout
        texts.append(done.stdout)
    assert texts[0] == texts[1]


def test_corruption_is_told_once_and_on_standard_error(both):
    said = []
    for program, directory in ((OURS, both.ours), (THEIRS, both.theirs)):
        poke(directory / "a", 0x40000, struct.pack(">Q", 1 << 63 | 0x50200))
        status, out, err = run(program, ["convert", "-f", "qcow2", "-O", "raw", "a", "out"], directory)
        assert (status, out) == (1, "")
        said.append([line for line in err.splitlines() if line.startswith("qcow2: ")])
    assert len(said[0]) == len(said[1]) == 1
    assert said[0][0].startswith("qcow2: Image is corrupt: ")


def test_an_export_does_not_grow_for_an_image_that_needs_more(both, tmp_path):
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(MIB)
    address = tmp_path / "nbd"
    serve = ["qemu-nbd", "-t", "-f", "raw", "-k", str(address), "--fork", "--pid-file", str(tmp_path / "pid")]
    subprocess.run([*serve, str(tmp_path / "disk")], check=True)
    try:
        both.agree(f"create -q -f qcow2 -o preallocation=metadata nbd+unix:///?socket={address} 64M")
    finally:
        os.kill(int((tmp_path / "pid").read_text()), 15)
