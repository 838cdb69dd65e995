"""Options as `-o` takes them: a=b,c=d without nesting; a name alone switches on, "noNAME" off."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from drivers.errors import OptionError


def is_option_list(text: str) -> bool:
    """Whether several texts like this one can be joined with commas: it neither is empty nor begins
    with a comma nor ends with one that is not doubled."""
    trailing = len(text) - len(text.rstrip(","))
    return bool(text) and not text.startswith(",") and trailing % 2 == 0


def wants_help(text: str) -> bool:
    return any(name in ("help", "?") for name, _ in parse_flat(text))


def parse_flat(
    text: str, *, implied_name: str | None = None, warn: Callable[[str], object] | None = None
) -> Iterator[tuple[str, str]]:
    """(name, value) in the order written. `,,` in a value is a comma. A first value without a name
    gets `implied_name`. `warn` is told, if given, of names that stand alone."""
    position = 0
    if implied_name is not None and "=" not in text.partition(",")[0]:
        value, position = _value(text, 0)
        yield implied_name, value
    while position < len(text):
        ends = [at for at in (text.find("=", position), text.find(",", position)) if at >= 0]
        stop = min(ends, default=len(text))
        name = text[position:stop]
        if text[stop : stop + 1] == "=":
            value, position = _value(text, stop + 1)
        else:
            position = stop + 1
            written = name
            name, value = (name[2:], "off") if name.startswith("no") else (name, "on")
            if warn is not None and written not in ("help", "?"):
                warn(f"short-form boolean option '{written}' deprecated\nPlease use {name}={value} instead")
            if written in ("help", "?"):
                name = written
        yield name, value


def _value(text: str, position: int) -> tuple[str, int]:
    """The value at `position`, and where the next name begins."""
    pieces: list[str] = []
    while True:
        comma = text.find(",", position)
        if comma < 0:
            return "".join((*pieces, text[position:])), len(text)
        pieces.append(text[position:comma])
        if text[comma + 1 : comma + 2] != ",":
            return "".join(pieces), comma + 1
        pieces.append(",")
        position = comma + 2


def refuse_size(name: str) -> OptionError:
    return OptionError(
        f"Parameter '{name}' expects a non-negative number below 2^64\n"
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
        "and exabytes, respectively."
    )
