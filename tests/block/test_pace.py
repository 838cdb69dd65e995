"""When work leaves the event loop for threads, and when it comes back."""

from __future__ import annotations

import pytest

from drivers.block import pace as module
from drivers.block.pace import Pace


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_quick_work_stays_on_the_loop(clock: Clock) -> None:
    pace = Pace()
    pace.note(Pace.STALL_SECONDS / 2)
    assert pace.inline


def test_a_stall_sends_it_to_threads_for_a_while(clock: Clock) -> None:
    pace = Pace()
    pace.note(Pace.STALL_SECONDS)
    assert not pace.inline and not pace.recover()
    clock.now += Pace.FIRST_COOLDOWN
    assert pace.recover() and pace.inline


def test_the_while_grows_with_each_stall_and_is_forgotten_when_all_went_well(clock: Clock) -> None:
    pace = Pace()
    waits = []
    for _ in range(8):
        pace.note(1.0)
        began = clock.now
        while not pace.recover():
            clock.now += 0.0625
        waits.append(clock.now - began)
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 8, 8]
    clock.now += Pace.LONGEST_COOLDOWN + 1
    pace.note(1.0)
    clock.now += Pace.FIRST_COOLDOWN
    assert pace.recover()
