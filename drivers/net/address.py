"""Where a server is: parsed addresses that can be connected to and listened on.

trio is imported where something is awaited, so that addresses can be parsed without its cost.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from drivers.errors import OptionError, RequestError

# sun_path with its terminating zero byte.
MAX_UNIX_PATH = 108
RETRY_INTERVAL = 0.01  # seconds between attempts while a Unix listener's queue is full


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: str

    def __post_init__(self) -> None:
        if len(os.fsencode(self.path)) >= MAX_UNIX_PATH:
            raise OptionError(
                f"UNIX socket path '{self.path}' is too long\nPath must be less than {MAX_UNIX_PATH} bytes"
            )
        if "\0" in self.path:
            raise OptionError("a UNIX socket path cannot contain a zero byte")

    def __str__(self) -> str:
        return self.path

    async def connect(self, timeout: float | None = None) -> socket.socket:
        """A connected, non-blocking socket. Raises RequestError; `timeout` is in seconds."""
        import trio

        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            with _deadline(self, timeout):
                # A full queue of a Unix listener cannot be waited on.
                while (code := sock.connect_ex(self.path)) == errno.EAGAIN:  # noqa: ASYNC110
                    await trio.sleep(RETRY_INTERVAL)
                if code:
                    raise _connect_error(self, code)
        except BaseException:
            sock.close()
            raise
        return sock

    def listen(self, backlog: int = 1) -> list[socket.socket]:
        """The listening, non-blocking socket, in place of whatever file has its path. The owner
        removes the path in the end. Raises RequestError."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _error(error, f"Failed to unlink socket {self.path}") from None
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(self.path)
            sock.listen(backlog)
        except OSError as error:
            sock.close()
            raise _error(error, f"Failed to bind socket to {self.path}") from None
        sock.setblocking(False)
        return [sock]


@dataclass(frozen=True, slots=True)
class InetAddress:
    """`host` is a name or a literal without brackets, "" for every local address; `port` a number
    or a service's name."""

    host: str
    port: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    async def connect(self, timeout: float | None = None) -> socket.socket:
        """A connected, non-blocking socket, from the first of the host's addresses that answers.
        Raises RequestError; `timeout` is in seconds and covers name resolution."""
        import trio

        with _deadline(self, timeout):
            candidates = await trio.to_thread.run_sync(self._resolve, 0, abandon_on_cancel=True)
            failure = 0
            for family, kind, protocol, _, where in candidates:
                sock = socket.socket(family, kind, protocol)
                try:
                    sock.setblocking(False)
                    failure = sock.connect_ex(where)
                    if failure == errno.EINPROGRESS:
                        await trio.lowlevel.wait_writable(sock)
                        failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not failure:
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        return sock
                except BaseException:
                    sock.close()
                    raise
                sock.close()
            raise _connect_error(self, failure)

    def listen(self, backlog: int = 1) -> list[socket.socket]:
        """Non-blocking sockets that listen on every address of the host: of IPv4 and IPv6 alike.
        With port 0 all of them have the same free one. Raises RequestError."""
        candidates = self._resolve(socket.AI_PASSIVE)
        families = {family for family, *_ in candidates}
        sockets: list[socket.socket] = []
        try:
            for family, kind, protocol, _, where in candidates:
                try:
                    sock = socket.socket(family, kind, protocol)
                except OSError as error:
                    if error.errno == errno.EAFNOSUPPORT and len(families) > 1:
                        continue
                    raise _error(error, "Failed to create a socket") from None
                sockets.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    # Beside a socket for IPv4, this one must leave IPv4 alone.
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, len(families) > 1)
                if len(sockets) > 1 and not where[1]:
                    where = (where[0], sockets[0].getsockname()[1], *where[2:])
                self._bind(sock, where, backlog)
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        return sockets

    def _bind(self, sock: socket.socket, where: tuple[object, ...], backlog: int) -> None:
        try:
            sock.bind(where)
            sock.listen(backlog)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            raise _error(
                error, "Failed to find an available port" if in_use else "Failed to bind socket"
            ) from None
        sock.setblocking(False)

    def _resolve(self, flags: int) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
        try:
            found = socket.getaddrinfo(
                self.host or None, self.port or "0", type=socket.SOCK_STREAM, flags=flags
            )
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            raise RequestError(
                errno.EHOSTUNREACH, f"address resolution failed for {self}: {reason}"
            ) from None
        return found  # type: ignore[return-value]


Address = UnixAddress | InetAddress


def parse_port(text: str) -> str:
    """`text` itself, unless it is a number that no port has: the resolver would wrap it silently."""
    if text.strip().isdecimal() and int(text[:20]) > 65535:
        raise OptionError(f"Invalid port number '{text}'")
    return text


@contextlib.contextmanager
def _deadline(address: Address, timeout: float | None) -> Iterator[None]:
    """Ends the connecting inside after `timeout` seconds, with an error that names the address."""
    import trio

    with trio.move_on_after(math.inf if timeout is None else timeout) as scope:
        yield
    if scope.cancelled_caught:
        raise _connect_error(address, errno.ETIMEDOUT)


def _connect_error(address: Address, code: int) -> RequestError:
    return RequestError(code, f"Failed to connect to '{address}': {os.strerror(code)}")


def _error(error: OSError, what: str) -> RequestError:
    return RequestError(error.errno or errno.EIO, f"{what}: {error.strerror}")
