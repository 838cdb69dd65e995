"""File names that are more than paths: json:{...}, PROTOCOL:..., URIs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import NoReturn

from drivers.errors import OptionError
from drivers.options.nest import MAX_NESTING, Path, nest
from drivers.options.schema import Tree, Value

# Far above any real one; a backing file's name in an image is 1023 bytes at most.
MAX_JSON = 1 << 20

_STRING = re.compile(r'"(?:\\.|[^"\\])*"|' + r"'(?:\\.|[^'\\])*'", re.DOTALL)
_ESCAPE_OR_QUOTE = re.compile(r'\\.|"', re.DOTALL)


def filename_options(filename: str, prefixes: Mapping[str, str]) -> Tree:
    """The options that `filename` stands for: a protocol driver's, or whatever json:{...} says.

    `prefixes` leads from what may stand before the first ':' to the driver that takes such names.
    A name without a prefix is a host file's; that it may turn out to be a block device is the
    caller's business. Raises OptionError.
    """
    if filename.startswith("json:"):
        return parse_json_pseudo(filename)
    prefix = protocol_prefix(filename)
    if prefix is None:
        return _file_options("file", filename)
    driver = prefixes.get(prefix)
    if driver is None:
        raise OptionError(f"Unknown protocol '{prefix}'")
    if driver in ("file", "host_device"):
        return _file_options(driver, filename.removeprefix(f"{prefix}:"))
    if driver == "null-co":
        if filename != f"{prefix}://":
            raise OptionError(f"The only allowed filename for this driver is '{prefix}://'")
        return {"driver": driver}
    if driver == "nbd":
        from drivers.options.nbd_uri import parse_nbd_filename  # not needed to open a file

        return parse_nbd_filename(filename).to_options()
    return {"driver": driver, "filename": filename}


def protocol_prefix(filename: str) -> str | None:
    """What stands before a ':' that comes before any '/', or None: "./a:b" is a plain path."""
    head, colon, _ = filename.partition(":")
    return head if colon and "/" not in head else None


def _file_options(driver: str, path: str) -> Tree:
    if not path:
        raise OptionError(f"The '{driver}' block driver requires a file name")
    return {"driver": driver, "filename": path}


def parse_json_pseudo(filename: str) -> Tree:
    """The tree of a json:{...} file name, dotted keys unfolded. Strings may be in single quotes.

    Raises OptionError.
    """
    try:
        value = parse_json(filename.removeprefix("json:"))
    except OptionError as error:
        raise OptionError(f"Could not parse the JSON options: {error}") from None
    if not isinstance(value, dict):
        raise OptionError("Invalid JSON object given")
    return nest(_leaves(value, ()))


def parse_json(text: str) -> Value:
    """One JSON value. Strings may be in single quotes; no key may come twice. Raises OptionError."""
    if len(text) > MAX_JSON:
        raise OptionError("the text is too long")
    if not text.strip():
        raise OptionError("Expecting a JSON value")
    try:
        value: Value = json.loads(
            _STRING.sub(_double_quoted, text), parse_constant=_no_constant, object_pairs_hook=_object
        )
    except RecursionError:
        raise OptionError("JSON nesting depth limit exceeded") from None
    except ValueError as error:
        reason = str(error) if type(error) is ValueError else _reason(error)
        raise OptionError(f"JSON parse error, {reason}") from None
    return value


def _reason(error: ValueError) -> str:
    assert isinstance(error, json.JSONDecodeError)
    if error.pos >= len(error.doc):
        return "premature EOI"
    return f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos + 1}"


def _double_quoted(match: re.Match[str]) -> str:
    """A string literal as JSON proper writes it."""

    def fixed(part: re.Match[str]) -> str:
        return {"\\'": "'", '"': '\\"'}.get(part[0], part[0])

    return f'"{_ESCAPE_OR_QUOTE.sub(fixed, match[0][1:-1])}"'


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"invalid keyword '{name}'")


def _object(pairs: list[tuple[str, Value]]) -> Tree:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("duplicate key")
    return tree


def _leaves(value: Value, path: Path) -> Iterator[tuple[Path, Value]]:
    """Every leaf with its path, for nest() to put together again; empty sets stay.

    A list's items are numbered, so that {"server": [...]} and {"server.0": ...} are the same.
    """
    if len(path) > MAX_NESTING:
        raise OptionError("Could not parse the JSON options: JSON nesting depth limit exceeded")
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, *key.split(".")))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    elif path:
        yield path, value
