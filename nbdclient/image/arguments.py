"""What the subcommands' command lines have in common: options by getopt's rules, and numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from drivers.errors import OptionError
from drivers.options.argv import ArgumentParser, Opt, UsageError
from drivers.options.flat import is_option_list
from drivers.units import TooLargeError, parse_size

MAX_INT64 = (1 << 63) - 1

# Options of several subcommands.
CACHE = Opt("cache", "t", takes_value=True, exact=True)
FORCE_SHARE = Opt("force-share", "U")
FORMAT = Opt("format", "f", takes_value=True)
IMAGE_OPTS = Opt("image-opts")
OBJECT = Opt("object", takes_value=True)
OUTPUT = Opt("output", takes_value=True)
PROGRESS = Opt("progress", "p", exact=True)
QUIET = Opt("quiet", "q", exact=True)
SOURCE_CACHE = Opt("source-cache", "T", takes_value=True, exact=True)
# Every subcommand has it.
UNTRUSTED = Opt("untrusted", exact=True)


@dataclass
class Given:
    """The options that were given, the last value of each, and the operands. Options that add up
    (`-o`, `--object`) have all of their values in `lists`."""

    values: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    operands: list[str] = field(default_factory=list)

    def __contains__(self, name: str) -> bool:
        return name in self.values or name in self.lists

    def get(self, name: str) -> str | None:
        return self.values.get(name)

    @property
    def format(self) -> str | None:
        return self.values.get("format")

    @property
    def image_opts(self) -> bool:
        return "image-opts" in self.values

    @property
    def force_share(self) -> bool:
        return "force-share" in self.values

    @property
    def quiet(self) -> bool:
        return "quiet" in self.values

    @property
    def untrusted(self) -> bool:
        return "untrusted" in self.values

    @property
    def objects(self) -> list[str]:
        return self.lists.get("object", [])

    @property
    def options(self) -> str | None:
        """All `-o` as one."""
        given = self.lists.get("options")
        return None if given is None else ",".join(given)

    @property
    def json(self) -> bool:
        """`--output`. Raises OptionError."""
        wanted = self.values.get("output", "human")
        if wanted not in ("human", "json"):
            raise OptionError("--output must be used with human or json as argument.")
        return wanted == "json"

    def one_image(self) -> str:
        if len(self.operands) != 1:
            raise UsageError("Expecting one image file name")
        return self.operands[0]


def parse(command: str, table: Iterable[Opt], arguments: Sequence[str]) -> Given:
    """Answers --help by itself. Raises UsageError."""
    given = Given()
    for name, value in getopt((Opt("help", "h"), UNTRUSTED, *table), arguments, command, given.operands):
        if name == "help":
            from nbdclient.image.__main__ import show_help

            show_help()
            sys.exit(0)
        if name == "options":
            if not is_option_list(value):
                raise OptionError(f"Invalid option list: {value}")
            given.lists.setdefault(name, []).append(value)
        elif name in ("object", "action"):
            given.lists.setdefault(name, []).append(value)
        else:
            given.values[name] = value
    return given


def getopt(
    table: Iterable[Opt], arguments: Sequence[str], program: str, operands: list[str] | None = None
) -> Iterator[tuple[str, str]]:
    """As ArgumentParser, with qemu-img's words for mistakes."""
    parser = ArgumentParser(table, arguments, program=program)
    try:
        yield from parser
    except UsageError as error:
        what = "missing argument for" if error.missing_value else "unrecognized"
        raise UsageError(f"{what} option '{error.argument}'") from None
    if operands is not None:
        operands += parser.operands


def number(name: str, text: str, *, low: int = 0, high: int = MAX_INT64) -> int:
    """A size as the command line gives it. Raises OptionError."""
    from nbdclient.image.__main__ import PROGRAM

    try:
        value = parse_size(text)
    except TooLargeError:
        value = high + 1
    except OptionError:
        raise OptionError(
            f"Invalid {name} specified. You may use k, M, G, T, P or E suffixes for\n"
            f"{PROGRAM}: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ) from None
    if not low <= value <= high:
        raise OptionError(f"Invalid {name} specified. Must be between {low} and {high}.")
    return value
