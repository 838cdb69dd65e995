"""The command line of `nbdclient`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from drivers.errors import OptionError
from drivers.units import parse_size

MAX_REQUEST_SIZE = 32 << 20
MAX_REQUESTS = 1024


def parser() -> argparse.ArgumentParser:
    """`module` names the subcommand's module in this package."""
    whole = argparse.ArgumentParser(prog="nbdclient", description="Look at and use any NBD server.")
    whole.add_argument("-V", "--version", action=_Version, help="show the version and exit")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _listing(commands)
    _info(commands)
    _map(commands)
    _copy(commands)
    _dump(commands)
    return whole


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Exits by itself for help and for what it does not understand."""
    whole = parser()
    arguments = whole.parse_args(argv)
    if arguments.module == "map" and arguments.uri is None:
        # In `map --plot URI` the URI was taken for the file to draw into.
        if arguments.plot is None or ":" not in arguments.plot:
            whole.error("map: the following arguments are required: URI")
        arguments.uri, arguments.plot = arguments.plot, "-"
    return arguments


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes as long as all the rest."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        version = import_module("importlib.metadata").version("nbdserve")
        print(f"nbdclient {version}")
        parser.exit()


def _command(commands: Any, name: str, text: str, *, module: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(module=module, command=name)
    return command


def _listing(commands: Any) -> None:
    command = _command(commands, "list", "List the exports of a server.", module="describe")
    command.add_argument("uri", metavar="URI", help="nbd://HOST[:PORT] or nbd+unix:///?socket=PATH")
    command.add_argument("--json", action="store_true", help="print JSON")


def _info(commands: Any) -> None:
    command = _command(
        commands, "info", "Show what a server tells about an export, without using it.", module="describe"
    )
    command.add_argument("uri", metavar="URI")
    command.add_argument("--json", action="store_true", help="print JSON")


def _map(commands: Any) -> None:
    command = _command(commands, "map", "Show which parts of an export hold data.", module="map")
    command.add_argument("uri", metavar="URI", nargs="?")
    command.add_argument(
        "--context", default="base:allocation", metavar="NAME", help="the metadata context (base:allocation)"
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--totals", action="store_true", help="add up the lengths of each kind")
    form.add_argument(
        "--plot",
        nargs="?",
        const="-",
        metavar="FILE",
        help="draw the disk as a coloured bar: here, or into FILE.svg or FILE.png",
    )


def _copy(commands: Any) -> None:
    command = _command(
        commands,
        "copy",
        "Copy a disk. SRC and DST are NBD URIs, files, block devices or '-'; DST may be 'null:'.",
        module="copy",
    )
    command.add_argument("source", metavar="SRC")
    command.add_argument("target", metavar="DST")
    command.add_argument("--allocated", action="store_true", help="give zeroes storage in DST, too")
    command.add_argument(
        "--destination-is-zero", action="store_true", help="trust that DST reads as zeroes; skip them"
    )
    command.add_argument("--flush", action="store_true", help="make everything durable before the end")
    command.add_argument(
        "--connections", type=_count(64), default=4, metavar="N", help="at most so many per server (4)"
    )
    command.add_argument(
        "--requests", type=_count(MAX_REQUESTS), default=4, metavar="N", help="in flight together (4)"
    )
    command.add_argument(
        "--request-size", type=_request_size, default=1 << 20, metavar="SIZE", help="of one (1M)"
    )
    progress = command.add_mutually_exclusive_group()
    progress.add_argument("--progress", action="store_true", help="show progress even off a terminal")
    progress.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _dump(commands: Any) -> None:
    command = _command(commands, "dump", "Print bytes of an export in hexadecimal.", module="dump")
    command.add_argument("uri", metavar="URI")
    command.add_argument("--offset", type=_size, default=0, metavar="SIZE", help="where to begin (0)")
    command.add_argument("--length", type=_size, metavar="SIZE", help="how much (to the end)")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _request_size(text: str) -> int:
    size = _size(text)
    if not 512 <= size <= MAX_REQUEST_SIZE:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 512 bytes and 32M")
    return size


def _count(limit: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text[:9]) <= limit:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 to {limit}")
        return int(text)

    return count
