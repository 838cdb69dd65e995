"""From an export's settings to an open node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import trio

from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.block.probe import PROBE_SIZE, probe
from drivers.catalog import Catalog
from drivers.errors import Error, OptionError
from drivers.options.image import complete_options, image_options, set_file_default
from drivers.options.schema import Tree
from nbdserve.settings import ExportSettings


async def open_image(
    graph: Graph, catalog: Catalog, export: ExportSettings, *, warn: Callable[[str], object]
) -> Node:
    """Open what `export` describes. Raises OptionError with the image's name in it; nothing stays
    open then."""
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
        tree = image_tree(catalog, export)
        if "driver" in tree:
            node = await graph.open(tree, flags)
        else:
            node = await _open_probed(graph, tree, flags, export, warn)
    except (Error, OSError) as error:
        reason = error if isinstance(error, Error) else error.strerror
        raise OptionError(f"Failed to blk_new_open '{export.image}': {reason}") from error
    if not export.offset:
        return node
    layer: Tree = {"driver": "raw", "offset": export.offset, "file": node.name}
    return await _open_on(graph, node, layer, replace(flags, detect_zeroes="off"))


def image_tree(catalog: Catalog, export: ExportSettings) -> Tree:
    """The options to open, without "driver" where the format is to be probed. Raises OptionError."""
    prefixes = {prefix: name for name, row in catalog.rows.items() for prefix in row.prefixes}
    if export.options is None:
        tree = image_options(export.image, export.image_format, prefixes)
    else:
        tree = complete_options(export.options, prefixes)
    if export.aio is not None:
        set_file_default(tree, "aio", export.aio)
    return tree


async def _open_probed(
    graph: Graph, tree: Tree, flags: OpenFlags, export: ExportSettings, warn: Callable[[str], object]
) -> Node:
    file = tree["file"]
    if isinstance(file, str):
        below = graph.node(file)
    elif isinstance(file, dict):
        below = await graph.open(file, replace(flags, detect_zeroes="off", discard=True))
    else:
        raise OptionError("the option 'file' expects a node name or a set of options")
    head = bytearray(min(PROBE_SIZE, below.size))
    try:
        await below.read_into(0, head)
    except BaseException:
        await _close_unused(below)
        raise
    driver = probe(bytes(head))
    if driver == "raw" and not flags.read_only:
        warn(
            f"'{export.image}' is taken for a raw image because nothing in it tells otherwise. Writes that"
            " would make its beginning look like another format are refused; -f raw allows them."
        )
    return await _open_on(graph, below, {**tree, "driver": driver, "file": below.name}, flags, probed=True)


async def _open_on(graph: Graph, below: Node, tree: Tree, flags: OpenFlags, *, probed: bool = False) -> Node:
    """Open a node that has `below` as a child; if that fails, close `below` too."""
    try:
        return await graph.open(tree, flags, probed=probed)
    except BaseException:
        await _close_unused(below)
        raise


async def _close_unused(node: Node) -> None:
    if not node.parents:
        with trio.CancelScope(shield=True):
            await node.aclose()
