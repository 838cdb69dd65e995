"""Where the bytes of an image come from, layer by layer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

from drivers.block.extents import ExtentFlags
from drivers.block.node import Node
from nbdclient.image.session import chain, guest_size

# So much is asked for at once: qemu-img's limit is the same.
STEP = 1 << 30
# As numbers: there may be very many extents.
_ZERO, _DATA, _COMPRESSED = (
    flag.value for flag in (ExtentFlags.ZERO, ExtentFlags.DATA, ExtentFlags.COMPRESSED)
)


class Run(NamedTuple):
    """`length` bytes at `start` of one kind. `layer` counts from 0, the image itself; `present`: that
    layer has them, rather than nobody. `host_offset` where they lie plain in the layer's file."""

    start: int
    length: int
    layer: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    host_offset: int | None

    def continues(self, other: Run) -> bool:
        """Whether this, lying right behind `other`, is more of the same."""
        if (self.layer, self.present, self.zero, self.data, self.compressed) != (
            *(other.layer, other.present, other.zero, other.data, other.compressed),
        ):
            return False
        if self.host_offset is None or other.host_offset is None:
            return self.host_offset is other.host_offset
        return self.host_offset == other.host_offset + other.length


async def runs(node: Node, start: int, end: int) -> AsyncIterator[Run]:
    """The runs that make up the range, neighbours of one kind not yet joined."""
    layers = chain(node)
    end = min(end, guest_size(node))
    last: Run | None = None
    while start < min(end, node.size):
        for extent in await node.block_status(start, min(min(end, node.size) - start, STEP)):
            rest, flags = extent.length, extent.flags.value
            zero, data, compressed = bool(flags & _ZERO), bool(flags & _DATA), bool(flags & _COMPRESSED)
            while rest:
                layer, length = extent.depth - 1, rest
                if not extent.depth:
                    layer, length = _nobodys(layers, start, rest)
                last = Run(
                    start=start,
                    length=length,
                    layer=layer,
                    present=extent.depth > 0,
                    zero=not extent.depth or zero,
                    data=data,
                    compressed=compressed,
                    host_offset=extent.host_offset,
                )
                yield last
                start += length
                rest -= length
    if start < end:
        # The image ends inside its last sector. Without the page cache nothing smaller is told apart.
        yield Run(
            start,
            end - start,
            0,
            present=True,
            zero=last is None or last.zero or not node.flags.direct,
            data=last is not None and last.data and node.flags.direct,
            compressed=False,
            host_offset=start,
        )


def _nobodys(layers: list[Node], start: int, length: int) -> tuple[int, int]:
    """The lowest layer that reaches as far as `start`, which no layer has, and how much further it
    reaches of `length`."""
    deepest = 0
    for index, layer in enumerate(layers[1:], 1):
        if layer.size <= start:
            break
        deepest = index
        length = min(length, layer.size - start)
    return deepest, length
