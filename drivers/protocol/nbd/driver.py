"""The block driver `nbd`: another server's export as a node."""

from __future__ import annotations

import contextlib
import errno
from dataclasses import replace

from drivers.block.extents import Extent, ExtentFlags
from drivers.block.graph import OpenContext
from drivers.block.limits import Limits
from drivers.block.node import MAX_EXTENTS, Node, OpenFlags, Preallocation
from drivers.errors import OptionError, RequestError
from drivers.options.address import take_server
from drivers.options.schema import Options
from drivers.protocol.nbd.connection import ClientConnection
from drivers.protocol.nbd.reconnect import ReconnectingConnection, connect_first
from drivers.wire.nbd.client_handshake import Wishes
from drivers.wire.nbd.constants import BASE_ALLOCATION, MAX_STRING, AllocationState, TransmissionFlag

_TLS_OPTIONS = (
    "tls-creds",
    "tls-hostname",
    "tls-username",
    "tls-certificates",
    "tls-psk-file",
)


class NbdNode(Node):
    """Its size, alignment and abilities are the export's."""

    driver_name = "nbd"
    # By itself, or by a flush where the server has no FUA.
    supports_fua = True

    def __init__(
        self, server: ReconnectingConnection, *, context: str, flags: OpenFlags, name: str = ""
    ) -> None:
        export = server.export
        limits = Limits(
            request_alignment=export.minimum_block,
            preferred_block=export.preferred_block,
            max_transfer=export.maximum_payload,
        )
        super().__init__(flags=flags, size=export.size, limits=limits, name=name)
        self._server = server
        self._context = context

    @classmethod
    async def open(cls, context: OpenContext, options: Options, /) -> NbdNode:
        address = take_server(options)
        export = options.string("export", "")
        if len(export.encode()) > MAX_STRING:
            raise OptionError("export name too long to send to server")
        # Each is taken, so that none is called unknown.
        tls = [options.string(key, None) for key in _TLS_OPTIONS]
        if options.boolean("tls", False) or any(tls):
            raise OptionError("TLS is not supported yet")
        bitmap = options.string("x-dirty-bitmap", None)
        delay = options.integer("reconnect-delay", 0, high=(1 << 32) - 1)
        open_timeout = options.integer("open-timeout", 0, high=(1 << 32) - 1)
        wanted = bitmap or BASE_ALLOCATION
        server = await connect_first(
            address, Wishes(export, contexts=(wanted,)), delay=delay, open_timeout=open_timeout
        )
        try:
            if bitmap and bitmap not in server.export.contexts:
                raise OptionError(f"requested x-dirty-bitmap {bitmap} not found")
            flags = context.flags
            if server.export.flags & TransmissionFlag.READ_ONLY and not flags.read_only:
                if not flags.auto_read_only:
                    raise OptionError("request for write access denied")
                flags = replace(flags, read_only=True)
            return cls(server, context=wanted, flags=flags, name=context.name)
        except BaseException:
            await server.aclose()
            raise

    def _offers(self, flag: TransmissionFlag) -> bool:
        return bool(self._server.export.flags & flag)

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        await self._server.perform(lambda connection: connection.read_into(offset, buffer))

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        native = fua and self._offers(TransmissionFlag.SEND_FUA)
        await self._server.perform(lambda connection: connection.write(offset, data, fua=native))
        if fua and not native:
            await self._flush()

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        await self._server.perform(
            lambda connection: connection.write_zeroes(offset, length, no_hole=not may_unmap, fast=fast)
        )

    async def _discard(self, offset: int, length: int, /) -> None:
        await self._server.perform(lambda connection: connection.trim(offset, length))

    async def _flush(self) -> None:
        # A server without it has nothing that could be lost, or promises nothing anyway.
        if self._offers(TransmissionFlag.SEND_FLUSH):
            await self._server.perform(ClientConnection.flush)

    async def _cache(self, offset: int, length: int, /) -> None:
        with contextlib.suppress(RequestError):  # it was mere advice
            await self._server.perform(lambda connection: connection.cache(offset, length))

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        if self._context not in self._server.export.contexts:
            return [Extent(length, ExtentFlags.DATA, host_offset=offset)]
        try:
            found = await self._server.perform(
                lambda connection: connection.block_status(offset, length, contexts=(self._context,))
            )
        except RequestError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            return [Extent(length, ExtentFlags.DATA, host_offset=offset)]
        extents: list[Extent] = []
        for run, status in found[self._context][:MAX_EXTENTS]:
            flags = ExtentFlags(0) if status & AllocationState.HOLE else ExtentFlags.DATA
            if status & AllocationState.ZERO:
                flags |= ExtentFlags.ZERO
            extents.append(Extent(run, flags, host_offset=offset))
            offset += run
        return extents

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        raise RequestError(errno.ENOTSUP, f"Cannot {'grow' if size > self.size else 'resize'} NBD nodes")

    async def _close(self) -> None:
        await self._server.aclose()
