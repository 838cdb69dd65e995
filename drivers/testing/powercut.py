"""A disk in memory that loses power.

It keeps a journal of everything that reached it. For any moment of that journal it tells what the
disk may hold if the power is cut then: what was flushed, and of what was not, each sector in any of
the states it went through since, whatever became of its neighbours.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from drivers.block.extents import Extent, ExtentFlags, Span
from drivers.block.node import Node, OpenFlags, Preallocation

SECTOR = 512
# A test aid: what is larger is a mistake.
MAX_SIZE = 1 << 28


@dataclass(frozen=True, slots=True)
class Write:
    """`data` None: so many zeroes. With `fua` it is durable when it returns."""

    offset: int
    length: int
    data: bytes | None
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Resize:
    size: int


@dataclass(frozen=True, slots=True)
class Flush:
    pass


Event = Write | Resize | Flush


class PowerCutNode(Node):
    """`content` is durable; so is, from then on, what was flushed.

    A sector is written whole or not at all, and a change of size is one more thing that may be
    lost. Every request gives way once, so that requests made side by side really interleave.
    """

    driver_name = "powercut"
    supports_fua = True

    def __init__(self, content: bytes, *, flags: OpenFlags | None = None, name: str = "powercut") -> None:
        super().__init__(flags=flags or OpenFlags(discard=True), size=len(content), name=name)
        self.content = bytearray(content)
        self._first = bytes(content)
        self.journal: list[Event] = []

    # --- the disk ---------------------------------------------------------------------------

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        await trio.lowlevel.checkpoint()
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        await trio.lowlevel.checkpoint()
        self._happens(Write(offset, len(data), bytes(data), fua))

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        await trio.lowlevel.checkpoint()
        self._happens(Write(offset, length, None))

    async def _discard(self, offset: int, length: int, /) -> None:
        await trio.lowlevel.checkpoint()
        self._happens(Write(offset, length, None))

    async def _flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self._happens(Flush())

    def _grow(self, size: int, /) -> bool:
        if size > MAX_SIZE:
            return False
        self._happens(Resize(size))
        return True

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        await trio.lowlevel.checkpoint()
        assert size <= MAX_SIZE, "the test fills the memory"
        self._happens(Resize(size))

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        return [Extent(length, ExtentFlags.DATA)]

    def _happens(self, event: Event) -> None:
        self.journal.append(event)
        _apply(event, self.content)

    # --- the power cut ----------------------------------------------------------------------

    @property
    def position(self) -> int:
        """How many events there were: a moment to cut the power at."""
        return len(self.journal)

    def states(self, position: int | None = None, *, seed: int = 0, limit: int = 16) -> Iterator[bytearray]:
        """What the disk may hold after a power cut when `position` events (None: all) had happened.

        All possible contents if there are at most `limit`; else nothing lost, everything lost,
        and a seeded choice of others.
        """
        disk = _Replay(self._first)
        for event in self.journal[:position]:
            disk.step(event)
        return disk.states(random.Random(f"{seed}/{position}"), limit)

    def cuts(
        self, *, first: int = 0, seed: int = 0, limit: int = 4
    ) -> Iterator[tuple[int, Iterator[bytearray]]]:
        """(position, states) for every moment from `first` on; each to be used up before the next."""
        disk = _Replay(self._first)
        for position in range(self.position + 1):
            if position:
                disk.step(self.journal[position - 1])
            if position >= first:
                yield position, disk.states(random.Random(f"{seed}/{position}"), limit)


def _apply(event: Event, content: bytearray) -> None:
    if isinstance(event, Write):
        data = bytes(event.length) if event.data is None else event.data
        content[event.offset : event.offset + event.length] = data
    elif isinstance(event, Resize):
        del content[event.size :]
        content.extend(bytes(event.size - len(content)))


class _Replay:
    """The disk at a moment: `durable`, and what every unflushed sector and the size went through
    since, in order."""

    def __init__(self, content: bytes) -> None:
        self.current = bytearray(content)
        self.durable = bytearray(content)
        self.sectors: dict[int, list[bytes]] = {}
        self.sizes: list[int] = []

    def step(self, event: Event) -> None:
        before = len(self.current)
        _apply(event, self.current)
        if isinstance(event, Write):
            first, last = event.offset // SECTOR, (event.offset + event.length - 1) // SECTOR
            self._changed(first, last + 1)
            if event.fua:
                self._settle(first, last + 1)
        elif isinstance(event, Resize):
            self.sizes.append(event.size)
            # What was cut off reads as zeroes if the disk grows again.
            self._changed(event.size // SECTOR, -(-before // SECTOR))
        else:
            self.durable = bytearray(self.current)
            self.sectors.clear()
            self.sizes.clear()

    def _changed(self, first: int, end: int) -> None:
        for sector in range(first, end):
            self.sectors.setdefault(sector, []).append(self._sector(sector))

    def _sector(self, sector: int) -> bytes:
        return bytes(self.current[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")

    def _settle(self, first: int, end: int) -> None:
        """These sectors are durable, and with them that the disk reaches so far."""
        if end * SECTOR > len(self.durable) and self.sizes:
            self.sizes.clear()
            _apply(Resize(len(self.current)), self.durable)
        for sector in range(first, end):
            self.sectors.pop(sector, None)
            room = min(SECTOR, len(self.durable) - sector * SECTOR)
            self.durable[sector * SECTOR : sector * SECTOR + room] = self._sector(sector)[:room]

    def states(self, chance: random.Random, limit: int) -> Iterator[bytearray]:
        choices = [len(versions) + 1 for versions in self.sectors.values()]
        choices.append(len(self.sizes) + 1)
        count = math.prod(choices)
        if count <= limit:
            for number in range(count):
                yield self._state(_digits(number, choices))
            return
        yield self._state([0] * len(choices))
        yield self._state([choice - 1 for choice in choices])
        for turn in range(limit - 2):
            yield self._state(_some(chance, choices, turn))

    def _state(self, picks: list[int]) -> bytearray:
        """The disk with version `pick` of each sector, the last pick being the size's; 0 is what
        was flushed."""
        disk = bytearray(self.durable)
        size = self.sizes[picks[-1] - 1] if picks[-1] else len(disk)
        _apply(Resize(size), disk)
        for (sector, versions), pick in zip(self.sectors.items(), picks, strict=False):
            room = min(SECTOR, size - sector * SECTOR)
            if pick and room > 0:
                disk[sector * SECTOR : sector * SECTOR + room] = versions[pick - 1][:room]
        return disk


def _digits(number: int, bases: list[int]) -> list[int]:
    """`number` in a system where each place has its own base."""
    digits = []
    for base in bases:
        number, digit = divmod(number, base)
        digits.append(digit)
    return digits


def _some(chance: random.Random, choices: list[int], turn: int) -> list[int]:
    """One more choice: all lost but one, all there but one, or each by chance."""
    last = [choice - 1 for choice in choices]
    if turn % 3 == 2:
        keeps = chance.choice((0.1, 0.5, 0.9))
        return [chance.randint(0, pick) if chance.random() > keeps else pick for pick in last]
    picks = [0] * len(choices) if turn % 3 == 0 else list(last)
    one = chance.randrange(len(choices))
    picks[one] = last[one] - picks[one]
    # Sectors behind the end would be lost with the size, so it mostly stays.
    if turn % 3 == 0 and chance.random() < 0.7:
        picks[-1] = last[-1]
    return picks


class PlainPowerCutNode(PowerCutNode):
    """One whose bytes can be read and written where they lie, in a file in memory: what is written so
    is noticed, and journalled, at the next thing that happens. As the node contract demands it, nobody
    waits between plain_write() and the write."""

    def __init__(self, content: bytes, *, flags: OpenFlags | None = None, name: str = "powercut") -> None:
        super().__init__(content, flags=flags, name=name)
        self._fd = os.memfd_create(name)
        os.pwrite(self._fd, content, 0)
        self._lent: list[tuple[int, int]] = []

    def _plain(self, offset: int, length: int, /) -> list[Span]:
        return [(self._fd, offset, length)]

    def _plain_write(self, offset: int, length: int, /) -> list[Span]:
        self._notice()
        self._lent.append((offset, length))
        return [(self._fd, offset, length)]

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        await super()._read_into(offset, buffer)
        self._notice()
        buffer[:] = self.content[offset : offset + len(buffer)]

    async def _close(self) -> None:
        self._notice()
        os.close(self._fd)
        self._fd = -1

    @property
    def position(self) -> int:
        self._notice()
        return super().position

    def _notice(self) -> None:
        lent, self._lent = self._lent, []
        for offset, length in lent:
            data = os.pread(self._fd, length, offset)
            if data != self.content[offset : offset + length]:
                super()._happens(Write(offset, length, data))

    def _happens(self, event: Event) -> None:
        self._notice()
        super()._happens(event)
        if isinstance(event, Write):
            os.pwrite(self._fd, event.data or bytes(event.length), event.offset)
        elif isinstance(event, Resize):
            os.ftruncate(self._fd, event.size)
