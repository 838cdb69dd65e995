"""The copy behind `nbdimg convert`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import trio

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.node import Node
from drivers.errors import OptionError
from nbdclient.image import plaincopy
from nbdclient.image.cursor import ExtentCursor
from nbdclient.image.session import warn
from nbdclient.image.zeroes import data_runs

SECTOR = 512
# Through buffers so much is read at once; between host files so much is one job of a thread.
STEP = 2 << 20
PLAIN_STEP = 16 << 20
# Zeroes are written in pieces, so that progress shows and a rate holds.
ZERO_STEP = 1 << 30
# Nodes through which a byte lies in the host file where it lies in the guest: a part left unwritten
# keeps what it had.
_IDENTITY = ("raw", "file", "host_device")


class Source:
    """`base` is where the copy of `node` begins in the target."""

    def __init__(self, node: Node, base: int = 0) -> None:
        self.node = node
        self.base = base
        self.sectors = -(-node.size // SECTOR)
        self.cursor = ExtentCursor(node)


@dataclass
class Target:
    """`is_zero`: it reads as zeroes. `backing_size`: of the backing file that it is to rely on.
    `compressed_cluster`: data is to be compressed, in clusters of so many bytes."""

    node: Node
    is_zero: bool
    backing_size: int | None
    compressed_cluster: int | None


class Kind(Enum):
    DATA = "data"
    ZERO = "zero"
    BACKING = "backing"


class Job(NamedTuple):
    """`length` bytes at `offset` of the target; `number` is its place in the order. Only what is
    compressed may come from more than one source. `plain`: perhaps it lies plain in a host file."""

    number: int
    kind: Kind
    source: Source
    offset: int
    length: int
    plain: bool


class Copy:
    """`sparse`: runs of so many zero bytes are not written as data; 0: all are."""

    def __init__(
        self,
        sources: Sequence[Source],
        target: Target,
        *,
        sparse: int,
        workers: int,
        rate: int | None,
        offload: bool,
        salvage: bool,
        in_order: bool,
        progress: Callable[[float], object] | None,
    ) -> None:
        self._sources = sources
        self._target = target
        self._node = target.node
        self._sparse = sparse
        self._workers = workers
        self._pace = _Pace(rate) if rate else None
        self._offload = offload
        self._salvage = salvage
        self._progress = progress
        self._total = sum(source.sectors for source in sources) * SECTOR
        # Bytes of data copied, and of all data (known only if progress is shown).
        self._done = self._data = 0
        # Only whole clusters are compressed or left out.
        minimum = target.compressed_cluster or sparse
        self._minimum = minimum
        granule = 1 << minimum.bit_length() - 1 if minimum else SECTOR
        self._granule = max(granule, target.node.limits.request_alignment)
        self._turns = _Turns() if in_order else None
        self._threads = trio.CapacityLimiter(os.cpu_count() or 1)
        self._plain = target.compressed_cluster is None and not salvage
        self._identity = target.node.driver_name in _IDENTITY
        # What lies plain is copied by one worker at a time.
        self._buffer = bytearray(max(plaincopy.BUFFER, self._granule))

    async def run(self) -> None:
        """Raises OptionError."""
        if not self._target.is_zero and self._target.backing_size is None and self._sparse:
            await self._zero_beforehand()
        if self._progress is not None:
            self._data = sum([job.length async for job in self._jobs() if job.kind is Kind.DATA])
        jobs = self._jobs()
        lock = trio.Lock()
        async with trio.open_nursery() as nursery:
            for _ in range(self._workers):
                nursery.start_soon(self._work, jobs, lock)

    async def _zero_beforehand(self) -> None:
        """Where that is quick the whole target is zeroed, so that zeroes need not be written later."""
        try:
            for offset in range(0, self._node.size, ZERO_STEP):
                length = min(ZERO_STEP, self._node.size - offset)
                await self._node.write_zeroes(offset, length, fast=True)
        except OSError:
            return
        self._target.is_zero = True

    # --- what there is to do ----------------------------------------------------------------

    async def _jobs(self) -> AsyncIterator[Job]:
        """In the order of the target."""
        number = offset = 0
        sources = iter(self._sources)
        source = next(sources)
        end = min(self._total, self._node.size)
        while offset < end:
            while offset >= source.base + source.sectors * SECTOR:
                source = next(sources)
            kind, length, plain = await self._status(source, offset)
            kind, length = self._whole_clusters(kind, length, end - offset)
            plain = plain and self._plain
            step = ZERO_STEP
            if kind is Kind.DATA:
                step = PLAIN_STEP if plain else STEP
            length = min(length, step - offset % step)
            yield Job(number, kind, source, offset, length, plain)
            number += 1
            offset += length

    def _whole_clusters(self, kind: Kind, length: int, rest: int) -> tuple[Kind, int]:
        """Only whole clusters can be compressed: one that is data in part is data."""
        cluster = self._target.compressed_cluster
        if cluster is None:
            return kind, length
        if length < cluster:
            return Kind.DATA, min(cluster, rest)
        return kind, length - length % cluster

    async def _status(self, source: Source, offset: int) -> tuple[Kind, int, bool]:
        """What lies there, how far that reaches, and whether it may lie plain in a host file."""
        position = offset - source.base
        end = source.node.size
        if position >= end:
            # The image ends inside a sector, the target behind it.
            return Kind.ZERO, -position % SECTOR, False
        backing = self._target.backing_size
        if backing is not None and offset < backing:
            end = min(end, position + backing - offset)
        try:
            extent = await source.cursor.at(position, end)
        except OSError as error:
            if not self._salvage:
                raise OptionError(
                    f"error while reading block status at offset {position}: {error.strerror}"
                ) from None
            warn(f"warning: error while reading block status at offset {position}: {error.strerror}")
            return Kind.DATA, min(SECTOR, end - position), False
        return self._kind(extent, offset), extent.length, extent.host_offset is not None

    def _kind(self, extent: Extent, offset: int) -> Kind:
        backing = self._target.backing_size
        if backing is not None and extent.depth != 1:
            # Not the source's own: the target's backing file has it.
            return Kind.BACKING
        if extent.depth and not extent.flags & ExtentFlags.ZERO:
            return Kind.DATA
        if backing is not None and offset >= backing:
            return Kind.BACKING
        return Kind.ZERO if self._sparse else Kind.DATA

    # --- doing it ---------------------------------------------------------------------------

    async def _work(self, jobs: AsyncIterator[Job], lock: trio.Lock) -> None:
        buffer: bytearray | None = None
        while True:
            async with lock:
                job = await self._next(jobs)
            if job is None:
                return
            if job.kind is Kind.ZERO:
                await self._turn(job)
                await self._zero(job.offset, job.length)
            elif not (job.plain and await self._copy_between(job)):
                if buffer is None:
                    buffer = bytearray(STEP)
                await self._copy_buffered(job, buffer)
            self._finish(job)

    async def _next(self, jobs: AsyncIterator[Job]) -> Job | None:
        """The next job that several workers gain from; those before it are done."""
        async for job in jobs:
            if self._pace is not None:
                await self._pace.wait(job.length)
            nothing = job.kind is Kind.BACKING or (job.kind is Kind.ZERO and self._target.is_zero)
            if not nothing:
                shared = self._identity and (self._offload or job.length >= STEP)
                if shared or not (job.plain and await self._copy_placing(job)):
                    return job
            self._finish(job)
        return None

    def _finish(self, job: Job) -> None:
        if self._turns is not None:
            self._turns.finish(job.number)
        if self._progress is not None and job.kind is Kind.DATA:
            self._done += job.length
            self._progress(self._done / self._data)

    async def _turn(self, job: Job) -> None:
        if self._turns is not None:
            await self._turns.wait(job.number)

    async def _copy_placing(self, job: Job) -> bool:
        """Copy what lies plain in host files into whatever place the target finds for what is not
        zero; False if it does not lie plain. The buffer is small enough to stay in the processor's
        cache, so that handing it to a thread would take longer than it wins."""
        source, start = job.source.node, job.offset - job.source.base
        spans = source.plain(start, job.length)
        if spans is None:
            return False
        view, step, offset = memoryview(self._buffer), len(self._buffer), job.offset
        held = source.hold(start, job.length)
        try:
            await self._turn(job)
            await trio.lowlevel.checkpoint()
            for fd, position, length in spans:
                end = offset + length
                while offset < end:
                    size = min(step - offset % step, end - offset)
                    with self._failures(job):
                        plaincopy.read(fd, position, view[:size], offset - job.offset)
                    await self._write(offset, self._buffer, size)
                    offset += size
                    position += size
        finally:
            source.release(held)
        return True

    async def _copy_between(self, job: Job) -> bool:
        """Copy from host file to host file, if both sides are plain; the order of such writes leaves
        no trace."""
        source, source_offset = job.source.node, job.offset - job.source.base
        spans = source.plain(source_offset, job.length) if self._identity else None
        onto = self._node.plain_write(job.offset, job.length) if spans is not None else None
        if spans is None or onto is None:
            return False
        zeroes: list[tuple[int, int]] = []
        held = source.hold(source_offset, job.length), self._node.hold(job.offset, job.length)
        try:
            with self._failures(job):
                if self._sparse and not self._offload:
                    zeroes = await trio.to_thread.run_sync(
                        lambda: plaincopy.copy_detecting(
                            spans, onto, granule=self._granule, minimum=self._minimum, phase=job.offset
                        ),
                        limiter=self._threads,
                    )
                else:
                    await trio.to_thread.run_sync(plaincopy.copy_all, spans, onto, limiter=self._threads)
        finally:
            source.release(held[0])
            self._node.release(held[1])
        for start, length in zeroes:
            await self._zero(job.offset + start, length)
        return True

    @contextmanager
    def _failures(self, job: Job) -> Iterator[None]:
        try:
            yield
        except plaincopy.CopyError as error:
            raise OptionError(
                f"error while {error.doing} at byte {job.offset + error.position}: {error.error.strerror}"
            ) from None

    async def _copy_buffered(self, job: Job, buffer: bytearray) -> None:
        for start in range(0, job.length, STEP):
            length = min(STEP, job.length - start)
            await self._read_across(job.source, job.offset + start, memoryview(buffer)[:length])
            await self._turn(job)
            await self._write(job.offset + start, buffer, length)

    async def _read_across(self, source: Source, offset: int, part: memoryview) -> None:
        """Fill `part` from `source` and, behind its end, from the next ones."""
        for other in self._sources[self._sources.index(source) :]:
            position = offset - other.base
            readable = max(0, min(len(part), other.node.size - position))
            if readable:
                await self._read(other.node, position, part[:readable])
            whole = min(len(part), other.sectors * SECTOR - position)
            part[readable:whole] = bytes(whole - readable)
            part = part[whole:]
            offset += whole
            if not part:
                return

    async def _read(self, node: Node, offset: int, part: memoryview) -> None:
        try:
            await node.read_into(offset, part)
        except OSError as error:
            if not self._salvage:
                raise OptionError(f"error while reading at byte {offset}: {error.strerror}") from None
            await self._read_sectors(node, offset, part)

    async def _read_sectors(self, node: Node, offset: int, part: memoryview) -> None:
        """What can be read; the rest as zeroes."""
        for start in range(0, len(part), SECTOR):
            sector = part[start : start + SECTOR]
            try:
                await node.read_into(offset + start, sector)
            except OSError as error:
                warn(f"warning: error while reading offset {offset + start}: {error.strerror}")
                sector[:] = bytes(len(sector))

    async def _write(self, offset: int, buffer: bytearray, length: int) -> None:
        if not self._sparse:
            await self._put(offset, memoryview(buffer)[:length])
            return
        done, granule, minimum = 0, self._granule, self._minimum
        for start, end in data_runs(buffer, length, granule=granule, minimum=minimum, phase=offset):
            if start > done:
                await self._zero(offset + done, start - done)
            await self._put(offset + start, memoryview(buffer)[start:end])
            done = end
        if done < length:
            await self._zero(offset + done, length - done)

    async def _put(self, offset: int, data: memoryview) -> None:
        try:
            if self._target.compressed_cluster is None:
                spans = self._node.plain_write(offset, len(data))
                if spans is None:
                    await self._node.write(offset, data)
                else:
                    plaincopy.write_spans(spans, data)
            else:
                await self._put_compressed(offset, data, self._target.compressed_cluster)
        except OSError as error:
            raise OptionError(f"error while writing at byte {offset}: {error.strerror}") from None

    async def _put_compressed(self, offset: int, data: memoryview, cluster: int) -> None:
        """The clusters side by side: compressing them takes much longer than all else."""
        starts = iter(range(0, len(data), cluster))

        async def work() -> None:
            for start in starts:
                await self._node.write_compressed(  # type: ignore[attr-defined]
                    offset + start, data[start : start + cluster]
                )

        try:
            async with trio.open_nursery() as nursery:
                for _ in range(min(self._workers, -(-len(data) // cluster))):
                    nursery.start_soon(work)
        except* OSError as group:
            failure = group.exceptions[0]
            assert isinstance(failure, OSError)
            raise failure from None

    async def _zero(self, offset: int, length: int) -> None:
        if self._target.is_zero:
            return
        try:
            await self._node.write_zeroes(offset, length)
        except OSError as error:
            raise OptionError(f"error while writing at byte {offset}: {error.strerror}") from None


class _Turns:
    """Lets numbered jobs, which begin in order, go on in order."""

    def __init__(self) -> None:
        self._next = 0
        self._finished: set[int] = set()
        self._waiting: dict[int, trio.Event] = {}

    async def wait(self, number: int) -> None:
        while number != self._next:
            event = self._waiting.setdefault(number, trio.Event())
            await event.wait()

    def finish(self, number: int) -> None:
        self._finished.add(number)
        while self._next in self._finished:
            self._finished.remove(self._next)
            self._next += 1
        if (event := self._waiting.pop(self._next, None)) is not None:
            event.set()


class _Pace:
    """Holds a rate of `rate` bytes a second."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._next = 0.0

    async def wait(self, length: int) -> None:
        start = max(self._next, trio.current_time())
        self._next = start + length / self._rate
        await trio.sleep_until(start)
