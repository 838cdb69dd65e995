"""Dirty bitmaps: which parts of a node were written to while the bitmap was enabled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from drivers.errors import OptionError

MIN_GRANULARITY = 1 << 9
MAX_GRANULARITY = 1 << 31
DEFAULT_GRANULARITY = 64 << 10
MAX_NAME = 1023
# A bitmap of more bytes than this is refused: 2 TiB of image at 512 bytes a bit.
MAX_BITMAP_BYTES = 512 << 20


class DirtyBitmap:
    """A bit for each `granularity` bytes of a node of `size` bytes, the lowest bit of a byte first.

    `persistent`: the image stores it. `inconsistent`: it was not stored when the image was last
    used; it can only be removed. `busy`: something relies on it staying as it is.
    """

    def __init__(self, name: str, size: int, granularity: int = DEFAULT_GRANULARITY) -> None:
        if not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY or granularity & (granularity - 1):
            raise OptionError(
                f"bitmap granularity must be a power of two from {MIN_GRANULARITY} to {MAX_GRANULARITY}"
            )
        self.name = name
        self.size = size
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.enabled = True
        self.persistent = False
        self.inconsistent = False
        self.busy = False
        if self.byte_count > MAX_BITMAP_BYTES:
            raise OptionError(f"bitmap '{name}' would be too large; use a coarser granularity")

    @property
    def bit_count(self) -> int:
        return (self.size + self.granularity - 1) >> self.shift

    @property
    def byte_count(self) -> int:
        return (self.bit_count + 7) // 8

    @cached_property
    def bits(self) -> bytearray:
        """Made when something becomes dirty: a bitmap that is all clean takes no memory."""
        return bytearray(self.byte_count)

    @property
    def untouched(self) -> bool:
        """Whether it is clean and has no memory yet."""
        return "bits" not in self.__dict__

    def mark(self, offset: int, length: int) -> None:
        """Every granule that the range touches is dirty."""
        if length > 0:
            self._fill(offset >> self.shift, ((offset + length - 1) >> self.shift) + 1, value=True)

    def clear(self) -> None:
        self.__dict__.pop("bits", None)

    def merge(self, other: DirtyBitmap) -> None:
        """What is dirty in `other`, of a node of the same size, is dirty here too."""
        if other.size != self.size:
            raise OptionError(
                f"Bitmaps are of different sizes (destination size is {self.size} and source size is "
                f"{other.size}) and can't be merged"
            )
        if other.untouched:
            return
        if other.granularity == self.granularity:
            joined = int.from_bytes(self.bits, "little") | int.from_bytes(other.bits, "little")
            self.bits[:] = joined.to_bytes(len(self.bits), "little")
            return
        for offset, length in other.dirty_ranges():
            self.mark(offset, length)

    def resize(self, size: int) -> None:
        """The node is `size` bytes now; what is new is clean."""
        if self.untouched:
            self.size = size
            return
        if size < self.size:
            keep = (size + self.granularity - 1) >> self.shift
            self._fill(keep, self.bit_count, value=False)
        self.size = size
        count = self.byte_count
        del self.bits[count:]
        self.bits.extend(bytes(count - len(self.bits)))

    def count(self) -> int:
        """Bytes that are dirty."""
        return sum(length for _, length in self.dirty_ranges())

    def dirty_ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of all that is dirty, in bytes, clipped to the size."""
        offset = 0
        for length, dirty in self.runs(0, self.size):
            if dirty:
                yield offset, length
            offset += length

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """(bytes, is dirty) of the neighbouring runs that make up the range."""
        end = offset + length
        if self.untouched and length:
            yield length, False
            return
        while offset < end:
            bit = offset >> self.shift
            dirty = bool(self.bits[bit >> 3] >> (bit & 7) & 1)
            stop = min(end, self._run_end(bit, dirty) << self.shift)
            yield stop - offset, dirty
            offset = stop

    def _run_end(self, bit: int, dirty: bool) -> int:
        """The first bit from `bit` on that is not `dirty`, or where the bitmap ends."""
        count, bits = self.bit_count, self.bits
        skip = 0xFF if dirty else 0
        while bit < count:
            if not bit & 7:
                # Whole bytes of the same are skipped at once.
                rest = memoryview(bits)[bit >> 3 :]
                bit += 8 * _same_prefix(rest, skip)
                if bit >= count:
                    return count
            if bool(bits[bit >> 3] >> (bit & 7) & 1) is not dirty:
                return bit
            bit += 1
        return count

    def _fill(self, start: int, end: int, *, value: bool) -> None:
        while start < end and start & 7:
            self._set(start, value)
            start += 1
        whole = (end - start) // 8
        if whole > 0:
            at = start >> 3
            self.bits[at : at + whole] = (b"\xff" if value else b"\0") * whole
            start += 8 * whole
        while start < end:
            self._set(start, value)
            start += 1

    def _set(self, bit: int, value: bool) -> None:
        if value:
            self.bits[bit >> 3] |= 1 << (bit & 7)
        else:
            self.bits[bit >> 3] &= ~(1 << (bit & 7))


def _same_prefix(data: memoryview, value: int) -> int:
    """How many bytes from the start of `data` on are `value`."""
    step = 4096
    done = 0
    same = bytes((value,)) * step
    while done < len(data):
        part = bytes(data[done : done + step])
        if part != same[: len(part)]:
            stripped = part.lstrip(same[:1])
            return done + len(part) - len(stripped)
        done += len(part)
    return done
