"""Going through a node's extents in order, asking as seldom as possible."""

from __future__ import annotations

from collections import deque

from drivers.block.extents import Extent
from drivers.block.node import Node

# So much is asked about at once.
STEP = 1 << 30


class ExtentCursor:
    """Answers for rising offsets; what one answer of the node tells is kept for the next question."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._known: deque[Extent] = deque()
        self._position = 0

    async def at(self, offset: int, end: int) -> Extent:
        """The extent from `offset` on, cut at `end`. Raises OSError."""
        while self._known and self._position + self._known[0].length <= offset:
            self._position += self._known.popleft().length
        if not self._known or offset < self._position:
            self._known = deque(await self._node.block_status(offset, min(end - offset, STEP)))
            self._position = offset
        extent = self._known[0]
        skip = offset - self._position
        length = min(extent.length - skip, end - offset)
        if not skip and length == extent.length:
            return extent
        host = None if extent.host_offset is None else extent.host_offset + skip
        return extent._replace(length=length, host_offset=host)
