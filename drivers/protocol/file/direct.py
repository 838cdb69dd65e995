"""O_DIRECT: input and output past the page cache, through aligned buffers of our own."""

from __future__ import annotations

import errno
import mmap
import os

from drivers.block.transfer import read_full, write_full

_BOUNCE_SIZE = 1 << 20
# Where a filesystem does not tell its alignment.
_SAFE_ALIGNMENT = 4096


def probe_alignment(fd: int) -> int:
    """The alignment, in bytes, that `fd` demands of offsets and lengths: the smallest read that
    is not refused. A filesystem that lets one byte pass hides its demand."""
    buffer = memoryview(mmap.mmap(-1, _SAFE_ALIGNMENT))
    for alignment in (1, 512, 1024, 2048):
        try:
            os.preadv(fd, [buffer[:alignment]], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return alignment if alignment > 1 else _SAFE_ALIGNMENT
    return _SAFE_ALIGNMENT


class DirectFile:
    """`fd` is open with O_DIRECT, `tail_fd` is the same file without it.

    Offsets are multiples of `alignment`, and so are lengths but for one that ends at the node's
    end. What is left over there is written through `tail_fd`, because rounding it up would change
    the file's size; the kernel keeps the two coherent.
    """

    def __init__(self, fd: int, tail_fd: int, alignment: int) -> None:
        self.fd = fd
        self.tail_fd = tail_fd
        self.alignment = alignment
        # As many as there were ever transfers at once: at most the node's worker threads.
        self._bounces: list[mmap.mmap] = []

    def _bounce(self) -> mmap.mmap:
        try:
            return self._bounces.pop()
        except IndexError:
            return mmap.mmap(-1, _BOUNCE_SIZE)

    def read(self, offset: int, buffer: memoryview) -> None:
        bounce = self._bounce()
        try:
            for start in range(0, len(buffer), _BOUNCE_SIZE):
                part = buffer[start : start + _BOUNCE_SIZE]
                self._read_part(offset + start, part, memoryview(bounce))
        finally:
            self._bounces.append(bounce)

    def _read_part(self, offset: int, part: memoryview, bounce: memoryview) -> None:
        whole = bounce[: -(-len(part) // self.alignment) * self.alignment]
        got = os.preadv(self.fd, [whole], offset)
        if got < len(part):
            # The file ends here, or the kernel stopped early, maybe between two blocks.
            read_full(self.tail_fd, offset + got, whole[got : len(part)])
        part[:] = whole[: len(part)]

    def write(self, offset: int, data: memoryview, flags: int = 0) -> None:
        tail = len(data) % self.alignment
        body = data[: len(data) - tail]
        bounce = self._bounce()
        try:
            for start in range(0, len(body), _BOUNCE_SIZE):
                part = memoryview(bounce)[: min(_BOUNCE_SIZE, len(body) - start)]
                part[:] = body[start : start + len(part)]
                self._write_part(offset + start, part, flags)
        finally:
            self._bounces.append(bounce)
        if tail:
            write_full(self.tail_fd, offset + len(body), data[len(body) :], flags)

    def _write_part(self, offset: int, part: memoryview, flags: int) -> None:
        put = os.pwritev(self.fd, [part], offset, flags)
        # The rest of a write that stopped early need not be aligned.
        write_full(self.tail_fd, offset + put, part[put:], flags)

    def close(self) -> None:
        os.close(self.tail_fd)
        os.close(self.fd)
