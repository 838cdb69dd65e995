"""Command lines read by the rules of getopt_long, with glibc's messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from drivers.errors import OptionError


class UsageError(OptionError):
    """The command line itself is wrong: worth a hint at --help.

    `argument` is what getopt's callers take for the culprit, and not always is; `missing_value`: it
    is an option whose value is not there. Both serve programs that word the message themselves.
    """

    def __init__(self, message: str, argument: str = "", *, missing_value: bool = False) -> None:
        super().__init__(message)
        self.argument = argument
        self.missing_value = missing_value


@dataclass(frozen=True, slots=True)
class Opt:
    """One option: `name` is the long form, `letter` the short one if there is any.

    `exact` options cannot be abbreviated, nor make another's abbreviation ambiguous.
    """

    name: str
    letter: str = ""
    takes_value: bool = False
    exact: bool = False


class ArgumentParser:
    """Iterates over a command line's options, as (long name, value), "" where none is taken.

    Operands may stand between options; everything after `--` is one. They are complete once the
    iteration has ended. Because a caller may act on an option before the next one is looked at, a
    mistake further right does not keep --help from being answered.
    """

    def __init__(self, table: Iterable[Opt], arguments: Sequence[str], *, program: str = "") -> None:
        self._long = {option.name: option for option in table}
        self._short = {option.letter: option for option in self._long.values() if option.letter}
        self._rest = list(reversed(arguments))
        self._program = program
        self._before = program  # the argument before the one at hand
        self.operands: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Raises UsageError."""
        argument = self._program
        while self._rest:
            self._before, argument = argument, self._rest.pop()
            if argument == "--":
                self.operands += reversed(self._rest)
                self._rest.clear()
            elif argument.startswith("--"):
                yield self._long_option(argument)
            elif argument.startswith("-") and argument != "-":
                yield from self._cluster(argument[1:])
            else:
                self.operands.append(argument)

    def _long_option(self, argument: str) -> tuple[str, str]:
        written, equals, value = argument[2:].partition("=")
        option = self._find(written, argument)
        if equals and not option.takes_value:
            raise UsageError(f"option '--{option.name}' doesn't allow an argument", argument)
        if option.takes_value and not equals:
            if not self._rest:
                raise UsageError(
                    f"option '--{option.name}' requires an argument", argument, missing_value=True
                )
            value = self._rest.pop()
        return option.name, value

    def _find(self, written: str, argument: str) -> Opt:
        if written in self._long:
            return self._long[written]
        candidates = [
            option for option in self._long.values() if not option.exact and option.name.startswith(written)
        ]
        if not candidates:
            raise UsageError(f"unrecognized option '{argument}'", argument)
        if len(candidates) > 1:
            names = " ".join(f"'--{option.name}'" for option in candidates)
            raise UsageError(f"option '{argument}' is ambiguous; possibilities: {names}", argument)
        return candidates[0]

    def _cluster(self, letters: str) -> Iterator[tuple[str, str]]:
        """Short options behind one dash; the first that takes a value takes all that follows."""
        whole = f"-{letters}"
        while letters:
            letter, letters = letters[0], letters[1:]
            option = self._short.get(letter)
            if option is None:
                # getopt moves on to the next argument with a cluster's last letter only.
                raise UsageError(f"invalid option -- '{letter}'", self._before if letters else whole)
            if not option.takes_value:
                yield option.name, ""
                continue
            if not letters and not self._rest:
                raise UsageError(f"option requires an argument -- '{letter}'", whole, missing_value=True)
            yield option.name, letters or self._rest.pop()
            return
