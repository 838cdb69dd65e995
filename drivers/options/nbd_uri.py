"""Names of NBD exports: URIs (doc/uri.md of the NBD project) and QEMU's older nbd:... forms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from drivers.errors import OptionError
from drivers.net.address import Address, InetAddress, UnixAddress
from drivers.options.schema import Tree

DEFAULT_PORT = "10809"
MAX_EXPORT_NAME = 4096  # bytes of UTF-8

# RFC 3986, appendix B, without the empty scheme; what the parts contain is checked further on.
_URI = re.compile(r"([^:/?#]+)://([^/?#]*)([^?#]*)(?:\?([^#]*))?", re.DOTALL)
_AUTHORITY = re.compile(r"(?:([^@]*)@)?(\[[0-9A-Fa-f:.%A-Za-z_~-]*\]|[^:\[\]@]*)(?::([0-9]*))?")
_SCHEMES = {"nbd": False, "nbds": True}
_TLS_QUERY = {
    "tls-hostname": "tls_hostname",
    "tls-certificates": "tls_certificates",
    "tls-psk-file": "tls_psk_file",
}


@dataclass(frozen=True, slots=True)
class NbdUri:
    """An export and the way to it. With `tls` the connection must be encrypted.

    str() gives a URI that parses to an equal value.
    """

    address: Address
    export: str = ""
    tls: bool = False
    user: str = ""
    tls_hostname: str = ""
    tls_certificates: str = ""
    tls_psk_file: str = ""

    def __post_init__(self) -> None:
        try:
            length = len(self.export.encode())
        except UnicodeEncodeError:
            raise OptionError("the export name is not UTF-8") from None
        if length > MAX_EXPORT_NAME:
            raise OptionError(f"the export name is longer than {MAX_EXPORT_NAME} bytes")
        if "\0" in self.export:
            raise OptionError("an export name cannot contain a zero byte")

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        query = [(key, value) for key, attribute in _TLS_QUERY.items() if (value := getattr(self, attribute))]
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        if isinstance(self.address, UnixAddress):
            scheme += "+unix"
            query.insert(0, ("socket", self.address.path))
            authority = user
        else:
            host = self.address.host
            host = f"[{quote(host, safe=':')}]" if ":" in host else quote(host, safe="")
            port = "" if self.address.port == DEFAULT_PORT else f":{self.address.port}"
            authority = f"{user}{host}{port}"
        parameters = "&".join(f"{key}={quote(value, safe='/')}" for key, value in query)
        return f"{scheme}://{authority}/{quote(self.export, safe='')}" + (parameters and f"?{parameters}")

    def to_options(self) -> Tree:
        """Options of the `nbd` driver. What TLS needs is among them, so that a driver that does
        not know TLS refuses rather than connects in the clear."""
        tree: Tree = {"driver": "nbd", "server": address_options(self.address)}
        if self.export:
            tree["export"] = self.export
        if self.tls:
            tree["tls"] = "on"
        if self.user:
            tree["tls-username"] = self.user
        for key, attribute in _TLS_QUERY.items():
            if value := getattr(self, attribute):
                tree[key] = value
        return tree


def address_options(address: Address) -> Tree:
    """The `server` options that name `address`."""
    if isinstance(address, UnixAddress):
        return {"type": "unix", "path": address.path}
    return {"type": "inet", "host": address.host, "port": address.port}


def parse_nbd_filename(filename: str) -> NbdUri:
    """An NBD URI, nbd:HOST:PORT or nbd:unix:PATH, the latter two with :exportname=E behind them if
    need be. Raises OptionError."""
    scheme, _, rest = filename.partition(":")
    if rest.startswith("//"):
        return parse_nbd_uri(filename)
    if scheme != "nbd":
        raise OptionError(f"'{filename}' is not a valid NBD URI: '//' must follow the scheme")
    server, _, export = rest.partition(":exportname=")
    if not server:
        raise OptionError("NBD server address missing")
    if server.startswith("unix:"):
        return NbdUri(UnixAddress(server.removeprefix("unix:")), export)
    host, colon, port = server.rpartition(":")
    if not colon or not port or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        raise OptionError(f"error parsing address '{server}'")
    return NbdUri(InetAddress(host.removeprefix("[").removesuffix("]"), port), export)


def parse_nbd_uri(text: str) -> NbdUri:
    """An NBD URI. A missing host is localhost, a missing port 10809. Raises OptionError."""
    match = _URI.fullmatch(text)
    if match is None:
        raise _invalid(text, "a fragment ('#') or no '://'")
    written, authority, path, query = match.groups()
    scheme, _, transport = written.lower().partition("+")
    if scheme not in _SCHEMES or transport not in ("", "tcp", "unix"):
        raise _invalid(text, f"the scheme '{written}' is not known")
    parameters = _parameters(text, query or "")
    user, host, port = _authority(text, authority)
    address: Address
    if transport == "unix":
        if host or port:
            raise _invalid(text, "a Unix socket has no host and no port")
        if not parameters.get("socket"):
            raise _invalid(text, "'?socket=PATH' is missing")
        address = UnixAddress(parameters.pop("socket"))
    else:
        address = InetAddress(host or "localhost", port or DEFAULT_PORT)
    for key in parameters:
        if key not in _TLS_QUERY:
            raise _invalid(text, f"the parameter '{key}' is not known here")
    attributes = {_TLS_QUERY[key]: value for key, value in parameters.items()}
    # One slash separates the authority; any more belong to the name.
    export = _decoded(text, path.removeprefix("/"))
    return NbdUri(address, export, tls=_SCHEMES[scheme], user=user, **attributes)


def _authority(text: str, authority: str) -> tuple[str, str, str]:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise _invalid(text, f"'{authority}' is not [USER@]HOST[:PORT]")
    user, host, port = (part or "" for part in match.groups())
    if port and not 0 < int(port[:6]) < 65536:
        raise _invalid(text, f"no port has the number {port}")
    host = host[1:-1] if host.startswith("[") else host
    return _decoded(text, user), _decoded(text, host), port


def _parameters(text: str, query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for item in filter(None, re.split("[&;]", query)):
        key, _, value = item.partition("=")
        key = _decoded(text, key)
        if key in parameters:
            raise _invalid(text, f"the parameter '{key}' comes twice")
        parameters[key] = _decoded(text, value)
    return parameters


def _decoded(text: str, part: str) -> str:
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError:
        raise _invalid(text, f"'{part}' is not UTF-8") from None


def _invalid(text: str, reason: str) -> OptionError:
    return OptionError(f"'{text[:200]}' is not a valid NBD URI: {reason}")
