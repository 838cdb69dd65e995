"""Changing much metadata at once: all that changes is written to new places, refcounts included, and
takes effect with one write of the header, which leads to all of it.

Whenever the power goes, the image is what it was, or what it shall be; nothing is lost and nothing
leaks.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from drivers.format.qcow2.image import Image
from drivers.format.qcow2.refcounts import neighbours


class Rewrite:
    """What is written to new places, and what is not needed any more. Nothing else is in flight, and
    what is in memory is in the file too."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._freed: list[tuple[int, int]] = []

    async def write(self, data: bytes) -> int:
        """Put `data` into clusters of their own, filled up with zeroes; the host offset."""
        file = self._image.file
        run = await self._image.refcounts.allocate(-(-len(data) // file.cluster_size))
        await file.write(run.offset, data + bytes(-len(data) % file.cluster_size))
        return run.offset

    async def release(self, offset: int, length: int = 1) -> None:
        """A reference to these bytes' clusters goes away. Those that it leaves free are counted until
        the end, so that nothing is written over what the file still has."""
        bits = self._image.file.cluster_bits
        await self.release_clusters(offset >> bits, (length + (1 << bits) - 1) >> bits)

    async def release_clusters(self, first: int, count: int) -> None:
        self._freed += neighbours(await self._image.refcounts.lower(first, count))

    async def finish(self, **header: Any) -> None:
        """Let `header`, its changed fields, and all of this take effect, durably."""
        image, file, refcounts = self._image, self._image.file, self._image.refcounts
        rewritten = await refcounts.rewrite(self._freed)
        await file.flush()
        await file.switch_header(**header, refcount_table_offset=rewritten.run.offset)
        refcounts.adopt(rewritten)
        with contextlib.suppress(OSError):  # it is advice
            for first, count in neighbours(rewritten.free):
                await image.discard_host(first << file.cluster_bits, count << file.cluster_bits, "snapshot")


@asynccontextmanager
async def rewriting(image: Image) -> AsyncIterator[Rewrite]:
    """Rewrite something; where that fails, nothing has changed. It is not cancelled half way."""
    image.check_writable()
    with trio.CancelScope(shield=True):
        await image.metadata.mark_dirty()
        # Twice: what the first drops from the refcounts is written by the second.
        await image.metadata.flush()
        await image.metadata.flush(refcounts=True)
        image.mapping.drop()
        try:
            yield Rewrite(image)
        except BaseException:
            # What is in the file is what was there before.
            image.refcounts.drop()
            raise
