"""Options as key=value,... with dotted keys: --image-opts, --object, --export."""

from __future__ import annotations

import re
from collections.abc import Iterator

from drivers.errors import OptionError
from drivers.options.nest import Path, nest
from drivers.options.schema import Tree

# A part of a key: a name, optionally with a vendor's domain before it, or a list index.
_PART = re.compile(r"(?:__[A-Za-z0-9.-]+_)?[A-Za-z][A-Za-z0-9_-]*|0|[1-9][0-9]*")
MAX_PART = 127


def parse_keyval(text: str, *, implied_key: str | None = None) -> Tree:
    """The tree that `text` describes; every leaf is a string.

    `,,` in a value is a comma. A first value without a key gets `implied_key`. Dotted keys nest,
    numbers in them make lists; of a repeated key the last value holds. One comma may end the text.
    Raises OptionError.
    """
    return nest(_pairs(text, implied_key))


def _pairs(text: str, implied_key: str | None) -> Iterator[tuple[Path, str]]:
    position = 0
    while position < len(text):
        key_end = _find(text, "=,", position)
        if implied_key is not None and text[key_end : key_end + 1] != "=":
            key = implied_key
        else:
            key = text[position:key_end]
            if text[key_end : key_end + 1] != "=":
                raise OptionError(
                    f"Expected '=' after parameter '{key}'" if key else "Parameter name missing"
                )
            position = key_end + 1
        implied_key = None
        path = _path(key)
        value, position = _value(text, position)
        yield path, value


def _find(text: str, characters: str, position: int) -> int:
    """Where the first of `characters` stands, or the end."""
    found = (text.find(character, position) for character in characters)
    return min((index for index in found if index >= 0), default=len(text))


def _value(text: str, position: int) -> tuple[str, int]:
    """The value at `position` and where the next key begins."""
    pieces: list[str] = []
    while True:
        comma = _find(text, ",", position)
        pieces.append(text[position:comma])
        if text[comma : comma + 2] != ",,":
            return "".join(pieces), comma + 1
        pieces.append(",")
        position = comma + 2


def _path(key: str) -> Path:
    parts: list[str] = []
    position = 0
    while True:
        part = _PART.match(key, position)
        end = part.end() if part else position
        # No top-level key is a number: the whole is a set of options.
        if (
            part is None
            or end - position > MAX_PART
            or key[end : end + 1] not in ("", ".")
            or (not parts and part[0].isdigit())
        ):
            shown = key if len(key) <= 200 else key[:200] + "..."
            raise OptionError(f"Invalid parameter '{shown}'")
        parts.append(part[0])
        if end == len(key):
            return tuple(parts)
        position = end + 1
