"""The server proper, put together: images opened, exports made of them, clients served."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from drivers.block.graph import Graph
from drivers.catalog import Catalog
from drivers.errors import InUseError, OptionError
from drivers.objects.store import ObjectStore
from nbdserve.exports.nbd import NbdExport
from nbdserve.images import open_export
from nbdserve.server import Server
from nbdserve.settings import ServeSettings
from nbdserve.trace import trace
from nbdserve.tracing import Log


async def serve(
    settings: ServeSettings,
    sockets: Sequence[socket.socket],
    *,
    stop: trio.Event,
    ready: Callable[[], None],
) -> None:
    """Serve until `stop` is set, or without settings.persistent until the last negotiated client
    has left; images are flushed and closed on return.

    `sockets` listen already and do not block. `ready` is called once, when every export is open and
    clients are accepted; what it raises ends the server.
    """
    async with opened_exports(settings) as exports, trio.open_nursery() as nursery:
        server = Server(
            exports,
            log=Log(),
            max_clients=settings.shared,
            persistent=settings.persistent,
            handshake_limit=settings.handshake_limit,
        )

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await server.run(sockets, task_status=task_status)
            nursery.cancel_scope.cancel()

        async def end() -> None:
            await stop.wait()
            trace("server_stopping")
            server.stop()

        nursery.start_soon(end)
        await nursery.start(run)
        trace("server_listening", sockets=len(sockets))
        ready()


@contextlib.asynccontextmanager
async def opened_exports(settings: ServeSettings) -> AsyncIterator[list[NbdExport]]:
    """The exports of `settings`; in the end they are closed, the last first."""
    graph = Graph(Catalog(), ObjectStore.of(settings.objects), untrusted=settings.untrusted)
    async with contextlib.AsyncExitStack() as cleanup:
        exports: list[NbdExport] = []
        for wanted in settings.exports:
            node = await open_export(graph, wanted, warn=_warn)
            try:
                export = await NbdExport.open(
                    wanted.name,
                    node,
                    description=wanted.description,
                    writable=not wanted.read_only,
                    writethrough=wanted.cache.writethrough,
                    multi_conn=settings.shared != 1,
                    allocation_depth=wanted.allocation_depth,
                    bitmaps=wanted.bitmaps,
                )
            except BaseException as error:
                with trio.CancelScope(shield=True):
                    await node.aclose()
                if isinstance(error, InUseError):
                    # For a user this is still a part of opening the image.
                    raise OptionError(f"Failed to blk_new_open '{wanted.image}': {error}") from error
                raise
            cleanup.push_async_callback(_close, export)
            exports.append(export)
            trace("export_opened", name=export.name, image=wanted.image, size=node.size)
        yield exports


async def _close(export: NbdExport) -> None:
    with trio.CancelScope(shield=True):
        await export.aclose()
    trace("export_closed", name=export.name)


def _warn(message: str) -> None:
    print(message, file=sys.stderr)
