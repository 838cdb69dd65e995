"""Serving exports on sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import trio

from drivers.errors import OptionError
from nbdserve.settings import ServeSettings


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
    clients are accepted; it may raise OptionError.
    """
    raise OptionError("serving is not supported yet")
