"""A real server in a process of its own, with what it must not use up in plain sight."""

from __future__ import annotations

import contextlib
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

from tests.hostile.client import TIMEOUT, Client

SIZE = 64 << 20
# The socket is handed over listening, so that the first client need not wait for the start.
ACTIVATE = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&$LISTENER'

Address = str | tuple[str, int]


class Served:
    """An nbdserve process. `address` is its socket's."""

    def __init__(
        self, *arguments: str, listener: socket.socket, setup: Callable[[], None] | None = None
    ) -> None:
        name = listener.getsockname()
        self.address: Address = name if listener.family == socket.AF_UNIX else name[:2]
        self.process = subprocess.Popen(
            ["bash", "-c", ACTIVATE, "activate", sys.executable, "-m", "nbdserve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTENER": str(listener.fileno())},
            preexec_fn=setup,
        )
        listener.close()
        self.pid = self.process.pid

    def connect(self) -> Client:
        return Client(self.address)

    def good(self, style: str = "structured") -> Client:
        """A client that has negotiated the default export."""
        return self.connect().go(style)

    def check(self) -> None:
        """A good client is served, and served right."""
        with self.good() as client:
            data = os.urandom(4096)
            assert client.write(client.size - 4096, data) == 0
            assert client.read(client.size - 4096, 4096) == data
            client.disconnect()

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes, by /proc/PID/status; VmHWM is the highest VmRSS there ever was."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
        raise AssertionError(field)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def settle(self, descriptors: int) -> None:
        """Wait until no more than `descriptors` are open: those of clients who left go at once."""
        until(lambda: self.descriptors() <= descriptors)

    def end(self, *, expected: int = 0) -> str:
        """Ask it to end and wait; what it said on standard error."""
        if self.process.poll() is None:
            self.process.terminate()
        _, said = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode == expected, said
        return said


def until(condition: Callable[[], bool]) -> None:
    """Look again and again, with rests, until it holds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        select.select((), (), (), 0.005)


def unix_listener(path: Path, backlog: int = 4096) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(backlog)
    return listener


def tcp_listener(backlog: int = 4096) -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(backlog)
    return listener


Serve = Callable[..., Served]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def serve(tmp_path: Path, disk: Path) -> Iterator[Serve]:
    """Starts servers: for `disk`, persistent and for any number of clients, unless told otherwise.
    None of them may have had anything to complain of in the end."""
    started: list[Served] = []

    def start(
        *arguments: str,
        listener: socket.socket | None = None,
        setup: Callable[[], None] | None = None,
    ) -> Served:
        wanted = arguments or ("-t", "-e", "0", "-f", "raw", str(disk))
        server = Served(
            *wanted, listener=listener or unix_listener(tmp_path / f"s{len(started)}"), setup=setup
        )
        started.append(server)
        return server

    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_kill, started)
        yield start
        for server in started:
            if server.process.returncode is None:
                assert server.end() == ""


def _kill(servers: list[Served]) -> None:
    for server in servers:
        if server.process.returncode is None:
            server.process.send_signal(signal.SIGKILL)
            server.process.communicate()


@pytest.fixture
def server(serve: Serve) -> Served:
    return serve()
