"""Use any NBD server from Python.

    async with nbdclient.connect("nbd://localhost/disk") as disk:
        data = await disk.read(0, 4096)

`nbdclient.sync` is the same for code that blocks. Names are imported when first used, so that the
command line starts quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivers.errors import Error, OptionError, ProtocolError, RequestError
    from drivers.wire.nbd.client_handshake import Export, ListedExport
    from nbdclient import sync
    from nbdclient.client import Disk, Extent, connect, describe_exports, info, list_exports

__all__ = [
    "Disk",
    "Error",
    "Export",
    "Extent",
    "ListedExport",
    "OptionError",
    "ProtocolError",
    "RequestError",
    "connect",
    "describe_exports",
    "info",
    "list_exports",
    "sync",
]

_HOMES = {
    "Error": "drivers.errors",
    "OptionError": "drivers.errors",
    "ProtocolError": "drivers.errors",
    "RequestError": "drivers.errors",
    "Export": "drivers.wire.nbd.client_handshake",
    "ListedExport": "drivers.wire.nbd.client_handshake",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'nbdclient' has no attribute '{name}'")
    if name == "sync":
        return importlib.import_module("nbdclient.sync")
    return getattr(importlib.import_module(_HOMES.get(name, "nbdclient.client")), name)
