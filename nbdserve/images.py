"""From an export's settings to an open node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import trio

from drivers.block.graph import Graph
from drivers.block.image import ImageNode, SnapshotInfo, Snapshots
from drivers.block.node import Node, OpenFlags
from drivers.block.opening import image_tree, open_options
from drivers.errors import Error, OptionError
from drivers.filter.pad import SECTOR, PadNode
from drivers.filter.temporary import TemporaryOverlay
from drivers.options.image import complete_options, set_file_default
from drivers.options.schema import Tree
from nbdserve.settings import ExportSettings, SnapshotChoice


async def open_export(graph: Graph, export: ExportSettings, *, warn: Callable[[str], object]) -> Node:
    """Open what `export` describes. `warn` is given the lines that a person must see.

    Raises OptionError with the image's name in it; nothing stays open then.
    """
    flags = OpenFlags(
        # With a temporary overlay the image itself is only read.
        read_only=export.read_only or export.snapshot,
        direct=export.cache.direct,
        no_flush=export.cache.no_flush,
        discard=export.discard,
        detect_zeroes=export.detect_zeroes,
    )
    try:
        node = await open_options(graph, _tree(graph, export), flags, warn=warn)
    except (Error, OSError) as error:
        reason = error if isinstance(error, Error) else error.strerror
        raise OptionError(f"Failed to blk_new_open '{export.image}': {reason}") from error
    try:
        if export.internal_snapshot is not None:
            await _load_snapshot(node, export.internal_snapshot)
        if export.snapshot and not export.read_only:
            node = await TemporaryOverlay.over(node, replace(flags, read_only=False, no_flush=True))
        if export.offset:
            layer: Tree = {"driver": "raw", "offset": export.offset, "file": node.name}
            node = await graph.open(layer, replace(node.flags, detect_zeroes="off"))
        if node.size % SECTOR:
            node = await PadNode.over(node)
    except BaseException:
        with trio.CancelScope(shield=True):
            await node.aclose()
        raise
    return node


async def _load_snapshot(node: Node, choice: SnapshotChoice) -> None:
    snapshots = node.snapshots if isinstance(node, ImageNode) else None
    if snapshots is None:
        raise OptionError(
            f"Failed to load snapshot: Block format '{node.driver_name}' used by device '' does not support "
            "temporarily loading internal snapshots"
        )
    found = snapshots.find(choice.either) if choice.either is not None else _matching(snapshots, choice)
    if found is None:
        raise OptionError("Failed to load snapshot: Can't find snapshot")
    try:
        await snapshots.load(found.id)
    except (Error, OSError) as error:
        reason = error if isinstance(error, Error) else error.strerror
        raise OptionError(f"Failed to load snapshot: {reason}") from error


def _matching(snapshots: Snapshots, choice: SnapshotChoice) -> SnapshotInfo | None:
    for info in snapshots.list():
        if choice.id in (None, info.id) and choice.name in (None, info.name):
            return info
    return None


def _tree(graph: Graph, export: ExportSettings) -> Tree:
    """The options to open, without "driver" where the format is to be probed. Raises OptionError."""
    if export.options is not None:
        tree = complete_options(export.options, graph.catalog.prefixes())
    else:
        tree = image_tree(graph, export.image, export.image_format)
    if export.aio is not None:
        set_file_default(tree, "aio", export.aio)
    return tree
