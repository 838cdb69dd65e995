"""The options of an image from what a command line gives: a name and a format, or options."""

from __future__ import annotations

from collections.abc import Mapping

from drivers.errors import OptionError
from drivers.options.nest import MAX_NESTING
from drivers.options.pseudo import filename_options
from drivers.options.schema import Tree, Value


def image_options(filename: str, image_format: str | None, prefixes: Mapping[str, str]) -> Tree:
    """The tree to open `filename` with.

    Without a format, and if the name does not say it, there is no "driver" at the top: the format
    is to be found by probing the node that "file" describes. Raises OptionError.
    """
    tree = filename_options(filename, prefixes)
    if filename.startswith("json:"):
        if image_format is not None:
            tree["driver"] = image_format
        return complete_options(tree, prefixes)
    if image_format is None:
        return {"file": tree}
    if image_format in prefixes.values():
        return {**tree, "driver": image_format}
    return {"driver": image_format, "file": tree}


def complete_options(tree: Mapping[str, Value], prefixes: Mapping[str, str]) -> Tree:
    """`tree` with the protocol driver filled in wherever only a "filename" was given.

    As with image_options(), a missing "driver" at the top asks for probing. Raises OptionError if
    there is nothing to probe.
    """
    if "driver" not in tree and "file" not in tree:
        raise OptionError("Must specify either driver or file")
    return {key: _completed(value, prefixes, 0) for key, value in tree.items()}


def _completed(value: Value, prefixes: Mapping[str, str], depth: int) -> Value:
    if depth > MAX_NESTING:
        raise OptionError("the options are nested too deeply")
    if isinstance(value, list):
        return [_completed(item, prefixes, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tree = {key: _completed(item, prefixes, depth + 1) for key, item in value.items()}
    filename = tree.get("filename")
    if isinstance(filename, str) and "driver" not in tree:
        del tree["filename"]
        tree = {**filename_options(filename, prefixes), **tree}
    return tree


def set_file_default(tree: Tree, key: str, value: Value) -> None:
    """Give the host file at the bottom of the "file" chain the option `key`, unless it has it."""
    node: Value = tree
    while isinstance(node, dict):
        if node.get("driver") in ("file", "host_device"):
            node.setdefault(key, value)
            return
        node = node.get("file")
