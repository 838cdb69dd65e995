"""What the parts of a check share: the image, what was found, and reads that are accounted for."""

from __future__ import annotations

import errno
import sys
from array import array

from drivers.block.image import CheckReport, Repair
from drivers.block.node import Node
from drivers.errors import RequestError
from drivers.format.qcow2.header import Header
from drivers.format.qcow2.references import References

# Lines kept for people; the counts go on.
MAX_MESSAGES = 100_000
# Tables that lie apart are together no longer than the file. What an image makes us read beyond
# a few times that, it must have counted many times over.
_SLACK = 64 << 20


class CheckFailed(RequestError):
    """The check could not be finished. `messages` are the lines up to there; `reason`, if any, is
    to be said like an error before the failure itself."""

    def __init__(self, number: int, messages: list[str], reason: str = "") -> None:
        super().__init__(number)
        self.messages = messages
        self.reason = reason


class Inspection:
    """An image under inspection. Nobody else uses it meanwhile.

    `references`: what refers to each cluster. `clusters`: of the file, the last one maybe in part.
    `metadata`: (offset, end) of what no L2 table may overlap.
    """

    def __init__(self, file: Node, header: Header, repair: Repair) -> None:
        self.file = file
        self.header = header
        self.fix_errors = repair is Repair.ALL
        self.fix_leaks = repair is not Repair.NONE
        self.report = CheckReport()
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.metadata: list[tuple[int, int]] = []
        self._left = 4 * file.size + _SLACK
        self.start_over()

    def start_over(self) -> None:
        """Nothing is counted yet."""
        self.references = References(self.header.refcount_order, self.cluster_bits)
        self.clusters = -(-self.file.size // self.cluster_size)

    def say(self, line: str) -> None:
        messages = self.report.messages
        if len(messages) < MAX_MESSAGES:
            messages.append(line)
        elif len(messages) == MAX_MESSAGES:
            messages.append("(more messages are left out)")

    def corrupt(self, line: str, times: int = 1) -> None:
        self.report.corruptions += times
        self.say(line)

    def fail(self, number: int, reason: str = "") -> CheckFailed:
        return CheckFailed(number, self.report.messages, reason)

    async def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the file; zeroes behind its end. Raises OSError, and CheckFailed when an image
        is read over and over."""
        self._left -= length
        if self._left < 0:
            raise self.fail(errno.EFBIG, "ERROR the image's tables overlap too much to be checked")
        buffer = bytearray(length)  # zeroes are what lies behind the end
        inside = min(length, self.file.size - offset)
        if inside > 0:
            await self.file.read_into(offset, memoryview(buffer)[:inside])
        return buffer

    async def read_table(self, offset: int, entries: int) -> array[int]:
        """Numbers of 64 bits."""
        table = array("Q", bytes(await self.read(offset, entries * 8)))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether a range of an L2 table is metadata of another kind, too."""
        return any(start < offset + length and offset < end for start, end in self.metadata)

    async def write_table(self, offset: int, table: array[int]) -> None:
        end = offset + len(table) * 8
        if end > self.file.size:
            await self.file.truncate(end)
        if sys.byteorder == "little":
            table = table[:]
            table.byteswap()
        await self.file.write(offset, table.tobytes())

    def count(self, offset: int, length: int, weight: int = 1) -> None:
        """The clusters that hold these bytes of the file have a reference more, or `weight`."""
        if length <= 0:
            return
        if offset + length - self.file.size >= self.cluster_size:
            # What ends within the file's last cluster may not have been written to its end.
            self.corrupt(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or "
                f"more: offset {offset:#x} size {length:#x}",
                weight,
            )
            return
        first = offset >> self.cluster_bits
        end = ((offset + length - 1) >> self.cluster_bits) + 1
        self.clusters = max(self.clusters, end)
        self.add(first, end - first, weight)

    def add(self, first: int, count: int, weight: int = 1) -> None:
        """The same for clusters that lie inside the file."""
        for cluster, times in self.references.add(first, count, weight):
            self._overflow(cluster, times)

    def _overflow(self, cluster: int, times: int) -> None:
        self.corrupt(f"ERROR: overflow cluster offset={cluster << self.cluster_bits:#x}", times)
        self.say(
            "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean "
            "copy if the image cannot be opened for writing"
        )
