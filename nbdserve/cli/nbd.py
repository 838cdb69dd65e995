"""The command line of nbdserve: qemu-nbd's, and a few options of our own.

Nothing here imports what serving needs, so that --help, --version and mistakes are answered at once.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from drivers.errors import OptionError
from drivers.net.address import Address, InetAddress, UnixAddress, parse_port
from drivers.objects.argument import HelpWanted, parse_object
from drivers.options.argv import ArgumentParser, Opt
from drivers.options.keyval import parse_keyval
from drivers.options.schema import Tree
from drivers.units import parse_number
from nbdserve.activation import take_inherited
from nbdserve.settings import (
    CacheMode,
    ExportSettings,
    ListSettings,
    ServeSettings,
    SnapshotChoice,
    TraceSettings,
)

MAX_STRING = 4096  # bytes of an export's name or description, by the protocol
DEFAULT_BIND = "0.0.0.0"
DEFAULT_PORT = "10809"

# In the order of QEMU's own table, which is the order in which ambiguous ones are listed.
TABLE = (
    Opt("help", "h"),
    Opt("version", "V"),
    Opt("bind", "b", takes_value=True),
    Opt("port", "p", takes_value=True),
    Opt("socket", "k", takes_value=True),
    Opt("offset", "o", takes_value=True),
    Opt("read-only", "r"),
    Opt("allocation-depth", "A"),
    Opt("bitmap", "B", takes_value=True),
    Opt("connect", "c", takes_value=True),
    Opt("disconnect", "d"),
    Opt("list", "L"),
    Opt("snapshot", "s"),
    Opt("load-snapshot", "l", takes_value=True),
    Opt("nocache", "n"),
    Opt("cache", takes_value=True),
    Opt("aio", takes_value=True),
    Opt("discard", takes_value=True),
    Opt("detect-zeroes", takes_value=True),
    Opt("shared", "e", takes_value=True),
    Opt("format", "f", takes_value=True),
    Opt("persistent", "t"),
    Opt("verbose", "v"),
    Opt("object", takes_value=True),
    Opt("export-name", "x", takes_value=True),
    Opt("description", "D", takes_value=True),
    Opt("tls-creds", takes_value=True),
    Opt("tls-hostname", takes_value=True),
    Opt("tls-authz", takes_value=True),
    Opt("image-opts"),
    Opt("trace", "T", takes_value=True),
    Opt("fork"),
    Opt("pid-file", takes_value=True),
    Opt("selinux-label", takes_value=True),
    Opt("handshake-limit", takes_value=True),
    # Ours. They are exact, so that qemu-nbd's abbreviations keep their meaning.
    Opt("export", takes_value=True, exact=True),
    Opt("run", takes_value=True, exact=True),
    Opt("json", exact=True),
    Opt("untrusted", exact=True),
    # Gone from qemu-nbd since 5.0; known here to say where it went.
    Opt("partition", "P", takes_value=True, exact=True),
)

# Options that are read and checked for clashes, but whose work is still to be done.
NOT_YET = {
    "connect": "binding a kernel NBD device",
    "disconnect": "disconnecting a kernel NBD device",
    "tls-creds": "TLS",
}

_CACHE_MODES = {
    "none": CacheMode(direct=True),
    "off": CacheMode(direct=True),
    "writeback": CacheMode(),
    "writethrough": CacheMode(writethrough=True),
    "directsync": CacheMode(direct=True, writethrough=True),
    "unsafe": CacheMode(no_flush=True),
}
_DISCARD_MODES = {"ignore": False, "off": False, "unmap": True, "on": True}
# What says something of FILE and not of other exports.
_OF_FILE = {"export-name", "description", "offset", "format", "bitmap", "load-snapshot"}
# What describes FILE, and so has no place where another server's exports are listed.
_PER_DEVICE = {
    *("export-name", "description", "offset", "format", "allocation-depth", "bitmap", "load-snapshot"),
    *("connect", "disconnect", "aio", "discard", "cache", "export", "untrusted"),
}


class ArgumentCountError(OptionError):
    """Too many or too few operands."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A question was asked, not a server: `topic` is "help", "version", "trace" or "object"; that one
    may be about one type of objects."""

    topic: str
    about: str = ""


@dataclass(slots=True)
class _Given:
    """The options as they come in. `seen` are the long names of all of them."""

    seen: set[str] = field(default_factory=set)
    base: ExportSettings = field(default_factory=lambda: ExportSettings(image=""))
    image_opts: bool = False
    more_exports: list[tuple[str, str]] = field(default_factory=list)
    bind: str | None = None
    port: str | None = None
    socket: str | None = None
    trace: TraceSettings = field(default_factory=TraceSettings)
    objects: list[Tree] = field(default_factory=list)
    # Goes into ServeSettings under the same names.
    plain: dict[str, str | int | bool] = field(default_factory=dict)


def parse(
    arguments: Sequence[str], environ: MutableMapping[str, str]
) -> ServeSettings | ListSettings | Answer:
    """What `arguments` (without the program's name) ask for. Sockets that `environ` tells to have
    been inherited are taken from it.

    Raises UsageError, ArgumentCountError or another OptionError, in the order qemu-nbd would.
    """
    parser = ArgumentParser(TABLE, arguments)
    given = _Given()
    for name, value in parser:
        if name in ("help", "version"):
            return Answer(name)
        if name == "trace" and value in ("help", "?", "enable=help"):
            return Answer("trace")
        if name == "object":
            wanted = parse_object(value)
            if isinstance(wanted, HelpWanted):
                return Answer("object", wanted.type_name)
            given.objects.append(wanted)
        _take(given, name, value)
        given.seen.add(name)
    _check_clashes(given, parser.operands)
    inherited = _check_inherited(given, take_inherited(environ))
    _check_permitted(given)
    if "list" in given.seen:
        return ListSettings(
            _address(given),
            json="json" in given.seen,
            verbose="verbose" in given.seen,
            trace=given.trace,
            objects=tuple(given.objects),
        )
    private = given.socket == "-" or ("run" in given.seen and not given.seen & {"socket", "bind", "port"})
    return ServeSettings(
        exports=_exports(given, parser.operands),
        address=None if inherited or private else _address(given),
        inherited=inherited,
        persistent=bool(given.seen & {"persistent", "run"}),
        fork="fork" in given.seen,
        verbose="verbose" in given.seen,
        trace=given.trace,
        objects=tuple(given.objects),
        **given.plain,  # type: ignore[arg-type]
    )


# --- one option at a time -------------------------------------------------------------------


def _take(given: _Given, name: str, value: str) -> None:
    match name:
        case "bind":
            given.bind = value
        case "port":
            given.port = parse_port(value)
        case "socket":
            if not value.startswith("/") and value != "-":
                raise OptionError("socket path must be absolute")
            given.socket = value
        case "image-opts":
            given.image_opts = True
        case "export":
            given.more_exports.append(_named_export(value))
        case "shared":
            given.plain["shared"] = _number(value, "Invalid shared device number", (1 << 31) - 1)
        case "handshake-limit":
            given.plain["handshake_limit"] = _number(value, "Invalid handshake limit", (1 << 32) - 1)
        case "pid-file":
            given.plain["pid_file"] = value
        case "run":
            given.plain["run_command"] = value
        case "selinux-label":
            given.plain["selinux_label"] = value
        case "untrusted":
            given.plain["untrusted"] = True
        case "trace":
            given.trace = _trace(given.trace, value)
        case "partition":
            raise OptionError(
                "--partition is no longer there; choose a part of the image with"
                " --image-opts driver=raw,offset=OFFSET,size=SIZE,file.filename=FILE"
            )
        case _:
            given.base = _describe(given.base, name, value, given.seen)


def _describe(export: ExportSettings, name: str, value: str, seen: set[str]) -> ExportSettings:
    """`export` with an option applied that describes what is exported; others change nothing."""
    match name:
        case "format":
            return replace(export, image_format=value)
        case "read-only":
            return replace(export, read_only=True)
        case "snapshot":
            return replace(export, snapshot=True)
        case "allocation-depth":
            return replace(export, allocation_depth=True)
        case "bitmap":
            return replace(export, bitmaps=(*export.bitmaps, value))
        case "load-snapshot":
            return replace(export, internal_snapshot=_snapshot(value))
        case "offset":
            return replace(export, offset=_number(value, "Invalid offset", (1 << 64) - 1))
        case "export-name":
            return replace(export, name=_string(value, "export name"))
        case "description":
            return replace(export, description=_string(value, "export description"))
        case "nocache" | "cache":
            if seen & {"nocache", "cache"}:
                raise OptionError("-n and --cache can only be specified once")
            seen.add("cache")
            mode = _CACHE_MODES.get("none" if name == "nocache" else value)
            if mode is None:
                raise OptionError(f"Invalid cache mode `{value}'")
            return replace(export, cache=mode)
        case "aio":
            _once(name, seen)
            if value not in ("threads", "native", "io_uring"):
                raise OptionError(f"Invalid aio mode '{value}'")
            return replace(export, aio=cast("Literal['threads', 'native', 'io_uring']", value))
        case "discard":
            _once(name, seen)
            if value not in _DISCARD_MODES:
                raise OptionError(f"Invalid discard mode `{value}'")
            return replace(export, discard=_DISCARD_MODES[value])
        case "detect-zeroes":
            if value not in ("off", "on", "unmap"):
                raise OptionError(f"Failed to parse detect_zeroes mode: invalid parameter value: {value}")
            return replace(export, detect_zeroes=cast("Literal['off', 'on', 'unmap']", value))
    return export


def _once(name: str, seen: set[str]) -> None:
    if name in seen:
        raise OptionError(f"--{name} can only be specified once")


def _number(value: str, message: str, high: int) -> int:
    number = parse_number(value, high=high)
    if number is None:
        raise OptionError(f"{message} '{value}'")
    return number


def _string(value: str, what: str) -> str:
    if len(os.fsencode(value)) > MAX_STRING:
        raise OptionError(f"{what} '{value}' too long")
    return value


def _named_export(value: str) -> tuple[str, str]:
    name, equals, image = value.partition("=")
    if not equals or not image:
        raise OptionError(
            f"--export wants NAME=IMAGE-OPTS, not '{value}'; a name for FILE is set by --export-name"
        )
    return _string(name, "export name"), image


def _snapshot(value: str) -> SnapshotChoice:
    """snapshot.id=ID, snapshot.name=NAME or both; anything else is an id or a name."""
    if not value.startswith("snapshot."):
        return SnapshotChoice(either=value)
    options = parse_keyval(value)
    given = options.pop("snapshot")
    if options or not isinstance(given, dict) or not given.keys() <= {"id", "name"}:
        raise OptionError(f"Failed in parsing snapshot param `{value}'")
    return SnapshotChoice(**cast("dict[str, str]", given))


def _trace(before: TraceSettings, value: str) -> TraceSettings:
    """One -T added to those before it."""
    options = parse_keyval(value, implied_key="enable")
    for key in options:
        if key not in ("enable", "events", "file"):
            raise OptionError(f"Invalid parameter '{key}'")
    added = [str(options["enable"])] if "enable" in options else []
    if "events" in options:
        path = str(options["events"])
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise OptionError(f"{path}: {reason}") from None
        added += [line for line in lines if line and not line.startswith("#")]
    file_name = str(options["file"]) if "file" in options else before.file
    return TraceSettings((*before.patterns, *added), file_name)


# --- all of them together -------------------------------------------------------------------


def _check_clashes(given: _Given, operands: list[str]) -> None:
    seen = given.seen
    if given.base.detect_zeroes == "unmap" and not given.base.discard:
        raise OptionError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
        )
    if "list" in seen:
        if operands:
            raise OptionError("List mode is incompatible with a file name")
        if seen & _PER_DEVICE:
            raise OptionError("List mode is incompatible with per-device settings")
        if "fork" in seen:
            raise OptionError("List mode is incompatible with forking")
        if "run" in seen:
            raise OptionError("List mode is incompatible with running a command")
        if given.socket == "-":
            raise OptionError("List mode needs a server's own socket, not a private one")
        return
    if len(operands) != 1 and (operands or not given.more_exports):
        raise ArgumentCountError("Invalid number of arguments")
    if "json" in seen:
        raise OptionError("--json is only supported with --list")
    if "fork" in seen and "run" in seen:
        raise OptionError("--fork and --run are mutually exclusive")
    if "fork" in seen and given.socket == "-":
        raise OptionError("--fork and a private socket (-k -) are mutually exclusive")


def _check_inherited(given: _Given, inherited: tuple[int, ...]) -> tuple[int, ...]:
    """The socket handed over by the process that started this one, if nothing speaks against it."""
    if not inherited:
        return ()
    if "connect" in given.seen:
        raise OptionError("NBD device can't be set when using socket activation")
    if given.socket is not None:
        raise OptionError("Unix socket can't be set when using socket activation")
    if given.bind is not None:
        raise OptionError("The interface can't be set when using socket activation")
    if given.port is not None:
        raise OptionError("TCP port number can't be set when using socket activation")
    if "selinux-label" in given.seen:
        raise OptionError("SELinux label can't be set when using socket activation")
    if "list" in given.seen:
        raise OptionError("List mode is incompatible with socket activation")
    if len(inherited) > 1:
        raise OptionError("nbdserve does not support socket activation with LISTEN_FDS > 1")
    return inherited


def _check_permitted(given: _Given) -> None:
    """Options that need another one, and those that do not work yet."""
    seen = given.seen
    if "tls-creds" not in seen:
        for name in ("tls-authz", "tls-hostname"):
            if name in seen:
                raise OptionError(f"--{name} is not permitted without --tls-creds")
    elif "connect" in seen:
        raise OptionError("TLS is not supported with a host device")
    elif "tls-authz" in seen and "list" in seen:
        raise OptionError("TLS authorization is incompatible with export list")
    elif "tls-hostname" in seen and "list" not in seen:
        raise OptionError("TLS hostname is only supported with export list")
    if "selinux-label" in seen and given.socket is None and "connect" not in seen:
        raise OptionError("--selinux-label is not permitted without --socket")
    for name, work in NOT_YET.items():
        if name in seen:
            raise OptionError(f"--{name}: {work} is not supported yet")


def _address(given: _Given) -> Address:
    if given.socket is not None:
        return UnixAddress(given.socket)
    host = DEFAULT_BIND if given.bind is None else given.bind
    return InetAddress(host, DEFAULT_PORT if given.port is None else given.port)


def _exports(given: _Given, operands: list[str]) -> tuple[ExportSettings, ...]:
    exports: list[ExportSettings] = []
    if operands:
        if given.image_opts and given.base.image_format is not None:
            raise OptionError("--image-opts and -f are mutually exclusive")
        options = parse_keyval(operands[0], implied_key="file") if given.image_opts else None
        # A snapshot cannot be written to.
        read_only = given.base.read_only or given.base.internal_snapshot is not None
        exports.append(replace(given.base, image=operands[0], options=options, read_only=read_only))
    elif misplaced := given.seen & _OF_FILE:
        raise OptionError(f"--{min(misplaced)} describes FILE, which is missing")
    others = replace(
        given.base, description="", offset=0, image_format=None, bitmaps=(), internal_snapshot=None
    )
    for name, image in given.more_exports:
        if any(name == export.name for export in exports):
            raise OptionError(f"the export name '{name}' is used twice")
        options = parse_keyval(image, implied_key="file")
        exports.append(replace(others, image=image, options=options, name=name))
    return tuple(exports)
