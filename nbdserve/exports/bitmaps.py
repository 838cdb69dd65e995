"""The dirty bitmaps that an export shows."""

from __future__ import annotations

from collections.abc import Sequence

from drivers.block.dirty import DirtyBitmap
from drivers.block.node import Node
from drivers.errors import OptionError
from drivers.filter.pad import PadNode


def find_bitmaps(node: Node, names: Sequence[str], *, writable: bool) -> list[DirtyBitmap]:
    """The bitmaps with these names, each of the uppermost of the nodes below `node` that has one.
    Raises OptionError where one cannot be shown."""
    found: dict[str, DirtyBitmap] = {}
    for name in reversed(names):  # as qemu-nbd lists them
        owner: Node | None = node
        while owner is not None and name not in owner.bitmaps:
            owner = _below(owner)
        if owner is None:
            raise OptionError(f"Bitmap '{name}' is not found")
        bitmap = owner.bitmaps[name]
        if bitmap.busy:
            raise OptionError(f"Bitmap '{name}' is currently in use by another operation and cannot be used")
        if bitmap.inconsistent:
            raise OptionError(f"Bitmap '{name}' is inconsistent and cannot be used")
        if not writable and not owner.flags.read_only and bitmap.enabled:
            raise OptionError(f"Enabled bitmap '{name}' incompatible with readonly export")
        found[name] = bitmap
    return list(found.values())


def _below(node: Node) -> Node | None:
    """Where a node's bytes come from that it has not itself."""
    edge = node.children.get("file" if isinstance(node, PadNode) else "backing")
    return None if edge is None else edge.child
