"""Requests in flight on a node: who must wait for whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Request:
    """`offset` to `end` of a node are in use. Compared by identity. Those of a node are numbered
    in the order in which they began."""

    __slots__ = ("done", "end", "number", "offset", "serialising")

    def __init__(self, offset: int, end: int, serialising: bool) -> None:
        self.number = 0
        self.offset = offset
        self.end = end
        self.serialising = serialising
        self.done: trio.Event | None = None  # made by the first that waits


class RequestTracker:
    """Every request that spans an await is registered here.

    A *serialising* request (a read-modify-write) shares its range with nobody. While the node is
    quiesced nothing new begins. `guarded` counts the reasons why the synchronous fast path, which
    registers nothing, must not be taken: 0 is the normal state.
    """

    def __init__(self) -> None:
        self._active: set[Request] = set()
        self._resume: trio.Event | None = None
        self._quiesced = 0
        self._newest = 0
        self.guarded = 0

    def _conflict(self, request: Request) -> Request | None:
        if not self.guarded and not request.serialising:
            return None
        for other in self._active:
            if (
                (request.serialising or other.serialising)
                and request.offset < other.end
                and other.offset < request.end
            ):
                return other
        return None

    async def begin(self, offset: int, length: int, *, serialising: bool = False) -> Request:
        """Register a request; waits while the node is quiesced or an overlap forbids it."""
        request = Request(offset, offset + length, serialising)
        while True:
            if self._quiesced:
                assert self._resume is not None
                await self._resume.wait()
                continue
            other = self._conflict(request)
            if other is None:
                break
            if other.done is None:
                other.done = trio.Event()
            await other.done.wait()
        self._add(request)
        self.guarded += serialising
        return request

    def _add(self, request: Request) -> None:
        self._newest += 1
        request.number = self._newest
        self._active.add(request)

    @property
    def newest(self) -> int:
        """The number of the request that began last."""
        return self._newest

    @property
    def oldest_active(self) -> int:
        """No request with a smaller number is in flight."""
        return min((request.number for request in self._active), default=self._newest + 1)

    def hold(self, offset: int, length: int) -> Request:
        """Register a request that the fast path was just allowed to make and that will span an
        await, as a send that found the socket full. Never waits."""
        request = Request(offset, offset + length, serialising=False)
        self._add(request)
        return request

    def finish(self, request: Request) -> None:
        self._active.remove(request)
        self.guarded -= request.serialising
        if request.done is not None:
            request.done.set()

    @asynccontextmanager
    async def quiesced(self) -> AsyncIterator[None]:
        """Inside, nothing is in flight and nothing begins."""
        self._quiesced += 1
        self.guarded += 1
        if self._resume is None:
            self._resume = trio.Event()
        try:
            while self._active:
                request = next(iter(self._active))
                if request.done is None:
                    request.done = trio.Event()
                await request.done.wait()
            yield
        finally:
            self._quiesced -= 1
            self.guarded -= 1
            if not self._quiesced:
                self._resume.set()
                self._resume = None
