"""Opening an image as a user names it: by a file name, or by options that may leave the format out."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping

import trio

from drivers.block.graph import Graph, inherited_flags
from drivers.block.node import Node, OpenFlags
from drivers.block.probe import PROBE_SIZE, probe
from drivers.errors import OptionError
from drivers.options.image import image_options
from drivers.options.schema import Tree, Value


async def open_image(
    graph: Graph,
    filename: str,
    image_format: str | None = None,
    flags: OpenFlags | None = None,
    *,
    warn: Callable[[str], object],
) -> Node:
    """Open the image that `filename` names, as `image_format` or as what its first bytes say.

    `warn` is given the lines that a person must see. Raises OptionError or ImageError.
    """
    return await open_options(graph, image_tree(graph, filename, image_format), flags, warn=warn)


def image_tree(graph: Graph, filename: str, image_format: str | None) -> Tree:
    """The options to open `filename` with, without "driver" where the format is to be probed."""
    tree = image_options(filename, image_format, graph.catalog.prefixes())
    _recognise_device(tree)
    return tree


async def open_options(
    graph: Graph,
    tree: Mapping[str, Value],
    flags: OpenFlags | None = None,
    *,
    warn: Callable[[str], object],
    depth: int = 0,
) -> Node:
    """Open the node that `tree` describes. Without a "driver" at its top the format is found by
    probing the node that "file" describes or names.
    """
    flags = flags or OpenFlags()
    if "driver" in tree:
        return await graph.open(tree, flags, depth=depth)
    reference = tree.get("file")
    if isinstance(reference, str):
        protocol = graph.node(reference)
    elif isinstance(reference, dict):
        protocol = await graph.open(reference, inherited_flags(flags), depth=depth + 1)
    else:
        raise OptionError("Must specify either driver or file")
    try:
        image_format = await _probe(protocol)
        tree = {**tree, "driver": image_format, "file": protocol.name}
        node = await graph.open(tree, flags, probed=True, depth=depth)
    except BaseException:
        with trio.CancelScope(shield=True):
            if not protocol.parents:
                await protocol.aclose()
        raise
    if image_format == "raw" and not node.flags.read_only:
        warn(
            f"WARNING: Image format was not specified for '{getattr(protocol, 'filename', protocol.name)}' "
            "and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, "
            "write operations on block 0 will be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions."
        )
    return node


async def _probe(protocol: Node) -> str:
    head = bytearray(min(PROBE_SIZE, protocol.size))
    try:
        await protocol.read_into(0, head)
    except OSError as error:
        raise OptionError(f"Could not read image for determining its format: {error.strerror}") from None
    return probe(bytes(head))


def _recognise_device(tree: Tree) -> None:
    """A plain name that turns out to be a block device's is opened as one."""
    file = tree.get("file")
    if not isinstance(file, dict) or file.get("driver") != "file":
        return
    with contextlib.suppress(OSError, ValueError):  # opening it will tell what is wrong with it
        if stat.S_ISBLK(os.stat(str(file["filename"])).st_mode):
            file["driver"] = "host_device"
