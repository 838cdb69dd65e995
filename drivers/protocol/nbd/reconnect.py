"""A connection that is made again when it breaks, with the requests that were in flight.

Retrying is sound because every command may be done twice: reads, writes of the same bytes, zeroes,
trims and flushes. What the server had acknowledged before it went away, but nobody had flushed, is
as safe as the server keeps it.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from drivers.errors import Error, OptionError, ProtocolError, RequestError
from drivers.net.address import Address
from drivers.protocol.nbd.connection import ClientConnection, connect
from drivers.wire.nbd.client_handshake import Export, RefusedError, Wishes
from drivers.wire.nbd.constants import TransmissionFlag

T = TypeVar("T")

# Seconds between attempts to connect: the first pause and the longest.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


class ReconnectingConnection:
    """`export` is what the server said first; a server that comes back as another is refused.

    For `delay` seconds after a loss, requests wait for the server; later ones try once, at most
    every LONGEST_PAUSE, and fail with EIO.
    """

    def __init__(self, address: Address, wishes: Wishes, first: ClientConnection, *, delay: float) -> None:
        self.export: Export = first.export
        self._address = address
        self._wishes = wishes
        self._delay = delay
        self._connection = first
        self._lost_at: float | None = None
        self._last_attempt = -math.inf
        self._connecting = trio.Lock()
        self._closed = False

    async def perform(self, operation: Callable[[ClientConnection], Awaitable[T]]) -> T:
        """The result of `operation`, which is repeated if the connection breaks under it.

        Raises RequestError: the operation's own, or EIO where there is no connection in time.
        """
        give_up: float | None = None
        while True:
            connection = await self._connected()
            try:
                result = await operation(connection)
            except ProtocolError as error:
                reason = str(error)
            except RequestError as error:
                if error.errno != errno.ESHUTDOWN or not self._delay:
                    raise
                # The server is going; it answers everything so until it is gone.
                reason = str(error)
                await connection.aclose()
            else:
                self._lost_at = None
                return result
            now = trio.current_time()
            give_up = now + self._delay if give_up is None else give_up
            if now >= give_up or self._closed:
                raise RequestError(errno.EIO, reason)

    async def aclose(self) -> None:
        self._closed = True
        await self._connection.aclose()

    async def _connected(self) -> ClientConnection:
        if self._connection.failure is None:
            return self._connection
        if self._lost_at is None:
            self._lost_at = trio.current_time()
        deadline = self._lost_at + self._delay
        async with self._connecting:
            pause = FIRST_PAUSE
            while self._connection.failure is not None:
                if self._closed:
                    raise RequestError(errno.EIO, "the connection is closed")
                now = trio.current_time()
                since = now - self._last_attempt
                if now >= deadline:
                    if since >= LONGEST_PAUSE:
                        await self._attempt(LONGEST_PAUSE)
                    if self._connection.failure is not None:
                        raise RequestError(errno.EIO, str(self._connection.failure))
                elif since < pause:
                    await trio.sleep(min(pause - since, deadline - now))
                else:
                    await self._attempt(deadline - now)
                    pause = min(2 * pause, LONGEST_PAUSE)
            return self._connection

    async def _attempt(self, timeout: float) -> None:
        self._last_attempt = trio.current_time()
        with trio.move_on_after(timeout):
            try:
                connection = await connect(self._address, self._wishes)
            except Error:
                return
            if reason := difference(self.export, connection.export):
                await connection.aclose()
                self._connection.failure = ProtocolError(f"the server came back changed: {reason}")
                return
            await self._connection.aclose()
            self._connection = connection


async def connect_first(
    address: Address, wishes: Wishes, *, delay: float, open_timeout: float
) -> ReconnectingConnection:
    """Connect, trying again for `open_timeout` seconds where there is no server yet.

    Raises what the last attempt failed with.
    """
    deadline = trio.current_time() + open_timeout
    pause = FIRST_PAUSE
    while True:
        try:
            left = deadline - trio.current_time()
            first = await connect(address, wishes, timeout=left if left > 0 else None)
        except (RefusedError, OptionError):
            raise
        except (ProtocolError, RequestError):
            if trio.current_time() + pause > deadline:
                raise
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            return ReconnectingConnection(address, wishes, first, delay=delay)


def difference(before: Export, now: Export) -> str:
    """Why an export cannot take the place of what it was; "" if it can."""
    if now.size != before.size:
        return f"its size is {now.size} instead of {before.size} bytes"
    # Without the other flags, requests fail with ENOTSUP and are done in another way.
    lost = before.flags & ~now.flags & (TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA)
    if lost or (now.flags & ~before.flags & TransmissionFlag.READ_ONLY):
        return f"its flags are {int(now.flags):#x} instead of {int(before.flags):#x}"
    if now.minimum_block > before.minimum_block or now.maximum_payload < before.maximum_payload:
        return "its block sizes are stricter"
    if not before.contexts.keys() <= now.contexts.keys():
        return "it offers fewer metadata contexts"
    return ""
