"""Bitmaps that go with an image when it is copied."""

from __future__ import annotations

from drivers.block.dirty import DirtyBitmap
from drivers.block.image import ImageNode
from drivers.block.node import Node
from drivers.errors import OptionError
from nbdclient.image.__main__ import complain


def stores_bitmaps(node: Node) -> bool:
    return isinstance(node, ImageNode) and type(node).add_bitmap is not ImageNode.add_bitmap


def _stored(node: Node) -> list[DirtyBitmap]:
    return [bitmap for bitmap in node.bitmaps.values() if bitmap.persistent]


def check_source(node: Node, *, skip_broken: bool) -> None:
    """Raises OptionError if not all can be copied."""
    if not stores_bitmaps(node):
        raise OptionError("Source lacks bitmap support")
    for bitmap in _stored(node):
        if bitmap.inconsistent and not skip_broken:
            raise OptionError(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'\n"
                "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove'"
            )


async def copy(source: Node, target: Node, *, skip_broken: bool) -> None:
    """Every stored bitmap of `source` is stored in `target`, too. Raises OptionError."""
    if not isinstance(target, ImageNode) or not stores_bitmaps(target):
        raise OptionError(f"Format driver '{target.driver_name}' does not support bitmaps")
    for bitmap in _stored(source):
        if bitmap.inconsistent and skip_broken:
            complain(f"warning: Skipping inconsistent bitmap '{bitmap.name}'")
            continue
        await target.add_bitmap(bitmap.name, bitmap.granularity, enabled=bitmap.enabled)
        target.bitmaps[bitmap.name].merge(bitmap)
