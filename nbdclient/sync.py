"""The client's API for code that blocks: scripts, test harnesses, a REPL.

    with nbdclient.sync.connect("nbd://localhost/disk") as disk:
        data = disk.read(0, 4096)

Each disk has a thread of its own in which trio runs; a Disk may be used by several threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import ParamSpec, TypeVar

import trio

from drivers.errors import ProtocolError
from drivers.net.stream import Buffer
from drivers.options.nbd_uri import NbdUri
from drivers.wire.nbd.client_handshake import Export, ListedExport
from drivers.wire.nbd.constants import BASE_ALLOCATION, TransmissionFlag
from nbdclient import client
from nbdclient.client import Extent

P = ParamSpec("P")
T = TypeVar("T")


class Portal:
    """A thread in which trio runs, and a way to have things done there. A context manager."""

    def __enter__(self) -> Portal:
        ready: queue.SimpleQueue[tuple[trio.lowlevel.TrioToken, trio.Event]] = queue.SimpleQueue()

        async def live() -> None:
            stop = trio.Event()
            ready.put((trio.lowlevel.current_trio_token(), stop))
            await stop.wait()

        # A daemon, so that a program that forgets to leave the block still ends.
        self._thread = threading.Thread(target=trio.run, args=(live,), name="nbdclient", daemon=True)
        self._thread.start()
        self._token, self._stop = ready.get()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What is still going on there, after an interrupt or in other threads, is cancelled by
        # the end of trio's run.
        self._token.run_sync_soon(self._stop.set)
        self._thread.join()

    def run(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have an async function run there, and wait for its result."""
        try:
            return trio.from_thread.run(partial(function, *args, **kwargs), trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            raise ProtocolError("the disk is closed") from None


class Disk:
    """The blocking twin of nbdclient.client.Disk: see there."""

    def __init__(self, disk: client.Disk, portal: Portal) -> None:
        self._disk = disk
        self._portal = portal
        self.export: Export = disk.export
        self.size: int = disk.size
        self.flags: TransmissionFlag = disk.flags
        self.read_only = disk.read_only
        self.rotational = disk.rotational
        self.can_flush = disk.can_flush
        self.can_fua = disk.can_fua
        self.can_trim = disk.can_trim
        self.can_zero = disk.can_zero
        self.can_fast_zero = disk.can_fast_zero
        self.can_cache = disk.can_cache
        self.can_df = disk.can_df
        self.can_multi_conn = disk.can_multi_conn
        self.can_block_status_payload = disk.can_block_status_payload
        self.minimum_block = disk.minimum_block
        self.preferred_block = disk.preferred_block
        self.maximum_payload = disk.maximum_payload
        self.contexts = disk.contexts
        self.protocol = disk.protocol
        self.connections = disk.connections

    def read(self, offset: int, length: int) -> bytes:
        return self._portal.run(self._disk.read, offset, length)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        self._portal.run(self._disk.read_into, offset, buffer)

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        self._portal.run(self._disk.write, offset, data, fua=fua)

    def zero(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        self._portal.run(self._disk.zero, offset, length, fua=fua, no_hole=no_hole, fast=fast)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._portal.run(self._disk.trim, offset, length, fua=fua)

    def cache(self, offset: int, length: int) -> None:
        self._portal.run(self._disk.cache, offset, length)

    def flush(self) -> None:
        self._portal.run(self._disk.flush)

    def block_status(
        self, offset: int, length: int, *, contexts: Sequence[str] | None = None, one: bool = False
    ) -> dict[str, list[tuple[int, int]]]:
        return self._portal.run(self._disk.block_status, offset, length, contexts=contexts, one=one)

    def extents(
        self, context: str = BASE_ALLOCATION, offset: int = 0, length: int | None = None
    ) -> Iterator[Extent]:
        return iter(self._portal.run(_collect, self._disk, context, offset, length))


async def _collect(disk: client.Disk, context: str, offset: int, length: int | None) -> list[Extent]:
    return [extent async for extent in disk.extents(context, offset, length)]


@contextmanager
def connect(
    uri: str | NbdUri,
    *,
    extended: bool = True,
    structured: bool = True,
    contexts: Sequence[str] = (BASE_ALLOCATION,),
    connections: int = 1,
    timeout: float | None = None,
) -> Generator[Disk, None, None]:
    """See nbdclient.connect()."""
    opening = client.connect(
        uri,
        extended=extended,
        structured=structured,
        contexts=contexts,
        connections=connections,
        timeout=timeout,
    )
    with Portal() as portal:
        disk = portal.run(opening.__aenter__)
        try:
            yield Disk(disk, portal)
        finally:
            portal.run(opening.__aexit__, None, None, None)


def list_exports(uri: str | NbdUri, *, timeout: float | None = None) -> list[ListedExport]:
    with Portal() as portal:
        return portal.run(client.list_exports, uri, timeout=timeout)


def describe_exports(uri: str | NbdUri, *, timeout: float | None = None) -> list[Export]:
    with Portal() as portal:
        return portal.run(client.describe_exports, uri, timeout=timeout)


def info(uri: str | NbdUri, *, timeout: float | None = None) -> Export:
    with Portal() as portal:
        return portal.run(client.info, uri, timeout=timeout)
