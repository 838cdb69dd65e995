"""Copying a disk: NBD export, local file, device or pipe to any other of them.

Holes stay holes where both ends know them. Any error ends the copy; what the target holds then
is undefined.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from drivers.errors import Error, ProtocolError, RequestError
from nbdclient.endpoints import Piece, Source, Target, open_source, open_target

# Zeroes are made in steps of this, so that progress shows and an end can come.
ZERO_STEP = 256 << 20


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """`requests` and `request_size` (bytes) bound what is in flight over all `connections`.
    `allocated` gives zeroes storage in the target. `destination_is_zero` trusts that the target
    reads as zeroes already."""

    connections: int = 4
    requests: int = 4
    request_size: int = 1 << 20
    allocated: bool = False
    destination_is_zero: bool = False
    flush: bool = False


@dataclass(slots=True)
class Progress:
    """`done` bytes of `total` (None: unknown) are copied or skipped; `zeroes` of them were zero."""

    total: int | None = None
    done: int = 0
    zeroes: int = 0


async def copy(
    source: str, target: str, options: CopyOptions, report: Callable[[Progress], object] = lambda _: None
) -> Progress:
    """Copy all of `source` over the beginning of `target`; see endpoints.py for what these may be.

    `report` is told after every piece. Raises OptionError, RequestError or ProtocolError.
    """
    async with AsyncExitStack() as stack:
        reader = await open_source(
            source, stack, connections=options.connections, request_size=options.request_size
        )
        writer = await open_target(
            target,
            stack,
            connections=options.connections,
            allocated=options.allocated,
            is_zero=options.destination_is_zero,
            source=source,
        )
        await writer.prepare(reader.size)
        job = _Copy(reader, writer, options, report)
        await job.run()
        with _Naming(writer.name, "finishing", None):
            await writer.finish(job.progress.done, flush=options.flush)
        return job.progress


class _Copy:
    def __init__(
        self, source: Source, target: Target, options: CopyOptions, report: Callable[[Progress], object]
    ) -> None:
        self.source = source
        self.target = target
        self.report = report
        self.progress = Progress(source.size)
        self._requests = options.requests
        block = max(source.block, target.block)
        self._block = block
        self._step = -(-options.request_size // block) * block
        self._pieces = self._steps()
        self._taking = trio.Lock()
        self._taken = self._written = 0
        self._turn = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._requests):
                    nursery.start_soon(self._work)
        except BaseExceptionGroup as group:
            raise _first(group) from None

    async def _work(self) -> None:
        buffer = memoryview(bytearray(self._step))
        while True:
            async with self._taking:
                with _Naming(self.source.name, "examining", None):
                    piece = await anext(self._pieces, None)
                if piece is None:
                    return
                number = self._taken
                self._taken += 1
            await self._copy(piece, buffer, number)
            self.progress.done += piece.length
            self.report(self.progress)

    async def _copy(self, piece: Piece, buffer: memoryview, number: int) -> None:
        offset, length, zero, data = piece
        view = buffer[:length] if data is None else memoryview(data)
        if not zero and data is None:
            with _Naming(self.source.name, "reading", offset):
                await self.source.read_into(offset, view)
        if self.target.discards:
            return
        from drivers.block.node import is_zero  # not loaded where nothing is written

        zero = zero or is_zero(view)
        if self.target.ordered:
            while self._written != number:
                await self._turn.park()
        with _Naming(self.target.name, "writing", offset):
            if not zero:
                await self.target.write(offset, view)
            elif not self.target.is_zero:
                await self.target.zero(offset, length)
        if zero:
            self.progress.zeroes += length
        if self.target.ordered:
            self._written += 1
            self._turn.unpark_all()

    async def _steps(self) -> AsyncIterator[Piece]:
        """The source's pieces, cut to the size of requests and to both ends' block sizes."""
        position = 0
        async for piece in self.source.pieces():
            if piece.data is not None:
                yield piece
                continue
            end = piece.offset + piece.length
            whole = end if end == self.source.size else end - end % self._block
            start = -(-piece.offset // self._block) * self._block
            if piece.zero and start < whole:
                for part in _cut(position, start, self._step):
                    yield Piece(*part)
                for part in _cut(start, whole, ZERO_STEP):
                    yield Piece(*part, zero=True)
                position = whole
            elif not piece.zero and whole > position:
                for part in _cut(position, whole, self._step):
                    yield Piece(*part)
                position = whole
        for part in _cut(position, self.source.size or 0, self._step):
            yield Piece(*part)


def _cut(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the parts of a range, cut where `step` divides the offset."""
    while start < end:
        stop = min(end, start - start % step + step)
        yield start, stop - start
        start = stop


class _Naming:
    """Errors inside come out with the name of the end that they befell."""

    def __init__(self, name: str, doing: str, offset: int | None) -> None:
        self.name = name
        self.doing = doing
        self.offset = offset

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        where = "" if self.offset is None else f" at offset {self.offset}"
        if isinstance(error, ProtocolError):
            raise ProtocolError(f"{self.doing} {self.name}{where}: {error}") from None
        if isinstance(error, BrokenPipeError):
            return
        if isinstance(error, OSError):
            reason = str(error) if isinstance(error, Error) else error.strerror
            raise RequestError(error.errno or 5, f"{self.doing} {self.name}{where}: {reason}") from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One error out of a nursery's group: an interrupt before the others."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        interrupts = [error for error in found.exceptions if not isinstance(error, Exception)]
        found = (interrupts or found.exceptions)[0]
    return found
