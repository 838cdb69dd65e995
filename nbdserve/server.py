"""A server: listening sockets, the clients that came through them, and when to end."""

from __future__ import annotations

import contextlib
import errno
import gc
import socket
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import trio

from drivers.errors import ProtocolError
from drivers.net.stream import Stream
from drivers.wire.nbd.server_handshake import ServerHandshake, Session
from drivers.wire.nbd.steps import Handshake, Receive, Send
from nbdserve.connection import Connection
from nbdserve.exports.nbd import ExportTable, NbdExport
from nbdserve.turns import Activity

# Requests in flight get so long to finish when the server ends; the disk may be slow, a client
# that reads nothing must not hold it up for ever.
GRACE_SECONDS = 10

# Before the next try where accept() failed: for want of descriptors or memory, which others will
# give back, or for good, as on an inherited socket that its owner shut down.
_ACCEPT_PAUSE_SECONDS = 0.1
ACCEPTS_PER_TURN = 16


class Log(Protocol):
    """What the server tells: `debug` has names of trace events (nbdserve/trace.py)."""

    def debug(self, event: str, **fields: object) -> None: ...
    def error(self, event: str, **fields: object) -> None: ...


class Server:
    """Serves `exports` to at most `max_clients` at a time (0: any number); more wait in the
    listening sockets' queues. Unless `persistent`, it ends when the last client that had
    negotiated leaves. A handshake may take `handshake_limit` seconds (0: any time).
    """

    def __init__(
        self,
        exports: Iterable[NbdExport],
        *,
        log: Log,
        max_clients: int = 1,
        persistent: bool = False,
        handshake_limit: float = 10,
    ) -> None:
        self._table = ExportTable(exports)
        self._log = log
        self._max_clients = max_clients
        self._persistent = persistent
        self._handshake_limit = handshake_limit or float("inf")
        self._activity = Activity()
        self._connections: set[Connection] = set()
        self._clients = 0
        self._slot_free = trio.Event()
        self._accepting = trio.CancelScope()
        self._handshakes: set[trio.CancelScope] = set()
        self._stopping = False

    def stop(self) -> None:
        """Accept no more clients, take no more requests, finish those in flight; run() returns."""
        if self._stopping:
            return
        self._stopping = True
        self._accepting.cancel()
        for scope in self._handshakes:
            scope.cancel()
        for connection in self._connections:
            connection.stop()

    async def run(
        self,
        listeners: Sequence[socket.socket],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until stop(), or until the last client leaves. The exports' images are flushed by
        closing them, which is their owner's task."""
        # What lives now lives for ever: the collector need not look at it again.
        gc.freeze()
        async with trio.open_nursery() as clients:
            with self._accepting:
                async with trio.open_nursery() as acceptors:
                    for listener in listeners:
                        listener.setblocking(False)
                        acceptors.start_soon(self._accept, listener, clients)
                    task_status.started()
            clients.cancel_scope.deadline = trio.current_time() + GRACE_SECONDS

    async def _accept(self, listener: socket.socket, clients: trio.Nursery) -> None:
        accepted = 0
        while True:
            while self._max_clients and self._clients >= self._max_clients:
                # One event for all who wait: each has a socket of its own to accept from.
                if self._slot_free.is_set():
                    self._slot_free = trio.Event()
                await self._slot_free.wait()
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:
                    await trio.sleep(_ACCEPT_PAUSE_SECONDS)
            else:
                self._clients += 1
                self._log.debug("nbd_client_accepted", clients=self._clients)
                clients.start_soon(self._client, sock)
                self._activity.last = None  # whoever had the loop to itself has it no more
                accepted += 1
                # Whoever connects in a loop must not keep the others from being served.
                if not accepted % ACCEPTS_PER_TURN:
                    await trio.lowlevel.checkpoint()

    async def _client(self, sock: socket.socket) -> None:
        """One client from greeting to goodbye. Its failures, our bugs included, end here."""
        negotiated = False
        try:
            with contextlib.closing(Stream(sock)) as stream:
                session = await self._negotiate(stream)
                if session is not None:
                    negotiated = True
                    await self._serve(stream, session)
        except Exception:
            self._log.error("a client's connection failed", exc_info=True)
        finally:
            sock.close()  # again, but for one that could not be made a stream
            self._clients -= 1
            self._slot_free.set()
            if negotiated and not self._clients and not self._persistent:
                self.stop()

    async def _negotiate(self, stream: Stream) -> Session | None:
        """None where the client left, failed or took too long; that is an ordinary event."""
        reason = "it took too long"
        with trio.CancelScope(deadline=trio.current_time() + self._handshake_limit) as scope:
            self._handshakes.add(scope)
            if self._stopping:  # since it was accepted
                scope.cancel()
            try:
                return await _drive(ServerHandshake(self._table).run(), stream)
            except (ProtocolError, OSError) as error:
                reason = str(error)
            finally:
                self._handshakes.discard(scope)
        self._log.debug("nbd_handshake_failed", reason=reason)
        return None

    async def _serve(self, stream: Stream, session: Session) -> None:
        export = self._table.exports[session.export.name]
        connection = Connection(stream, export, session, self._activity)
        self._connections.add(connection)
        if self._stopping:
            connection.stop()
        try:
            self._log.debug("nbd_negotiated", export=export.name, style=connection.style)
            self._log.debug("nbd_client_closed", export=export.name, reason=await connection.run())
        finally:
            self._connections.discard(connection)


async def _drive(handshake: Handshake[Session | None], stream: Stream) -> Session | None:
    """Do a handshake's input and output."""
    answer = b""
    while True:
        try:
            step = handshake.send(answer) if answer else next(handshake)
        except StopIteration as end:
            return cast("Session | None", end.value)
        answer = b""
        if isinstance(step, Receive):
            answer = await stream.receive_exactly(step.length)
            # It does not wait for what is there already: a client that sends without a pause would
            # have the loop to itself, and no limit in time would reach it.
            await trio.lowlevel.checkpoint()
        elif isinstance(step, Send):
            await stream.send_all(step.data)
