"""When clients are let in and when the server ends: nbdserve and qemu-nbd, side by side."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.interop.programs import MiB, Server, Servers, attempt, run

pytestmark = pytest.mark.peer("qemu-nbd", "nbdinfo", "module:nbd")

BOTH = pytest.mark.parametrize("program", [Servers.nbdserve, Servers.qemu_nbd], ids=["nbdserve", "qemu-nbd"])
PROGRAMS = pytest.mark.parametrize(
    "command", [(sys.executable, "-m", "nbdserve"), ("qemu-nbd",)], ids=["nbdserve", "qemu-nbd"]
)


@pytest.fixture
def connect():
    import nbd

    handles = []

    def start(server):
        handle = nbd.NBD()
        handles.append(handle)
        handle.connect_uri(server.uri)
        return handle

    yield start
    for handle in handles:
        if handle.aio_is_ready():
            with contextlib.suppress(nbd.Error):
                handle.shutdown()


def greeted(sock, *, within=20.0):
    return bool(select.select([sock], [], [], within)[0]) and len(sock.recv(18, socket.MSG_PEEK)) > 0


@BOTH
@pytest.mark.parametrize("limit", [1, 2])
def test_one_more_client_waits_until_another_leaves(servers, connect, disk, program, limit):
    server = program(servers, "-e", str(limit), disk)
    clients = [connect(server) for _ in range(limit)]
    with server.connect() as waiting:
        for _ in range(20):  # it has every opportunity to be let in
            clients[0].pread(512, 0)
        assert not greeted(waiting, within=0)
        clients.pop().shutdown()
        assert greeted(waiting)


@BOTH
def test_any_number_of_clients(servers, connect, disk, program):
    server = program(servers, "-e", "0", disk)
    clients = [connect(server) for _ in range(40)]
    assert all(client.pread(1, 65536) == disk.read_bytes()[65536:65537] for client in clients)


@BOTH
@pytest.mark.parametrize("limit", [1, 3])
def test_it_ends_with_its_last_client(servers, connect, disk, program, limit):
    server = program(servers, "-e", str(limit), disk, persistent=False)
    clients = [connect(server) for _ in range(limit)]
    for client in clients[:-1]:
        client.shutdown()
    assert clients[-1].pread(16, 0) == bytes(16)
    assert server.running()
    clients[-1].shutdown()
    assert server.ended()
    assert not os.path.exists(server.where)


@BOTH
def test_it_ends_when_its_last_client_vanishes(servers, disk, program):
    server = program(servers, disk, persistent=False)
    client = subprocess.Popen(
        [sys.executable, "-c", VANISHING, server.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdout.readline() == "connected\n"
    client.kill()
    client.communicate()
    assert server.ended()


VANISHING = """
import sys
sys.path.append("/usr/lib/python3/dist-packages")
import nbd
handle = nbd.NBD()
handle.connect_uri(sys.argv[1])
print("connected", flush=True)
sys.stdin.read()
"""


@BOTH
def test_clients_that_only_look_do_not_end_it(servers, connect, disk, program):
    """Port scans, listings, refused names and handshakes that are broken off."""
    server = program(servers, "-e", "4", disk, persistent=False)
    for _ in range(5):
        server.connect().close()
    with server.connect() as sock:
        sock.recv(18)
        sock.sendall(b"\0\0\0\3" + b"garbage" * 3)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    assert attempt("nbdinfo", server.export("nosuch")).returncode == 1
    run("qemu-nbd", "--list", "-k", server.where)
    assert server.running()
    assert connect(server).pread(16, 0) == bytes(16)


@BOTH
def test_a_persistent_server_stays(servers, connect, disk, program):
    server = program(servers, disk)
    for _ in range(3):
        connect(server).shutdown()
    assert server.running()


@BOTH
def test_writes_of_a_client_that_is_cut_off_by_sigterm_are_whole(servers, connect, disk, program):
    server = program(servers, disk)
    client = connect(server)
    client.pwrite(b"\x07" * MiB, MiB)
    server.stop()
    assert disk.read_bytes()[MiB : 2 * MiB] == b"\x07" * MiB
    assert not os.path.exists(server.where)


ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[2], sys.argv[2:])
"""


@PROGRAMS
@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET], ids=["unix", "tcp"])
def test_socket_activation_by_hand(command, family, disk, tmp_path):
    """The socket is bound before the server starts, and the client may be there even earlier."""
    with socket.socket(family) as listener:
        listener.bind(str(tmp_path / "s") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen()
        place = listener.getsockname()
        server = Server(0, place if family == socket.AF_UNIX else f"127.0.0.1:{place[1]}")
        with server.connect() as early:
            activated = [sys.executable, "-c", ACTIVATE, str(listener.fileno())]
            process = subprocess.Popen(
                [*activated, *command, "-t", "-e", "2", "-f", "raw", str(disk)], pass_fds=[listener.fileno()]
            )
            try:
                assert greeted(early)
                assert run("nbdinfo", "--size", server.uri) == f"{8 * MiB}\n"
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
        # It is not ours to remove.
        assert family != socket.AF_UNIX or (tmp_path / "s").exists()


@pytest.mark.peer("systemd-socket-activate")
@PROGRAMS
def test_socket_activation_by_systemd(command, disk, tmp_path):
    where = tmp_path / "s"
    activator = subprocess.Popen(
        ["systemd-socket-activate", "-l", str(where), "-E", "PYTHONPATH", *command, "-f", "raw", str(disk)],
        stderr=subprocess.DEVNULL,
    )
    try:
        while not where.exists():
            assert activator.poll() is None
            time.sleep(0.01)
        # Without -t it ends with this client; systemd's program has become it.
        assert run("nbdinfo", "--size", f"nbd+unix:///?socket={where}") == f"{8 * MiB}\n"
        assert activator.wait(20) == 0
    finally:
        activator.kill()
        activator.wait()


def test_run(disk):
    """The server lives as long as the command, on a socket of its own."""
    script = 'nbdinfo --size "$uri" && test -S "$unixsocket" && echo "$unixsocket"; exit 3'
    done = attempt(sys.executable, "-m", "nbdserve", "-f", "raw", disk, "--run", script)
    size, where = done.stdout.splitlines()
    assert (size, done.returncode) == (str(8 * MiB), 3)
    assert not os.path.exists(where)


@PROGRAMS
def test_fork_returns_when_clients_are_served(command, disk, tmp_path):
    where, pid_file = tmp_path / "s", tmp_path / "pid"
    run(*command, "--fork", "--pid-file", pid_file, "-f", "raw", "-k", where, disk)
    server = Server(int(pid_file.read_text()), str(where))
    try:
        assert run("nbdinfo", "--size", server.uri) == f"{8 * MiB}\n"  # no retry: it listens by now
        assert server.ended()
    finally:
        server.stop()


def test_a_slow_handshake_gives_way(servers, disk):
    """Whoever says nothing for a second is dropped, and the next is served. QEMU knows it since 9.1."""
    server = servers.nbdserve("--handshake-limit=1", disk)
    with server.connect() as silent:
        assert greeted(silent)
        assert run("nbdinfo", "--size", server.uri) == f"{8 * MiB}\n"
        assert silent.recv(18)
        assert silent.recv(1) == b""
