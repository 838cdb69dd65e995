"""What makes a program a service: the background, the pid file, signals, a command beside it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

from drivers.errors import OptionError

if TYPE_CHECKING:
    import trio


def go_to_background(*, keep_stderr: bool) -> Callable[[], None]:
    """Go on in a child process with its own session; the parent waits here and never returns.

    The child calls the function returned once it serves. Until then the parent passes on what the
    child writes to standard error; then it exits, with status 0 if the call was made, else with 1.
    The child keeps none of the three standard streams, except standard error if asked to.

    No thread may run yet.
    """
    error_reader, error_writer = os.pipe()
    ready_reader, ready_writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os.close(error_writer)
        os.close(ready_writer)
        _wait_for_child(error_reader, ready_reader)
    os.close(error_reader)
    os.close(ready_reader)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    last_stderr = os.dup(2) if keep_stderr else os.dup(null)
    for fd, target in ((null, 0), (null, 1), (error_writer, 2)):
        os.dup2(fd, target)
    os.close(null)
    os.close(error_writer)

    def ready() -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more
            os.write(ready_writer, b"1")
        os.close(ready_writer)
        os.dup2(last_stderr, 2)
        os.close(last_stderr)

    return ready


def _wait_for_child(error_reader: int, ready_reader: int) -> NoReturn:
    with open(error_reader, "rb", buffering=0) as errors:
        while chunk := errors.read(4096):
            os.write(2, chunk)
    os._exit(0 if os.read(ready_reader, 1) else 1)


def write_pid_file(path: str) -> int:
    """Write this process's id. The file stays locked as long as the descriptor returned is open, so
    that a second server cannot take it; it is left in place in the end, as qemu-nbd does.

    Raises OptionError.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OptionError(f"Could not create '{path}': {error.strerror}") from None
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.write(fd, b"%d\n" % os.getpid())
    except OSError as error:
        os.close(fd)
        what = "lock" if error.errno in (errno.EAGAIN, errno.EACCES) else "write"
        raise OptionError(f"Cannot {what} pid file: {error.strerror}") from None
    return fd


async def stop_on_signals(stop: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    """Set `stop` when the process is asked to end; nothing else happens in a signal's name."""
    import trio

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            stop.set()


async def run_command(command: str, variables: dict[str, str], *, directory: str) -> int:
    """Run a shell command with `variables` in its environment; its exit status, or 128 and the
    signal's number if one ended it. A cancellation ends the command."""
    import trio

    finished = await trio.run_process(
        ["/bin/sh", "-c", command],
        stdin=None,
        check=False,
        env={**os.environ, **variables},
        cwd=directory,
    )
    return finished.returncode if finished.returncode >= 0 else 128 - finished.returncode


@contextlib.contextmanager
def socket_label(label: str | None) -> Iterator[None]:
    """Sockets made inside carry this SELinux label. Raises OptionError where the kernel refuses."""
    if label is None:
        yield
        return
    path = "/proc/thread-self/attr/sockcreate"
    try:
        with open(path, "w", encoding="utf-8") as attribute:
            attribute.write(label)
    except OSError as error:
        raise OptionError(f"Cannot set SELinux socket create context to {label}: {error.strerror}") from None
    try:
        yield
    finally:
        with open(path, "wb", buffering=0) as attribute:
            attribute.write(b"\0")
