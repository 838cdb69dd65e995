"""Dotted keys unfolded into an option tree."""

from __future__ import annotations

from collections.abc import Iterable

from drivers.errors import OptionError
from drivers.options.schema import Tree, Value

# A chain of 200 nodes, each in its parent's `file`, has keys of this many parts and a few more.
MAX_NESTING = 256

Path = tuple[str, ...]


def nest(pairs: Iterable[tuple[Path, Value]]) -> Tree:
    """The tree with each value at its path; where a path comes twice, the last value holds.

    A level whose keys are all numbers is a list: they must be 0, 1, ... without a gap. Dictionaries
    among the values must be empty; fill them by paths. Raises OptionError on a key that would be
    both a value and a set of options, or both a list and a set.
    """
    root: Tree = {}
    for path, value in pairs:
        if len(path) > MAX_NESTING:
            raise OptionError(f"Parameter '{_shown(path)}' is nested too deeply")
        level = root
        for depth, part in enumerate(path[:-1], 1):
            below = level.setdefault(part, {})
            if not isinstance(below, dict):
                raise _inconsistent(path[:depth])
            level = below
        leaf = path[-1]
        if isinstance(level.get(leaf), dict) != isinstance(value, dict) and leaf in level:
            raise _inconsistent(path)
        if not isinstance(value, dict) or leaf not in level:
            level[leaf] = value
    return {key: _listed(value, (key,)) for key, value in root.items()}


def _listed(value: Value, path: Path) -> Value:
    """`value` with every level of numeric keys made a list."""
    if not isinstance(value, dict):
        return value
    below = {key: _listed(item, (*path, key)) for key, item in value.items()}
    numeric = [key.isascii() and key.isdigit() for key in below]
    if not any(numeric):
        return below
    if not all(numeric):
        raise _inconsistent(path)
    for index in range(len(below)):
        if str(index) not in below:
            raise OptionError(f"Parameter '{_shown((*path, str(index)))}' missing")
    return [below[str(index)] for index in range(len(below))]


def _inconsistent(path: Path) -> OptionError:
    return OptionError(f"Parameters '{_shown(path)}.*' used inconsistently")


def _shown(path: Path) -> str:
    """A path for a message, which a hostile one must not flood."""
    text = ".".join(path)
    return text if len(text) <= 200 else text[:200] + "..."
