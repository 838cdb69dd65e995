"""Requests that may wait: each a task of its connection, bounded in number and bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import trio

from drivers.block.extents import Span
from drivers.wire.nbd.constants import MAX_PAYLOAD, Command
from drivers.wire.nbd.server_handshake import Session
from nbdserve.commands import Buffer, Request, execute, trace_request
from nbdserve.exports.nbd import NbdExport
from nbdserve.replies import Replies
from nbdserve.sender import Sender
from nbdserve.trace import trace
from nbdserve.turns import Turn

# Of one connection. One request is always let in.
MAX_IN_FLIGHT = 32
MAX_BYTES_IN_FLIGHT = MAX_PAYLOAD
# A quick disk is waited for actively for so long, as a quick client is.
COLD_SECONDS = 150e-6
COLD_PATIENCE = 8  # fruitless waits before giving up
COLD_RETRY = 64  # batches until the next attempt


class Tasks:
    """The requests of one connection that left the fast path. `gone` is called when a reply finds
    nobody to read it."""

    def __init__(
        self,
        export: NbdExport,
        session: Session,
        replies: Replies,
        sender: Sender,
        turn: Turn,
        nursery: trio.Nursery,
        gone: Callable[[], object],
    ) -> None:
        self._export = export
        self._session = session
        self._replies = replies
        self._sender = sender
        self._turn = turn
        self._nursery = nursery
        self._gone = gone
        self.in_flight = 0
        self._bytes_in_flight = 0
        self._room: trio.Event | None = None
        self._ready: list[tuple[Request, list[Buffer]]] = []  # answered, to be sent
        self._cold_patience = COLD_PATIENCE

    async def wait_for_room(self, weight: int) -> None:
        """Until another request, with `weight` bytes to hold, may be in flight."""
        while self.in_flight and (
            self.in_flight >= MAX_IN_FLIGHT or self._bytes_in_flight + weight > MAX_BYTES_IN_FLIGHT
        ):
            self._room = trio.Event()
            await self._room.wait()

    def spawn(self, request: Request) -> None:
        self.in_flight += 1
        self._bytes_in_flight += _weight(request)
        self._nursery.start_soon(self._execute, request)

    async def _execute(self, request: Request) -> None:
        parts = await execute(self._export, self._session, self._replies, request)
        self._ready.append((request, parts))
        if len(self._ready) == 1:
            await self._send_ready()

    async def _send_ready(self) -> None:
        """Send the replies that the tasks of this turn of the loop have made, at once: sending is
        the most expensive thing about a small reply."""
        if self.in_flight > 1:
            await trio.lowlevel.cancel_shielded_checkpoint()
        ready, self._ready = self._ready, []
        try:
            await self._sender.send(*[part for _, parts in ready for part in parts])
            if trace.enabled:
                for request, _ in ready:
                    trace_request("nbd_reply", request)
        except OSError:
            self._gone()  # nobody is there to read an answer
        finally:
            self._finished(len(ready), sum(_weight(request) for request, _ in ready))

    def _finished(self, count: int, weight: int) -> None:
        self.in_flight -= count
        self._bytes_in_flight -= weight
        if self._room is not None:
            self._room.set()
            self._room = None

    async def start_cold(self, requests: list[Request]) -> None:
        """Wait for these reads, which the disk has been told of: for a moment here, since a quick
        disk has them before a thread has begun to wait, then in one thread for many of them."""
        # A batch may ask for far more than may be in flight.
        for first in range(0, len(requests), MAX_IN_FLIGHT):
            await self._start_some_cold(requests[first : first + MAX_IN_FLIGHT])
            await self._turn.give_way()

    async def _start_some_cold(self, requests: list[Request]) -> None:
        if self._cold_patience > 0 and self._turn.alone:
            parts, requests = self._poll_cold(requests)
            if parts:
                await self._sender.send(b"".join(parts))
                self._cold_patience = COLD_PATIENCE
            else:
                self._cold_patience -= 1
                if not self._cold_patience:
                    self._cold_patience = -COLD_RETRY
            if not requests:
                return
        elif self._cold_patience < 0:
            self._cold_patience += 1
            if not self._cold_patience:
                self._cold_patience = COLD_PATIENCE
        weight = sum(map(_weight, requests))
        await self.wait_for_room(weight)
        self.in_flight += len(requests)
        self._bytes_in_flight += weight
        self._nursery.start_soon(self._read_cold, requests, weight)

    def _poll_cold(self, requests: list[Request]) -> tuple[list[Buffer], list[Request]]:
        """Ask the page cache for these reads until they are there, COLD_SECONDS at most. Replies to
        those that came, and the others."""
        node, clock = self._export.node, time.perf_counter
        deadline = clock() + COLD_SECONDS
        parts: list[Buffer] = []
        for number, request in enumerate(requests):
            cookie, at, length = request.cookie, request.offset, request.length
            spans = node.plain(at, length)
            if spans is None or len(spans) != 1 or spans[0][0] < 0:
                return parts, requests[number:]
            buffer = bytearray(length)
            done = -1
            while done != length:
                try:
                    done = os.preadv(spans[0][0], (buffer,), spans[0][1], os.RWF_NOWAIT)
                except BlockingIOError:
                    done = -1
                except OSError:
                    return parts, requests[number:]
                if done != length and clock() > deadline:
                    return parts, requests[number:]
            parts += (self._replies.data(cookie, at, at, length, done=True), buffer)
        return parts, []

    async def _read_cold(self, requests: list[Request], weight: int) -> None:
        node = self._export.node
        jobs: list[Span] = []
        held = []
        waiting = []
        others = []
        for request in requests:
            spans = node.plain(request.offset, request.length)
            if spans is not None and len(spans) == 1 and spans[0][0] >= 0:
                jobs.append(spans[0])
                held.append(node.hold(request.offset, request.length))
                waiting.append(request)
            else:
                others.append(request)
        try:
            try:
                found = await trio.to_thread.run_sync(read_spans, jobs, limiter=self._export.threads)
            finally:
                for hold in held:
                    node.release(hold)
            parts: list[Buffer] = []
            for request, data in zip(waiting, found, strict=True):
                if data is None:
                    others.append(request)  # fails once more, and is reported
                else:
                    cookie, at = request.cookie, request.offset
                    parts += (self._replies.data(cookie, at, at, len(data), done=True), data)
            await self._sender.send(b"".join(parts))
            for request in others:
                await self._sender.send(*await execute(self._export, self._session, self._replies, request))
        except OSError:
            self._gone()  # nobody is there to read an answer
        finally:
            self._finished(len(requests), weight)


def _weight(request: Request) -> int:
    return request.length if request.command in (Command.READ, Command.WRITE) else 0


def read_spans(spans: Sequence[Span]) -> list[bytearray | None]:
    """The bytes of each span; None where they could not be read whole. Waits for the disk."""
    found: list[bytearray | None] = []
    for fd, position, length in spans:
        buffer = bytearray(length)
        try:
            done = os.preadv(fd, (buffer,), position)
        except OSError:
            done = -1
        found.append(buffer if done == length else None)
    return found
