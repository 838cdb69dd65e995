"""Images whose maker wants to see other files: with --untrusted none of them is opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.qcow2.qemu import create, qemu_io, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 1 << 20
# Tells of every file that Python opens, and of every connection.
WATCH = """
import runpy, sys
out = open(sys.argv[1], "w", buffering=1)
def hook(event, arguments):
    if event in ("open", "socket.connect"):
        print(arguments[0] if event == "open" else f"connect {arguments[1]}", file=out)
sys.addaudithook(hook)
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def watched(tmp_path: Path, *command: object) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run one of our programs; what it opened or connected to."""
    report = tmp_path / "report"
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(report), *map(str, command)],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    return done, report.read_text().splitlines()


BACKING = {
    "beside": "secret",
    "json": 'json:{"driver":"raw","file":{"driver":"file","filename":"secret"}}',
    "file:": "file:secret",
    "a device": "host_device:/dev/zero",
    "a server": "nbd+unix:///?socket=secret.sock",
}
COMMANDS = {
    "convert": ("convert", "-O", "raw", "disk", "out"),
    "map": ("map", "disk"),
    "measure": ("measure", "-O", "qcow2", "disk"),
    "compare": ("compare", "disk", "disk"),
    "info": ("info", "--backing-chain", "disk"),
    "commit": ("commit", "disk"),
    "rebase": ("rebase", "-b", "", "disk"),
    "dd": ("dd", "if=disk", "of=out", "bs=1M"),
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(os.urandom(SIZE))
    path = create(tmp_path / "disk", SIZE)
    qemu_io(path, "write -P 1 64k 64k")
    return path


def name_backing(path: Path, name: str) -> None:
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path)


def opened_others(report: list[str]) -> list[str]:
    names = ("secret", "secret.sock", "zero")
    return [line for line in report if line.startswith("connect") or line.rpartition("/")[2] in names]


@pytest.mark.parametrize("name", BACKING)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_opens_the_backing_file(tmp_path: Path, disk: Path, command: str, name: str) -> None:
    name_backing(disk, BACKING[name])
    first, *rest = COMMANDS[command]
    done, report = watched(tmp_path, "nbdclient.image", first, "--untrusted", *rest)
    assert done.returncode != 0
    assert "is not trusted, and names a backing file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not opened_others(report)
    assert any(line.endswith("disk") for line in report)


@pytest.mark.parametrize("command", ["info", "check"])
def test_what_needs_no_backing_file_does_without(tmp_path: Path, disk: Path, command: str) -> None:
    name_backing(disk, "secret")
    done, report = watched(tmp_path, "nbdclient.image", command, "--untrusted", "disk")
    assert done.returncode == 0, done.stderr
    assert not opened_others(report)


def test_without_the_option_it_is_opened(tmp_path: Path, disk: Path) -> None:
    name_backing(disk, "secret")
    done, report = watched(tmp_path, "nbdclient.image", "convert", "-O", "raw", "disk", "out")
    assert done.returncode == 0, done.stderr
    assert opened_others(report)


def test_a_data_file_is_not_opened(tmp_path: Path) -> None:
    create(tmp_path / "disk", SIZE, f"data_file={tmp_path}/secret")
    for command in ("info", "check", "map"):
        done, report = watched(tmp_path, "nbdclient.image", command, "--untrusted", "disk")
        assert done.returncode != 0
        assert "is not trusted, and names a data file" in done.stderr
        assert not opened_others(report)


@pytest.mark.parametrize("name", BACKING)
def test_the_server_refuses_it(tmp_path: Path, disk: Path, name: str) -> None:
    name_backing(disk, BACKING[name])
    socket = tmp_path / "server.sock"
    words = ("nbdserve", "--untrusted", "-f", "qcow2", "-k", socket, "disk")
    done, report = watched(tmp_path, *words)
    assert done.returncode == 1
    assert "is not trusted, and names a backing file" in done.stderr
    assert not opened_others(report)


def test_what_the_user_names_is_opened(tmp_path: Path, disk: Path) -> None:
    name_backing(disk, "nowhere")
    options = "driver=qcow2,file.filename=disk,backing.driver=raw,backing.file.filename=secret"
    words = ("convert", "--untrusted", "--image-opts", options, "-O", "raw", "out")
    done, report = watched(tmp_path, "nbdclient.image", *words)
    assert done.returncode == 0, done.stderr
    assert opened_others(report)
    content = (tmp_path / "secret").read_bytes()
    assert (tmp_path / "out").read_bytes() == content[:65536] + b"\x01" * 65536 + content[131072:]
