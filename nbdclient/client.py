"""The client's API for trio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeVar

import trio

from drivers.errors import Error, OptionError
from drivers.net.stream import Buffer, Stream
from drivers.options.nbd_uri import NbdUri, parse_nbd_filename
from drivers.protocol.nbd.connection import ClientConnection, perform
from drivers.protocol.nbd.connection import connect as open_connection
from drivers.wire.nbd import client_handshake
from drivers.wire.nbd.client_handshake import Export, ListedExport, Wishes
from drivers.wire.nbd.constants import BASE_ALLOCATION, TransmissionFlag
from drivers.wire.nbd.steps import Handshake

T = TypeVar("T")

MAX_CONNECTIONS = 64
# A server that lets no more clients in often leaves them waiting rather than refuse them.
EXTRA_CONNECTION_TIMEOUT = 1.0  # seconds


class Extent(NamedTuple):
    """`length` bytes from `offset` on have the same `status`, whose meaning is its context's."""

    offset: int
    length: int
    status: int


class Disk:
    """An export in use: any number of tasks may make requests at the same time.

    Operations raise RequestError (an OSError with its errno) where the request fails, and
    ProtocolError where the connection is lost. Requests in flight have no order among themselves.
    Ranges are in bytes, multiples of `minimum_block`.
    """

    def __init__(self, connections: Sequence[ClientConnection]) -> None:
        self._connections = connections
        self._first = connections[0]
        self.export: Export = connections[0].export
        self.size: int = self.export.size

    # --- what the server said ---------------------------------------------------------------

    @property
    def flags(self) -> TransmissionFlag:
        return self._first.flags

    @property
    def read_only(self) -> bool:
        return self._has(TransmissionFlag.READ_ONLY)

    @property
    def rotational(self) -> bool:
        return self._has(TransmissionFlag.ROTATIONAL)

    @property
    def can_flush(self) -> bool:
        return self._has(TransmissionFlag.SEND_FLUSH)

    @property
    def can_fua(self) -> bool:
        return self._has(TransmissionFlag.SEND_FUA)

    @property
    def can_trim(self) -> bool:
        return self._has(TransmissionFlag.SEND_TRIM)

    @property
    def can_zero(self) -> bool:
        return self._has(TransmissionFlag.SEND_WRITE_ZEROES)

    @property
    def can_fast_zero(self) -> bool:
        return self._has(TransmissionFlag.SEND_FAST_ZERO)

    @property
    def can_cache(self) -> bool:
        return self._has(TransmissionFlag.SEND_CACHE)

    @property
    def can_df(self) -> bool:
        return self._has(TransmissionFlag.SEND_DF)

    @property
    def can_multi_conn(self) -> bool:
        return self._has(TransmissionFlag.CAN_MULTI_CONN)

    @property
    def can_block_status_payload(self) -> bool:
        return self._has(TransmissionFlag.BLOCK_STATUS_PAYLOAD)

    @property
    def minimum_block(self) -> int:
        return self.export.minimum_block

    @property
    def preferred_block(self) -> int:
        return self.export.preferred_block

    @property
    def maximum_payload(self) -> int:
        return self._first.max_payload

    @property
    def contexts(self) -> tuple[str, ...]:
        """The metadata contexts that block_status() can answer."""
        return tuple(self.export.contexts)

    @property
    def protocol(self) -> str:
        """The kind of replies: "simple", "structured" or "extended"."""
        return self.export.mode.value

    @property
    def connections(self) -> int:
        return len(self._connections)

    def _has(self, flag: TransmissionFlag) -> bool:
        return bool(self._first.flags & flag)

    # --- requests ---------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        await self.read_into(offset, buffer)
        return bytes(buffer)

    async def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer`. After an error its content is undefined; once this was cancelled it is
        not touched any more."""
        await self._least_busy().read_into(offset, buffer)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """With `fua` the data is durable on return. A cancelled write may or may not happen."""
        await self._least_busy().write(offset, data, fua=fua)

    async def zero(
        self, offset: int, length: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Make the range read as zeroes. `no_hole` keeps its storage; with `fast` it fails with
        ENOTSUP where it would be no quicker than write()."""
        await self._least_busy().write_zeroes(offset, length, fua=fua, no_hole=no_hole, fast=fast)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Advice that the range's content is of no more use."""
        await self._least_busy().trim(offset, length, fua=fua)

    async def cache(self, offset: int, length: int) -> None:
        """Advice that the range will be read soon."""
        await self._least_busy().cache(offset, length)

    async def flush(self) -> None:
        """Every write, zero and trim that has returned, on whichever connection, is durable when
        this returns. Several connections are only used where the server promises that."""
        await self._least_busy().flush()

    async def block_status(
        self, offset: int, length: int, *, contexts: Sequence[str] | None = None, one: bool = False
    ) -> dict[str, list[tuple[int, int]]]:
        """What lies at `offset`: (length, status) runs for each context, by its name.

        At least one run each, at most `length` bytes; often less than was asked, and not equally
        far for every context. `one` asks for a single run each. See extents() for all of them.
        """
        return await self._least_busy().block_status(offset, length, contexts=contexts, one=one)

    async def extents(
        self, context: str = BASE_ALLOCATION, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[Extent]:
        """All of a range's extents in one context, neighbours of one status joined."""
        end = self.size if length is None else offset + length
        last: Extent | None = None
        while offset < end:
            status = await self.block_status(offset, end - offset, contexts=(context,))
            for run, flags in status[context]:
                if last is not None and last.status == flags:
                    last = last._replace(length=last.length + run)
                else:
                    if last is not None:
                        yield last
                    last = Extent(offset, run, flags)
                offset += run
        if last is not None:
            yield last

    def _least_busy(self) -> ClientConnection:
        if len(self._connections) == 1:
            return self._first
        return min(self._connections, key=lambda connection: len(connection.pending))


@asynccontextmanager
async def connect(
    uri: str | NbdUri,
    *,
    extended: bool = True,
    structured: bool = True,
    contexts: Sequence[str] = (BASE_ALLOCATION,),
    connections: int = 1,
    timeout: float | None = None,
) -> AsyncGenerator[Disk, None]:
    """The export that `uri` names, connected to until the block ends.

    `extended` and `structured` allow those kinds of replies, `contexts` are the metadata contexts
    to negotiate. Up to `connections` are opened if the server can serve one disk over several.
    `timeout`, in seconds, is for connecting. Raises OptionError, RequestError or ProtocolError.
    """
    parsed = parse(uri)
    wishes = Wishes(parsed.export, extended=extended, structured=structured, contexts=contexts)
    opened = [await open_connection(parsed.address, wishes, timeout=timeout)]
    try:
        wanted = min(connections, MAX_CONNECTIONS) - 1
        if wanted > 0 and opened[0].flags & TransmissionFlag.CAN_MULTI_CONN:
            async with trio.open_nursery() as nursery:
                for _ in range(wanted):
                    nursery.start_soon(_open_another, parsed, wishes, opened)
        yield Disk(opened)
    finally:
        for connection in opened:
            await connection.aclose()


async def _open_another(uri: NbdUri, wishes: Wishes, opened: list[ClientConnection]) -> None:
    """One more connection, if the server allows it."""
    with trio.move_on_after(EXTRA_CONNECTION_TIMEOUT):
        try:
            connection = await open_connection(uri.address, wishes)
        except Error:
            return
        ours, first = connection.export, opened[0].export
        # Each connection numbers the contexts for itself; the names must agree.
        if (ours.size, ours.flags, set(ours.contexts)) == (first.size, first.flags, set(first.contexts)):
            opened.append(connection)
        else:
            await connection.aclose()


async def list_exports(uri: str | NbdUri, *, timeout: float | None = None) -> list[ListedExport]:
    """The exports that the server lists. The URI's own export plays no part."""
    return await _ask(uri, client_handshake.list_exports, timeout)


async def describe_exports(uri: str | NbdUri, *, timeout: float | None = None) -> list[Export]:
    """Like list_exports(), with everything that info() tells about each."""
    return await _ask(uri, client_handshake.describe_all, timeout)


async def info(uri: str | NbdUri, *, timeout: float | None = None) -> Export:
    """What the server tells about one export without its being used. `contexts` are those that
    the server offers."""
    return await _ask(uri, client_handshake.describe_export, timeout)


def parse(uri: str | NbdUri) -> NbdUri:
    """Raises OptionError."""
    parsed = uri if isinstance(uri, NbdUri) else parse_nbd_filename(uri)
    if parsed.tls:
        raise OptionError("TLS is not supported yet")
    return parsed


async def _ask(uri: str | NbdUri, question: Callable[[Wishes], Handshake[T]], timeout: float | None) -> T:
    parsed = parse(uri)
    stream = Stream(await parsed.address.connect(timeout))
    try:
        return await perform(stream, question(Wishes(parsed.export)))
    finally:
        stream.close()
