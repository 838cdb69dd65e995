"""Servers as processes, ours and other projects', and other projects' clients."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

OURS = (sys.executable, "-m", "nbdserve")
CLIENT = (sys.executable, "-m", "nbdclient")
KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def attempt(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever it says."""
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=60, **options
    )


def run(*command: object, **options: Any) -> str:
    """Run a command that has to succeed; its output."""
    done = attempt(*command, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A server that listens. `where` is a socket's path, or host:port."""

    pid: int
    where: str
    name: str = ""

    @property
    def tcp(self) -> bool:
        return not self.where.startswith("/")

    @property
    def uri(self) -> str:
        return self.export(self.name)

    def export(self, name: str) -> str:
        """The URI of one of its exports."""
        return f"nbd://{self.where}/{name}" if self.tcp else f"nbd+unix:///{name}?socket={self.where}"

    def connect(self) -> socket.socket:
        """A bare connection."""
        sock = socket.socket(socket.AF_INET if self.tcp else socket.AF_UNIX)
        host, _, port = self.where.rpartition(":")
        try:
            # Without a timeout yet: with one, a full backlog on a Unix socket is an error at once.
            sock.connect((host, int(port)) if self.tcp else self.where)
            sock.settimeout(20)
        except OSError:
            sock.close()
            raise
        return sock

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            for _ in range(40):
                signal.pidfd_send_signal(handle, signal.SIGTERM)
                if _ended(handle, 0.5):  # a signal that comes while it starts is lost on qemu-nbd
                    return
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            raise AssertionError("it did not end")
        finally:
            os.close(handle)

    def ended(self) -> bool:
        """Wait until it has ended by itself; False if it does not."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return _ended(handle)
        finally:
            os.close(handle)

    def running(self) -> bool:
        return os.path.exists(f"/proc/{self.pid}")


def _ended(handle: int, seconds: float = 20) -> bool:
    return bool(select.select([handle], [], [], seconds)[0])


class Servers:
    """Starts servers that go to the background, and stops all of them in the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Server] = []

    def nbdserve(self, *arguments: object, tcp: bool = False, persistent: bool = True) -> Server:
        """Ours: `arguments` are options and the image, which is raw unless they tell."""
        return self._qemu_like(OURS, arguments, tcp, persistent)

    def qemu_nbd(self, *arguments: object, tcp: bool = False, persistent: bool = True) -> Server:
        return self._qemu_like(("qemu-nbd",), arguments, tcp, persistent)

    def _qemu_like(
        self, program: tuple[str, ...], arguments: tuple[object, ...], tcp: bool, persistent: bool
    ) -> Server:
        where, pid_file = self._place(tcp)
        host, _, port = where.rpartition(":")
        words = [*program, "--fork", "--pid-file", pid_file]
        words += ["-b", host, "-p", port] if tcp else ["-k", where]
        if persistent:
            words.append("-t")
        if not any(str(word).startswith(("-f", "--image-opts", "--export=")) for word in arguments):
            words += ["-f", "raw"]
        return self._start([*words, *map(str, arguments)], where, pid_file)

    def nbdkit(self, *arguments: object, tcp: bool = False) -> Server:
        where, pid_file = self._place(tcp)
        host, _, port = where.rpartition(":")
        place = ["-i", host, "-p", port] if tcp else ["-U", where]
        return self._start(["nbdkit", *place, "-P", pid_file, *map(str, arguments)], where, pid_file)

    def nbd_server(self, image: Path, *lines: str) -> Server:
        """`lines` are those of its configuration that describe the export, which is called "disk"."""
        where, pid_file = self._place(False)
        config = Path(f"{pid_file}.conf")
        text = ["[generic]", f"unixsock = {where}", "allowlist = true", "[disk]", f"exportname = {image}"]
        config.write_text("\n".join([*text, *lines, ""]))
        server = self._start(["nbd-server", "-C", str(config), "-p", pid_file], where, pid_file)
        server.name = "disk"
        return server

    def _place(self, tcp: bool) -> tuple[str, str]:
        number = len(self._started)
        where = f"127.0.0.1:{free_port()}" if tcp else f"{self._directory}/{number}.sock"
        return where, f"{self._directory}/{number}.pid"

    def _start(self, command: list[str], where: str, pid_file: str) -> Server:
        subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
        # Not every server listens, or has written its pid, before it goes to the background.
        server = Server(_until(lambda: int(Path(pid_file).read_text())), where)
        self._started.append(server)
        _until(lambda: server.connect().close())
        return server

    def stop(self) -> None:
        for server in reversed(self._started):
            server.stop()


def _until(ready: Callable[[], T]) -> T:
    """What `ready` returns once it no longer fails."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return ready()
        except (FileNotFoundError, ConnectionRefusedError, ValueError):
            assert time.monotonic() < deadline, "the server does not come up"
        time.sleep(0.01)
