"""When work that may block leaves the event loop for threads, and when it comes back."""

from __future__ import annotations

import time


class Pace:
    """Whether work that may block on the host's disk is done on the event loop.

    It is, as long as it is quick (a write into the page cache takes microseconds). Once it was
    stalled, as by the kernel's throttling of dirty pages, threads do such work for a while; the
    while grows as long as every new attempt ends in a stall.
    """

    # Well above what a busy scheduler takes away from a process that waits for nothing.
    STALL_SECONDS = 0.02
    FIRST_COOLDOWN = 0.25  # seconds
    LONGEST_COOLDOWN = 8.0

    def __init__(self) -> None:
        self.inline = True
        self._until = 0.0
        self._cooldown = self.FIRST_COOLDOWN

    def note(self, seconds: float) -> None:
        """Inline work took so long."""
        if seconds < self.STALL_SECONDS:
            return
        now = time.perf_counter()
        if now - self._until > self.LONGEST_COOLDOWN:
            self._cooldown = self.FIRST_COOLDOWN
        self.inline = False
        self._until = now + self._cooldown
        self._cooldown = min(2 * self._cooldown, self.LONGEST_COOLDOWN)

    def recover(self) -> bool:
        """Called now and then while not inline: whether to try again."""
        if time.perf_counter() >= self._until:
            self.inline = True
        return self.inline
