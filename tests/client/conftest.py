"""Real servers of other projects, and one that says whatever a test wants."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from drivers.net.stream import Stream
from drivers.protocol.nbd.connection import ClientConnection
from drivers.wire.nbd.client_handshake import Export, ReplyMode
from drivers.wire.nbd.constants import TransmissionFlag

ALL_FLAGS = TransmissionFlag((1 << 13) - 1) & ~TransmissionFlag.READ_ONLY


def stop(pid: int, number: signal.Signals) -> None:
    """End a daemon that is not our child, and wait until it is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, number)
        if not select.select([handle], [], [], 5)[0]:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


class Peers:
    """Starts servers that have forked into the background, and so are ready, when this returns."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pid_files: list[Path] = []

    def qemu_nbd(self, image: Path, *options: str) -> str:
        form = () if "-f" in options else ("-f", "raw")

        def command(sock: str, pid: str) -> list[str]:
            return ["qemu-nbd", "-t", "-k", sock, "--fork", "--pid-file", pid, *form, *options, str(image)]

        return self._start(command)

    def nbdserve(self, image: Path, *options: str) -> str:
        """Our own: the only server here with extended headers."""

        def command(sock: str, pid: str) -> list[str]:
            ours = [sys.executable, "-m", "nbdserve", "-f", "raw", "-t", "-k", sock, "--fork"]
            return [*ours, "--pid-file", pid, *options, str(image)]

        return self._start(command)

    def nbdkit(self, *options: str) -> str:
        return self._start(lambda sock, pid: ["nbdkit", "-U", sock, "-P", pid, *options])

    def recorder(self, log: Path) -> str:
        """1 MiB that takes everything and keeps only a log of what was asked. It has no FUA."""
        return self.nbdkit(
            "eval",
            "get_size=echo 1M",
            "can_write=exit 0",
            "can_flush=exit 0",
            "can_zero=exit 0",
            "can_fua=echo none",
            "pread=dd if=/dev/zero count=$3 iflag=count_bytes 2>/dev/null",
            f"pwrite=cat >/dev/null; echo write $4 $3 >> {log}",
            f"zero=echo zero $4 $3 $5 >> {log}",
            f"flush=echo flush >> {log}",
        )

    def nbd_server(self, image: Path, *lines: str) -> str:
        config = self.directory / "nbd-server.conf"

        def command(sock: str, pid: str) -> list[str]:
            text = ["[generic]", f"unixsock = {sock}", "allowlist = true", "[disk]", f"exportname = {image}"]
            config.write_text("\n".join([*text, *lines, ""]))
            return ["nbd-server", "-C", str(config), "-p", pid]

        return self._start(command).replace("///?", "///disk?")

    def _start(self, command: Callable[[str, str], list[str]]) -> str:
        number = len(self.pid_files)
        sock, pid = self.directory / f"{number}.sock", self.directory / f"{number}.pid"
        self.pid_files.append(pid)
        subprocess.run(command(str(sock), str(pid)), check=True, timeout=20, stdin=subprocess.DEVNULL)
        _wait_for(sock)
        return f"nbd+unix:///?socket={sock}"

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop all of them. SIGKILL is for those that would finish slow requests first."""
        for pid_file in self.pid_files:
            if pid_file.exists():
                stop(int(pid_file.read_text()), number)
                pid_file.unlink(missing_ok=True)


def _wait_for(path: Path) -> None:
    """Not every server listens before it goes to the background."""
    deadline = time.monotonic() + 20
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline, f"nobody listens on {path}"
        time.sleep(0.01)


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    started = Peers(tmp_path)
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """1 MiB with a hole in its middle."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * 1024)
        file.truncate(768 << 10)
        file.seek(768 << 10)
        file.write(os.urandom(256 << 10))
    return path


class Script:
    """Both ends of a socket: our connection, and a server's that a test plays by hand."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.stream = Stream(ours)
        self.server = Stream(theirs)

    def connection(
        self,
        mode: ReplyMode = ReplyMode.STRUCTURED,
        *,
        size: int = 1 << 20,
        flags: TransmissionFlag = ALL_FLAGS,
        contexts: dict[str, int] | None = None,
        maximum_payload: int = 32 << 20,
        minimum_block: int = 1,
    ) -> ClientConnection:
        return ClientConnection(
            self.stream,
            Export(
                "",
                size,
                flags,
                mode=mode,
                contexts=contexts or {},
                maximum_payload=maximum_payload,
                minimum_block=minimum_block,
            ),
        )


@pytest.fixture
async def script() -> Script:
    played = Script()
    yield played
    played.stream.close()
    played.server.close()
    await trio.lowlevel.checkpoint()
