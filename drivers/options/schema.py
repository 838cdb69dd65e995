"""Reading one node's (or object's) options out of the option tree, with types and clear refusals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias, TypeVar, overload

from drivers.errors import OptionError
from drivers.units import parse_size

# The option tree: what JSON can say. From the command line every leaf is a string.
Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value] | None"
Tree: TypeAlias = dict[str, Value]
T = TypeVar("T")

_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")


class Options:
    """Takes options one by one; finish() refuses what nobody took.

    `owner` begins the messages, as "Block driver 'file'". Typed JSON values and strings are both
    understood. A missing option gives its default; without a default it is an OptionError.
    """

    def __init__(self, tree: Mapping[str, Value], *, owner: str) -> None:
        self._tree = dict(tree)
        self.owner = owner

    def __contains__(self, key: str) -> bool:
        return key in self._tree

    def _take(self, key: str, required: bool) -> Value:
        value = self._tree.pop(key, None)
        if value is None and required:
            raise OptionError(f"{self.owner}: the option '{key}' is missing")
        return value

    def _wrong(self, key: str, value: Value, expected: str) -> OptionError:
        return OptionError(f"{self.owner}: option '{key}' expects {expected}, not '{value}'")

    @overload
    def string(self, key: str) -> str: ...
    @overload
    def string(self, key: str, default: T) -> str | T: ...
    def string(self, key: str, default: object = ...) -> object:
        value = self._take(key, default is ...)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    @overload
    def boolean(self, key: str) -> bool: ...
    @overload
    def boolean(self, key: str, default: T) -> bool | T: ...
    def boolean(self, key: str, default: object = ...) -> object:
        value = self._take(key, default is ...)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value in _TRUE:
            return True
        if isinstance(value, str) and value in _FALSE:
            return False
        raise self._wrong(key, value, "'on' or 'off'")

    @overload
    def size(self, key: str) -> int: ...
    @overload
    def size(self, key: str, default: T) -> int | T: ...
    def size(self, key: str, default: object = ...) -> object:
        """Bytes."""
        value = self._take(key, default is ...)
        if value is None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if isinstance(value, str):
            try:
                return parse_size(value)
            except OptionError as error:
                raise OptionError(f"{self.owner}: option '{key}': {error}") from None
        raise self._wrong(key, value, "a size")

    @overload
    def integer(self, key: str, *, low: int = ..., high: int = ...) -> int: ...
    @overload
    def integer(self, key: str, default: T, *, low: int = ..., high: int = ...) -> int | T: ...
    def integer(self, key: str, default: object = ..., *, low: int = 0, high: int = (1 << 63) - 1) -> object:
        value = self._take(key, default is ...)
        if value is None:
            return default
        try:
            number = int(value, 0) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise self._wrong(key, value, f"a whole number from {low} to {high}")
        return number

    @overload
    def choice(self, key: str, values: Iterable[str]) -> str: ...
    @overload
    def choice(self, key: str, values: Iterable[str], default: T) -> str | T: ...
    def choice(self, key: str, values: Iterable[str], default: object = ...) -> object:
        value = self._take(key, default is ...)
        if value is None:
            return default
        allowed = tuple(values)
        if value not in allowed:
            raise self._wrong(key, value, "one of " + ", ".join(allowed))
        return value

    def subtree(self, key: str) -> Tree:
        """A nested set of options; empty where there is none."""
        value = self._take(key, required=False)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "a set of options")
        return value

    def reference(self, key: str) -> Tree | str | None:
        """A child: the options to open it with, or the name of a node that is open already."""
        value = self._take(key, required=False)
        if value is None or isinstance(value, (str, dict)):
            return value
        raise self._wrong(key, value, "a node name or a set of options")

    def left(self) -> str | None:
        """An option that nobody took, named with its full path."""
        for key, value in self._tree.items():
            while isinstance(value, dict) and value:
                below, value = next(iter(value.items()))
                key = f"{key}.{below}"
            return key
        return None

    def finish(self) -> None:
        """Raise OptionError if an option is left that nobody knew."""
        if key := self.left():
            raise OptionError(f"{self.owner} does not support the option '{key}'")
