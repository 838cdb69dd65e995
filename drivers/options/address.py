"""Addresses in option trees: server.type=unix,server.path=... and its older flat forms."""

from __future__ import annotations

from drivers.errors import OptionError
from drivers.net.address import Address, InetAddress, UnixAddress
from drivers.options.schema import Options

DEFAULT_PORT = "10809"


def take_server(options: Options) -> Address:
    """The address in `options`: the set `server`, or flat `path`, or flat `host` with `port`.

    Raises OptionError where there is none, or more than one.
    """
    nested = "server" in options
    path, host = options.string("path", None), options.string("host", None)
    port = options.integer("port", None, high=65535)
    if nested:
        if path or host or port is not None:
            raise OptionError(f"{options.owner}: 'server' and path/host/port cannot be used at the same time")
        server = Options(options.subtree("server"), owner=f"{options.owner}: server")
        address = _typed(server)
        server.finish()
        return address
    if path and host:
        raise OptionError("path and host may not be used at the same time")
    if path:
        if port is not None:
            raise OptionError("port may not be used without host")
        return UnixAddress(path)
    if host:
        return InetAddress(host, DEFAULT_PORT if port is None else str(port))
    raise OptionError("NBD server address missing")


def _typed(server: Options) -> Address:
    if server.choice("type", ("inet", "unix")) == "unix":
        return UnixAddress(server.string("path"))
    return InetAddress(server.string("host"), str(server.integer("port", high=65535)))
