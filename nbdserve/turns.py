"""Sharing the event loop: how long a connection may have it, and what a lone one may do with it."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence

import trio

# So long a connection may have the loop to itself while there is work: then others get their turn,
# and a cancellation is noticed.
TURN_SECONDS = 1e-3
# A lone, quick client is waited for actively for so long, then in the kernel, before the task is
# parked: putting a processor to sleep and waking it costs more than the client needs.
SPIN_SECONDS = 25e-6
LINGER_SECONDS = 50e-6
LINGER_STREAK = 8  # batches without any other connection at work


class Activity:
    """Shared by a server's connections: whether one of them has the loop to itself."""

    def __init__(self) -> None:
        self.last: object = None
        self.streak = 0


class Turn:
    """One connection's part of the loop. `ends` is on time.perf_counter's scale."""

    def __init__(self, activity: Activity, fileno: int) -> None:
        self.activity = activity
        self.ends = 0.0
        # select()'s own limit; and waiting actively on a single processor starves the client.
        self.can_linger = fileno < 1024 and len(os.sched_getaffinity(0)) > 1

    def batch_done(self) -> None:
        """This connection has answered a batch of requests."""
        if self.activity.last is self:
            self.activity.streak += 1
        else:
            self.activity.last = self
            self.activity.streak = 0

    @property
    def alone(self) -> bool:
        """No other connection was at work lately, so that it harms nobody to block the loop for
        some microseconds."""
        return self.can_linger and self.activity.streak > LINGER_STREAK

    def begin(self) -> None:
        """Others have just had the loop."""
        self.ends = time.perf_counter() + TURN_SECONDS

    async def give_way(self) -> None:
        """Let the others go first, if this connection has had its turn."""
        if time.perf_counter() > self.ends:
            await trio.lowlevel.checkpoint()
            self.begin()


def soon(readable: Sequence[int], writable: Sequence[int]) -> bool:
    """Wait for a moment, blocking the loop, until the one descriptor given is ready."""
    clock = time.perf_counter
    deadline = clock() + SPIN_SECONDS
    while clock() < deadline:
        ready = select.select(readable, writable, (), 0)
        if ready[0] or ready[1]:
            return True
    ready = select.select(readable, writable, (), LINGER_SECONDS)
    return bool(ready[0] or ready[1])
