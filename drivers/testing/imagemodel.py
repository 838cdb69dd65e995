"""An image against a model of it: what model.py knows of any node, and beyond it internal snapshots,
stored bitmaps, and being closed and opened again."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, replace

from drivers.block.dirty import DirtyBitmap
from drivers.block.image import ImageNode
from drivers.errors import RequestError
from drivers.testing.model import BASIC_KINDS, Operation, contents, do

SNAPSHOT_KINDS = ("snapshot", "apply", "delete-snapshot")
BITMAP_KINDS = ("add-bitmap", "remove-bitmap", "clear-bitmap", "switch-bitmap", "merge-bitmap")
# What sizes of images are multiples of.
_SECTOR = 512
MAX_SNAPSHOTS = 4
MAX_BITMAPS = 4


@dataclass
class BitmapModel:
    """Granules that must be dirty, and those that may be: a discard need not reach its range's ends."""

    granularity: int
    enabled: bool = True
    must: set[int] = field(default_factory=set)
    may: set[int] = field(default_factory=set)

    def touch(self, offset: int, length: int, *, surely: bool) -> None:
        if not self.enabled or not length:
            return
        granules = range(offset // self.granularity, (offset + length - 1) // self.granularity + 1)
        self.may.update(granules)
        if surely:
            self.must.update(granules)

    def resize(self, size: int) -> None:
        count = -(-size // self.granularity)
        for granules in (self.must, self.may):
            granules.difference_update([granule for granule in granules if granule >= count])

    def check(self, bitmap: DirtyBitmap) -> None:
        assert bitmap.granularity == self.granularity
        assert bitmap.enabled == self.enabled
        assert not bitmap.inconsistent
        found: set[int] = set()
        for offset, length in bitmap.dirty_ranges():
            found.update(range(offset // self.granularity, -(-(offset + length) // self.granularity)))
        assert self.must <= found <= self.may


class ImageModel:
    """`node` is the image as it is open now; `content` is what it must read as."""

    def __init__(
        self, node: ImageNode, content: bytearray, *, reopen: Callable[[], Awaitable[ImageNode]]
    ) -> None:
        """`reopen` opens the image again, which has been closed."""
        self.node = node
        self.content = content
        self.snapshots: dict[str, bytes] = {}
        self.bitmaps: dict[str, BitmapModel] = {}
        self._reopen = reopen
        self._steps = {
            "snapshot": self._snapshot,
            "apply": self._apply,
            "delete-snapshot": self._delete_snapshot,
            "add-bitmap": self._add_bitmap,
            "remove-bitmap": self._remove_bitmap,
            "clear-bitmap": self._clear_bitmap,
            "switch-bitmap": self._switch_bitmap,
            "merge-bitmap": self._merge_bitmap,
            "reopen": self._reopened,
        }

    async def replay(self, steps: list[Operation]) -> None:
        """Do all steps, comparing after each."""
        for step in steps:
            if step.kind in BASIC_KINDS:
                await self._basic(step)
            else:
                await self._steps[step.kind](step)
            await self.check()

    async def check(self) -> None:
        assert self.node.size == len(self.content)
        assert await contents(self.node) == self.content
        if self.node.snapshots is not None:
            assert [info.name for info in self.node.snapshots.list()] == list(self.snapshots)
        assert set(self.node.bitmaps) == set(self.bitmaps)
        for name, bitmap in self.bitmaps.items():
            bitmap.check(self.node.bitmaps[name])

    # --- the disk ---------------------------------------------------------------------------

    async def _basic(self, step: Operation) -> None:
        if step.kind == "truncate":
            step = replace(step, offset=step.offset // _SECTOR * _SECTOR)
        before = bytes(self.content)
        try:
            offset, length = await do(self.node, self.content, step)
        except RequestError as error:
            # Old versions do not keep the sizes of snapshots.
            assert step.kind == "truncate" and self.snapshots and error.errno == errno.ENOTSUP
            return
        for bitmap in self.bitmaps.values():
            if step.kind == "truncate":
                bitmap.resize(len(self.content))
            elif step.kind == "write-plain":
                # It may have been refused.
                written = length and bytes(self.content) != before
                bitmap.touch(offset, length, surely=bool(written))
            elif step.kind in ("write", "zero", "discard"):
                bitmap.touch(offset, length, surely=step.kind != "discard")

    async def _reopened(self, step: Operation) -> None:
        await self.node.aclose()
        self.node = await self._reopen()

    # --- snapshots --------------------------------------------------------------------------

    async def _snapshot(self, step: Operation) -> None:
        name = f"snapshot {step.offset}"
        if self.node.snapshots is None or name in self.snapshots or len(self.snapshots) == MAX_SNAPSHOTS:
            return
        info = await self.node.snapshots.create(name)
        assert (info.name, info.disk_size) == (name, len(self.content))
        self.snapshots[name] = bytes(self.content)

    async def _apply(self, step: Operation) -> None:
        if self.node.snapshots is None or not self.snapshots:
            return
        name = _pick(self.snapshots, step)
        await self.node.snapshots.apply(name)
        self.content[:] = self.snapshots[name]
        for bitmap in self.bitmaps.values():
            bitmap.resize(len(self.content))
            bitmap.touch(0, len(self.content), surely=False)

    async def _delete_snapshot(self, step: Operation) -> None:
        if self.node.snapshots is None or not self.snapshots:
            return
        name = _pick(self.snapshots, step)
        await self.node.snapshots.delete(name)
        del self.snapshots[name]

    # --- bitmaps ----------------------------------------------------------------------------

    async def _add_bitmap(self, step: Operation) -> None:
        name = f"bitmap {step.offset}"
        if name in self.bitmaps or len(self.bitmaps) == MAX_BITMAPS:
            return
        granularity = 512 << step.fill % 8
        await self.node.add_bitmap(name, granularity, enabled=step.flag)
        self.bitmaps[name] = BitmapModel(granularity, step.flag)

    async def _remove_bitmap(self, step: Operation) -> None:
        if self.bitmaps:
            name = _pick(self.bitmaps, step)
            await self.node.remove_bitmap(name)
            del self.bitmaps[name]

    async def _clear_bitmap(self, step: Operation) -> None:
        if self.bitmaps:
            name = _pick(self.bitmaps, step)
            self.node.bitmaps[name].clear()
            self.bitmaps[name].must.clear()
            self.bitmaps[name].may.clear()

    async def _switch_bitmap(self, step: Operation) -> None:
        if self.bitmaps:
            name = _pick(self.bitmaps, step)
            bitmap = self.node.bitmaps[name]
            bitmap.enabled = self.bitmaps[name].enabled = step.flag
            self.node.track(bitmap)

    async def _merge_bitmap(self, step: Operation) -> None:
        if not self.bitmaps:
            return
        name, other = _pick(self.bitmaps, step), list(self.bitmaps)[step.fill % len(self.bitmaps)]
        self.node.bitmaps[name].merge(self.node.bitmaps[other])
        into, source = self.bitmaps[name], self.bitmaps[other]
        for granules, more in ((into.must, source.must), (into.may, source.may)):
            for granule in sorted(more):
                start = granule * source.granularity
                end = min(start + source.granularity, len(self.content))
                granules.update(range(start // into.granularity, (end - 1) // into.granularity + 1))


def _pick(names: Collection[str], step: Operation) -> str:
    return list(names)[step.offset % len(names)]
