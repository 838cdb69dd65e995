"""Compare nbdserve with other NBD servers, side by side.

    python -m tests.bench --image disk.raw
    python -m tests.bench --image disk.raw --transport tcp --cells rr4k1,copy --peers nbdkit --rounds 5
    python -m tests.bench --image disk.raw --qcow2 raw

All servers run for the whole time; in each round every one is measured in turn, and ratios are taken
round by round, since a machine's speed drifts. The bar is the fastest peer of the round. The image should
be a fully written raw file that fits the page cache; the write cells write to it. Needs fio, nbdcopy and
nbdinfo. This is a measurement, not a test: pytest does not collect it.

With --qcow2 every server has a qcow2 image of its own with the content of the raw one: "allocated" in
the image itself, or behind it in a "raw" or "qcow2" backing file; or "empty". Where clusters are to be
allocated, each measurement begins with a new image.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

# Name: fio's pattern, block size, queue depth, connections. None: nbdcopy to nowhere.
CELLS: dict[str, tuple[str, str, int, int] | None] = {
    "rr4k1": ("randread", "4k", 1, 1),
    "rr4k32": ("randread", "4k", 32, 1),
    "rw4k1": ("randwrite", "4k", 1, 1),
    "rw4k32": ("randwrite", "4k", 32, 1),
    "rr64k16": ("randread", "64k", 16, 1),
    "rw64k16": ("randwrite", "64k", 16, 1),
    "sr1m4": ("read", "1m", 4, 1),
    "sw1m4": ("write", "1m", 4, 1),
    "copy": None,
    "rr4k8x4": ("randread", "4k", 8, 4),
    "rr4k2x16": ("randread", "4k", 2, 16),
    "rw4k8x4": ("randwrite", "4k", 8, 4),
    "sr1m4x4": ("read", "1m", 4, 4),
}
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    name: str
    process: subprocess.Popen[bytes]
    uri: str
    pid: int
    again: Callable[[], Server]
    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def cpu_seconds(self) -> float:
        """User and system time of the server and the processes it forked."""
        total = 0.0
        for pid in (self.pid, *_children(self.pid)):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                # utime, stime; of the server itself also those of its children that have ended.
                last = 15 if pid == self.pid else 13
                total += sum(map(int, fields[11:last])) / TICKS
        return total


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def qcow2_image(name: str, kind: str, raw: str, directory: Path) -> str:
    """A new image for the server `name`; see --qcow2."""
    path, base = directory / f"{name}.qcow2", directory / "base.qcow2"
    path.unlink(missing_ok=True)
    if kind == "allocated":
        command = ["convert", "-f", "raw", "-O", "qcow2", raw, str(path)]
    elif kind == "empty":
        command = ["create", "-f", "qcow2", str(path), str(os.path.getsize(raw))]
    else:
        if kind == "qcow2" and not base.exists():
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, str(base)], check=True)
        backing = raw if kind == "raw" else str(base)
        command = ["create", "-f", "qcow2", "-b", backing, "-F", kind, str(path)]
    subprocess.run(["qemu-img", *command], check=True, stdout=subprocess.DEVNULL)
    return str(path)


def start(name: str, raw: str, transport: str, directory: Path, qcow2: str | None) -> Server:
    image = raw if qcow2 is None else qcow2_image(name, qcow2, raw, directory)
    image_format = "raw" if qcow2 is None else "qcow2"
    path, port = str(directory / f"{name}.sock"), _free_port()
    unix = transport == "unix"
    place = ["-k", path] if unix else ["-b", "127.0.0.1", "-p", str(port)]
    export = ""
    if name == "nbdserve":
        command = [sys.executable, "-m", "nbdserve", "-f", image_format, "-t", "-e", "32", *place, image]
    elif name.startswith("qemu-nbd-"):
        aio = name.removeprefix("qemu-nbd-")
        command = [
            "qemu-nbd",
            "-f",
            image_format,
            "-t",
            "-e",
            "32",
            "--cache=writeback",
            f"--aio={aio}",
            *place,
            image,
        ]
    elif name == "nbdkit":
        place = ["-U", path] if unix else ["-i", "127.0.0.1", "-p", str(port)]
        command = ["nbdkit", "-f", *place, "file", image]
    else:
        export = "disk"
        config = directory / "nbd-server.conf"
        listen = f"unixsock={path}\n" if unix else ""
        config.write_text(
            f"[generic]\nlistenaddr=127.0.0.1\nport={port}\n{listen}[disk]\nexportname={image}\n"
        )
        command = ["nbd-server", "-C", str(config), "-p", str(directory / "nbd-server.pid")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    uri = f"nbd+unix:///{export}?socket={path}" if unix else f"nbd://127.0.0.1:{port}/{export}"
    again = partial(start, name, raw, transport, directory, qcow2)
    server = Server(name, process, uri, process.pid, again)
    deadline = time.monotonic() + 20
    while subprocess.run(["nbdinfo", "--size", uri], capture_output=True).returncode:
        if time.monotonic() > deadline or process.poll():
            stop(server)
            sys.exit(f"{name} does not serve: {' '.join(command)}")
        time.sleep(0.05)
    if process.poll() == 0:  # nbd-server has put itself into the background
        server.pid = int((directory / "nbd-server.pid").read_text())
    return server


def stop(server: Server) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.pid, signal.SIGTERM)
    try:
        server.process.wait(10)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()


def measure(server: Server, cell: str, seconds: int) -> tuple[float, float]:
    """Requests (nbdcopy: MiB) a second, and CPU microseconds of the server for each."""
    shape = CELLS[cell]
    size = int(subprocess.check_output(["nbdinfo", "--size", server.uri]))
    before, began = server.cpu_seconds(), time.monotonic()
    if shape is None:
        done = 0.0
        while (elapsed := time.monotonic() - began) < seconds:
            subprocess.run(["nbdcopy", server.uri, "null:"], check=True)
            done += size / (1 << 20)
        return done / elapsed, (server.cpu_seconds() - before) * 1e6 / done
    pattern, block, depth, jobs = shape
    options = {
        "name": "cell", "ioengine": "nbd", "uri": server.uri, "size": str(size), "runtime": str(seconds),
        "rw": pattern, "bs": block, "iodepth": str(depth), "numjobs": str(jobs),
        "norandommap": "1", "randrepeat": "0", "output-format": "json",
    }  # fmt: skip
    output = subprocess.check_output(
        ["fio", "--thread", "--time_based", "--group_reporting", *(f"--{k}={v}" for k, v in options.items())],
        stderr=subprocess.DEVNULL,
    )
    job = json.loads(output[output.index(b"{") :])["jobs"][0]
    result = job["read"] if job["read"]["total_ios"] else job["write"]
    return result["iops"], (server.cpu_seconds() - before) * 1e6 / max(1, result["total_ios"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", required=True)
    parser.add_argument("--transport", choices=["unix", "tcp"], default="unix")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--peers", default="qemu-nbd-io_uring,qemu-nbd-threads,nbdkit,nbd-server")
    parser.add_argument("--qcow2", choices=["allocated", "raw", "qcow2", "empty"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    arguments = parser.parse_args()
    peers = [name for name in arguments.peers.split(",") if name]
    if arguments.qcow2:
        peers = [name for name in peers if name.startswith("qemu-nbd-")]
    directory = Path(tempfile.mkdtemp(prefix="nbdbench-"))
    servers: list[Server] = []
    try:
        image = os.path.abspath(arguments.image)
        # One by one into the list, so that those which run are stopped if the next one fails.
        servers.extend(
            start(name, image, arguments.transport, directory, arguments.qcow2)
            for name in [*peers, "nbdserve"]
        )
        print("| cell |" + "".join(f" {server.name} |" for server in servers) + " ratio to the best peer |")
        print("|---|" + "---|" * (len(servers) + 1))
        for cell in arguments.cells.split(","):
            for _ in range(arguments.rounds):
                for number, server in enumerate(servers):
                    if arguments.qcow2 not in (None, "allocated") and "w" in cell:
                        stop(server)
                        fresh = server.again()
                        server = servers[number] = replace(fresh, rates=server.rates, cpu=server.cpu)
                    rate, cpu = measure(server, cell, arguments.seconds)
                    server.rates.setdefault(cell, []).append(rate)
                    server.cpu.setdefault(cell, []).append(cpu)
            rounds = zip(*(server.rates[cell] for server in servers), strict=True)
            ratios = [rates[-1] / max(rates[:-1]) for rates in rounds if len(rates) > 1]
            figures = "".join(
                f" {statistics.median(s.rates[cell]):,.0f} [{statistics.median(s.cpu[cell]):.1f}] |"
                for s in servers
            )
            print(f"| {cell} |{figures} {statistics.median(ratios) if ratios else 1:.2f} |", flush=True)
    finally:
        for server in servers:
            stop(server)
        shutil.rmtree(directory)
    print("\nRequests a second (copy: MiB/s), medians; in brackets the server's CPU time for each, in us.")


if __name__ == "__main__":
    main()
