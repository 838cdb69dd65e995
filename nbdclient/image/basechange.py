"""Another backing file below an image, which keeps reading the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from drivers.block.node import Node
from drivers.errors import OptionError
from nbdclient.image.cursor import ExtentCursor
from nbdclient.image.session import chain

STEP = 2 << 20
_SECTOR = 512


class BaseChange:
    """From `old` to `new` below `node`; None is a base of zeroes. `in_chain`: `new` lies in the chain
    already, so that only what layers between it and `node` have can differ.

    Whatever the bases do not share is written to `node`: at any time it reads as it did.
    """

    def __init__(self, node: Node, old: Node | None, new: Node | None, *, in_chain: bool) -> None:
        self._node = node
        self._old = old
        self._new = new
        self._cursor = ExtentCursor(node)
        # Extents of deeper layers than this are those of `new` itself.
        layers = chain(node)
        self._deepest = layers.index(new) if in_chain and new is not None else len(layers) + 1

    async def run(self, progress: Callable[[float], object]) -> None:
        """Raises OptionError."""
        size, offset = self._node.size, 0
        while offset < size:
            try:
                extent = await self._cursor.at(offset, min(size, offset + STEP))
            except OSError as error:
                raise OptionError(f"error while reading image metadata: {error.strerror}") from None
            length = extent.length
            if extent.depth == 1 or extent.depth > self._deepest:
                offset += length
                continue
            offset += await self._keep(offset, length)
            progress(offset / size)

    async def _keep(self, offset: int, length: int) -> int:
        """Keep what is read at `offset`; how many bytes were dealt with."""
        for base in (self._old, self._new):
            if base is not None and offset < base.size < offset + length:
                length = base.size - offset
        before = await self._read(self._old, "old", offset, length)
        after = await self._read(self._new, "new", offset, length)
        beyond = self._old is None or offset >= self._old.size
        try:
            for start, end in _differences(before, after):
                if beyond:
                    await self._node.write_zeroes(offset + start, end - start)
                else:
                    await self._node.write(offset + start, before[start:end])
        except OSError as error:
            raise OptionError(f"Error while writing to COW image: {error.strerror}") from None
        return length

    async def _read(self, base: Node | None, which: str, offset: int, length: int) -> bytes:
        if base is None or offset >= base.size:
            return bytes(length)
        buffer = bytearray(length)
        try:
            await base.read_into(offset, buffer)
        except OSError:
            raise OptionError(f"error while reading from {which} backing file") from None
        return bytes(buffer)


def _differences(left: bytes, right: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the runs of sectors that differ."""
    if left == right:
        return
    start: int | None = None
    for offset in range(0, len(left), _SECTOR):
        differs = left[offset : offset + _SECTOR] != right[offset : offset + _SECTOR]
        if differs and start is None:
            start = offset
        elif not differs and start is not None:
            yield start, offset
            start = None
    if start is not None:
        yield start, len(left)
