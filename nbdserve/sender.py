"""The sending half of a connection: whole messages, one at a time."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Sequence

import trio

from drivers.net.stream import Buffer, Stream
from nbdserve.turns import Turn, soon

MAX_PARTS = 64  # of one sendmsg; the system's own limit is 1024
_ZEROES = memoryview(bytes(256 << 10))


class Sender:
    """Any task of a connection may send(); messages that come in parts go out within message()."""

    def __init__(self, stream: Stream, turn: Turn) -> None:
        self.stream = stream
        self._turn = turn
        self._lock = trio.Lock()

    @property
    def busy(self) -> bool:
        """A message is on its way: what is sent past send() would end up inside it."""
        return self._lock.locked()

    async def send(self, *parts: Buffer) -> None:
        """Send one message, or several whole ones, undivided."""
        await self._begin()
        try:
            rest = self._put_together(parts) if len(parts) > 1 else parts
            for number, part in enumerate(rest, 1):
                await self.put(part, more=number < len(rest))
        except BaseException:
            self._break_off()
            raise
        finally:
            self._lock.release()

    @contextlib.asynccontextmanager
    async def message(self) -> AsyncIterator[None]:
        """Inside, one message is sent by put()."""
        await self._begin()
        try:
            yield
        except BaseException:
            self._break_off()
            raise
        finally:
            self._lock.release()

    async def _begin(self) -> None:
        """Take the lock. Not a checkpoint where it is free: nothing may come between a partial send
        and its rest."""
        if self._lock.locked():
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()

    def _break_off(self) -> None:
        """A message was begun and cannot be completed: it is the last one, or whatever another task
        sent would be taken for its rest."""
        with contextlib.suppress(OSError):
            self.stream.socket.shutdown(socket.SHUT_RDWR)

    def _put_together(self, parts: Sequence[Buffer]) -> Sequence[Buffer]:
        """Send what the socket takes of `parts` at once. What is left."""
        try:
            count = self.stream.socket.sendmsg(parts[:MAX_PARTS])
        except BlockingIOError:
            return parts
        for number, part in enumerate(parts):
            if count < len(part):
                return [memoryview(part)[count:], *parts[number + 1 :]]
            count -= len(part)
        return ()

    async def put(self, data: Buffer, *, more: bool = False) -> None:
        """Send `data`, within message(). `more` holds it back until it can go with what follows."""
        sock = self.stream.socket
        flags = socket.MSG_MORE if more else 0
        view = memoryview(data)
        while view:
            try:
                view = view[sock.send(view, flags) :]
            except BlockingIOError:
                await self.writable()

    async def writable(self) -> None:
        """Wait until the client has taken some of what was sent."""
        in_turn = time.perf_counter() < self._turn.ends
        if not (in_turn and self._turn.alone and soon((), (self.stream.socket.fileno(),))):
            await self.stream.wait_writable()
            self._turn.begin()

    async def put_zeroes(self, length: int) -> None:
        """Send zeroes; within message()."""
        while length:
            count = min(length, len(_ZEROES))
            await self.put(_ZEROES[:count])
            length -= count
