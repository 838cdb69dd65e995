"""The process around the server: background, pid file, signals, inherited sockets, --run.

The server proper is replaced by one that accepts and greets, so that what is seen here is the
process's own behaviour.
"""

import os
import select
import signal
import socket
import subprocess
import sys

import pytest

STAND_IN = """
import os, sys, trio
import nbdserve.serving

async def serve(settings, sockets, *, stop, ready):
    if settings.exports[0].image == "broken":
        async with trio.open_nursery():
            raise OptionError("the image is broken")
    async def greet(listener):
        while True:
            await trio.lowlevel.wait_readable(listener)
            client, _ = listener.accept()
            client.sendall(b"hello ")
            client.close()
    ready()
    if "READY_FD" in os.environ:
        os.write(int(os.environ["READY_FD"]), b"ready")
    async with trio.open_nursery() as nursery:
        for listener in sockets:
            nursery.start_soon(greet, listener)
        await stop.wait()
        nursery.cancel_scope.cancel()

from drivers.errors import OptionError
nbdserve.serving.serve = serve
from nbdserve.__main__ import main
sys.exit(main())
"""
COMMAND = (sys.executable, "-c", STAND_IN)


def run(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=30, **options
    )


def greeting(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(path))
        return client.recv(6)


def end(pid):
    """Ask a process that is not our child to end, and wait until it has."""
    watch = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGTERM)
        assert select.select([watch], [], [], 10)[0], "it did not end"
    finally:
        os.close(watch)


@pytest.fixture
def server(tmp_path):
    """Starts a foreground server on tmp_path/s and waits until it serves."""
    started = []

    def start(*arguments, **options):
        ready, writer = os.pipe()
        process = subprocess.Popen(
            [*COMMAND, "-k", f"{tmp_path}/s", "--pid-file", f"{tmp_path}/pid", *arguments],
            pass_fds=[writer],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "READY_FD": str(writer)},
            **options,
        )
        started.append(process)
        os.close(writer)
        with open(ready, "rb", buffering=0) as file:
            assert file.read(5) == b"ready"
        assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly_and_the_socket_is_gone(server, tmp_path, number):
    process = server("disk")
    assert greeting(tmp_path / "s") == b"hello "
    process.send_signal(number)
    assert process.communicate(timeout=10) == (None, "")
    assert process.returncode == 0
    assert not (tmp_path / "s").exists()


def test_it_leaves_the_directory_it_was_started_in(server, tmp_path):
    process = server("disk", cwd=tmp_path)
    assert os.readlink(f"/proc/{process.pid}/cwd") == "/"


def test_a_socket_put_in_its_place_is_not_removed(server, tmp_path):
    process = server("disk")
    (tmp_path / "s").unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        process.terminate()
        process.wait(10)
        assert (tmp_path / "s").is_socket()


def test_fork_returns_when_clients_can_connect(tmp_path):
    done = run("--fork", "--pid-file", "pid", "-k", f"{tmp_path}/s", "disk", cwd=tmp_path)
    pid = int((tmp_path / "pid").read_text())
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert greeting(tmp_path / "s") == b"hello "
        assert os.getsid(pid) == pid
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
        pipes = {
            link
            for fd in os.listdir(f"/proc/{pid}/fd")
            if "pipe" in (link := os.readlink(f"/proc/{pid}/fd/{fd}"))
        }
        assert not pipes
    finally:
        end(pid)
    assert (tmp_path / "pid").exists()
    assert not (tmp_path / "s").exists()


def test_fork_passes_errors_on_and_fails(tmp_path):
    done = run("--fork", "-k", f"{tmp_path}/s", "broken")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "nbdserve: the image is broken\n"
    assert not (tmp_path / "s").exists()


def test_fork_fails_if_the_pid_file_cannot_be_written(tmp_path):
    done = run("--fork", "--pid-file", "/nonexistent/pid", "-k", f"{tmp_path}/s", "disk")
    assert done.returncode == 1
    assert done.stderr == "nbdserve: Could not create '/nonexistent/pid': No such file or directory\n"


def test_a_second_server_cannot_have_the_same_pid_file(tmp_path):
    run("--fork", "--pid-file", f"{tmp_path}/pid", "-k", f"{tmp_path}/s", "disk")
    pid = int((tmp_path / "pid").read_text())
    try:
        second = run("--pid-file", f"{tmp_path}/pid", "-k", f"{tmp_path}/t", "disk")
        assert second.returncode == 1
        assert second.stderr == "nbdserve: Cannot lock pid file: Resource temporarily unavailable\n"
        assert int((tmp_path / "pid").read_text()) == pid
    finally:
        end(pid)


def test_run_gives_the_command_the_uri_and_takes_its_status(tmp_path):
    command = 'echo "$uri|$unixsocket|$port|$exportname|$PWD"; exit 7'
    done = run("-x", "a b", "-k", f"{tmp_path}/s", "--run", command, "disk", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"nbd+unix:///a%20b?socket={tmp_path}/s|{tmp_path}/s||a b|{tmp_path}\n"


def test_run_over_tcp_tells_the_port():
    done = run("-p", "0", "--run", 'echo "$uri $port"', "disk")
    uri, port = done.stdout.split()
    assert uri == f"nbd://localhost:{port}/"
    assert int(port) > 0


def test_run_reports_a_command_that_a_signal_ended():
    done = run("--run", "kill -9 $$", "disk")
    assert done.returncode == 137
    assert "killed by signal 9" in done.stderr


def test_a_private_socket_leaves_nothing_behind():
    done = run("-k", "-", "--run", 'test -S "$unixsocket" && echo "$unixsocket"', "disk")
    path = done.stdout.strip()
    assert done.returncode == 0
    assert not os.path.exists(path)
    assert not os.path.exists(os.path.dirname(path))


def test_a_signal_ends_the_command_too(server):
    process = server(
        "--run", "exec 2>&-; trap 'exit 0' TERM; while :; do read x; done", "disk", stdin=subprocess.PIPE
    )
    process.terminate()
    assert process.wait(20) == 0


ACTIVATE = """
import os, socket, sys
count, program = int(sys.argv[1]), sys.argv[2:]
os.closerange(3, 20)
for _ in range(count):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    os.set_inheritable(listener.detach(), True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=os.environ.get("CLAIM", str(count)))
os.execvp(program[0], program)
"""


def activated(count, *program, **environ):
    return subprocess.run(
        [sys.executable, "-c", ACTIVATE, str(count), *program],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, **environ},
    )


def test_an_inherited_socket_is_served():
    client = "import socket; print(socket.create_connection(('127.0.0.1', $port)).recv(6))"
    script = f'exec 2>&1; echo $uri; echo ${{LISTEN_FDS-unset}}; {sys.executable} -c "{client}"'
    done = activated(1, *COMMAND, "--run", script, "disk")
    uri, fds, received = done.stdout.splitlines()
    assert uri.startswith("nbd://127.0.0.1:")
    assert fds == "unset"
    assert received == "b'hello '"


CLASHES = [
    (2, "-f raw /nonexistent"),
    (2, "-p 1 /nonexistent"),
    (1, "-p 1 disk"),
    (1, "-b h disk"),
    (1, "-k /s disk"),
    (1, "-c /dev/nbd0 disk"),
    (1, "-L"),
    (1, "--selinux-label=a disk"),
]


@pytest.mark.peer("qemu-nbd")
@pytest.mark.parametrize(("count", "line"), CLASHES)
def test_what_clashes_with_inherited_sockets_is_refused_like_qemu_nbd(count, line):
    genuine = activated(count, "qemu-nbd", *line.split())
    ours = activated(count, *COMMAND, *line.split())
    assert ours.stderr == genuine.stderr.replace("qemu-nbd", "nbdserve")
    assert ours.returncode == genuine.returncode == 1


def test_an_inherited_descriptor_that_is_not_there():
    done = activated(0, *COMMAND, "disk", CLAIM="1")
    assert done.returncode == 1
    assert (
        done.stderr
        == "nbdserve: Socket activation failed: invalid file descriptor fd = 3: Bad file descriptor\n"
    )


def test_descriptors_meant_for_another_process_are_left_alone():
    done = run(
        "-k",
        "-",
        "--run",
        "echo $LISTEN_FDS",
        "disk",
        env={**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"},
    )
    assert done.stdout == "1\n"


def test_errors_of_listening_are_one_line(tmp_path):
    done = run("-k", "/nonexistent/s", "disk")
    assert (done.returncode, done.stderr) == (
        1,
        "nbdserve: Failed to bind socket to /nonexistent/s: No such file or directory\n",
    )
    done = run("-k", f"{tmp_path}/s", "--selinux-label", "foo", "disk")
    assert done.returncode == 1
    assert done.stderr.startswith("nbdserve: Cannot set SELinux socket create context to foo: ")
