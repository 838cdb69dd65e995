"""From settings to a server that runs, and back to an exit status."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator

from drivers.errors import OptionError
from drivers.net.address import Address, InetAddress, UnixAddress
from nbdserve.process import go_to_background, run_command, socket_label, stop_on_signals, write_pid_file
from nbdserve.settings import ServeSettings

MAX_DESCRIPTORS = 65536


def serve_until_told(settings: ServeSettings) -> int:
    """Serve; the exit status. With settings.fork only the child comes as far as serving.

    Raises drivers.errors.Error, possibly within exception groups.
    """
    detach = go_to_background(keep_stderr=settings.verbose) if settings.fork else _stay
    import trio  # after the fork, and not for a command line that is wrong

    _raise_descriptor_limit()

    return trio.run(_main, settings, detach)


def _raise_descriptor_limit() -> None:
    """Every client takes a descriptor; the limit that shells begin with is for select()'s sake."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _stay() -> None:
    """There is nothing to detach from."""


async def _main(settings: ServeSettings, detach: Callable[[], None]) -> int:
    import trio

    from nbdserve.serving import serve

    stop, serving = trio.Event(), trio.Event()
    directory = os.getcwd()
    status = 0

    def ready() -> None:
        """Serving has begun. Nothing relative is opened from here on."""
        if settings.pid_file is not None:
            write_pid_file(settings.pid_file)  # its lock is to last as long as the process
        os.chdir("/")
        detach()
        serving.set()

    async def accompany(command: str, variables: dict[str, str]) -> None:
        nonlocal status
        await serving.wait()
        status = await run_command(command, variables, directory=directory)
        if status > 128:
            print(f"the command was killed by signal {status - 128}", file=sys.stderr)
        stop.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(stop_on_signals, stop)
        with listening(settings) as sockets:
            if settings.run_command is not None:
                variables = command_variables(sockets[0], settings.exports[0].name)
                nursery.start_soon(accompany, settings.run_command, variables)
            await serve(settings, sockets, stop=stop, ready=ready)
        nursery.cancel_scope.cancel()
    return status


@contextlib.contextmanager
def listening(settings: ServeSettings) -> Iterator[list[socket.socket]]:
    """The listening sockets; in the end they are closed, and a Unix socket's path is removed."""
    with contextlib.ExitStack() as cleanup:
        if settings.inherited:
            sockets = [_inherited(fd) for fd in settings.inherited]
        else:
            address = settings.address or UnixAddress(cleanup.enter_context(_private_path()))
            with socket_label(settings.selinux_label):
                sockets = address.listen(socket.SOMAXCONN)
            if isinstance(address, UnixAddress):
                cleanup.callback(_remove, address.path, os.stat(address.path).st_ino)
        for sock in sockets:
            cleanup.callback(sock.close)
        yield sockets


def _inherited(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OptionError(f"Failed to use socket activation: descriptor {fd} is not a listening socket")
    except OSError as error:
        raise OptionError(f"Failed to use socket activation: {error.strerror}") from None
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def _private_path() -> Iterator[str]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="nbdserve-") as directory:
        yield f"{directory}/socket"


def _remove(path: str, inode: int) -> None:
    """Remove our socket, but not one that another server has put in its place since."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


def command_variables(sock: socket.socket, export: str) -> dict[str, str]:
    """What --run's command finds in its environment, under the names that nbdkit uses."""
    from drivers.options.nbd_uri import NbdUri

    address: Address
    port = ""
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        address = UnixAddress(where)
    else:
        host, port = where[0], str(where[1])
        address = InetAddress("localhost" if host in ("0.0.0.0", "::") else host, port)
    return {
        "uri": str(NbdUri(address, export)),
        "unixsocket": address.path if isinstance(address, UnixAddress) else "",
        "port": port,
        "exportname": export,
    }
