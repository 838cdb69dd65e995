"""From an export's settings to an open node."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import replace

import trio

from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.errors import Error, OptionError
from drivers.filter.pad import SECTOR, PadNode
from drivers.opening import open_options
from drivers.options.image import complete_options, image_options, set_file_default
from drivers.options.schema import Tree
from nbdserve.settings import ExportSettings


async def open_image(
    graph: Graph, catalog: Catalog, export: ExportSettings, *, warn: Callable[[str], object]
) -> Node:
    """Open what `export` describes. `warn` is given the lines that a person must see.

    Raises OptionError with the image's name in it; nothing stays open then.
    """
    flags = OpenFlags(
        read_only=export.read_only,
        direct=export.cache.direct,
        no_flush=export.cache.no_flush,
        discard=export.discard,
        detect_zeroes=export.detect_zeroes,
    )
    try:
        if export.snapshot:
            raise OptionError("temporary snapshots are not supported yet")
        node = await open_options(graph, image_tree(catalog, export), flags, warn=warn)
    except (Error, OSError) as error:
        reason = error if isinstance(error, Error) else error.strerror
        raise OptionError(f"Failed to blk_new_open '{export.image}': {reason}") from error
    try:
        if export.offset:
            layer: Tree = {"driver": "raw", "offset": export.offset, "file": node.name}
            node = await graph.open(layer, replace(flags, detect_zeroes="off"))
        if node.size % SECTOR:
            node = await PadNode.over(node)
    except BaseException:
        with trio.CancelScope(shield=True):
            await node.aclose()
        raise
    return node


def image_tree(catalog: Catalog, export: ExportSettings) -> Tree:
    """The options to open, without "driver" where the format is to be probed. Raises OptionError."""
    prefixes = {prefix: name for name, row in catalog.rows.items() for prefix in row.prefixes}
    if export.options is not None:
        tree = complete_options(export.options, prefixes)
    else:
        tree = image_options(export.image, export.image_format, prefixes)
        _recognise_device(tree)
    if export.aio is not None:
        set_file_default(tree, "aio", export.aio)
    return tree


def _recognise_device(tree: Tree) -> None:
    """A plain name that turns out to be a block device's is opened as one."""
    file = tree.get("file")
    if not isinstance(file, dict) or file.get("driver") != "file":
        return
    with contextlib.suppress(OSError, ValueError):  # opening it will tell what is wrong with it
        if stat.S_ISBLK(os.stat(str(file["filename"])).st_mode):
            file["driver"] = "host_device"
