"""Whole transfers between a buffer and a file descriptor. They block: call them in a thread."""

from __future__ import annotations

import errno
import os


def read_full(fd: int, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `offset`; what lies behind the end of the file reads as zeroes."""
    while buffer:
        got = os.preadv(fd, [buffer], offset)
        if not got:
            buffer[:] = bytes(len(buffer))
            return
        buffer = buffer[got:]
        offset += got


def write_full(fd: int, offset: int, data: memoryview, flags: int = 0) -> None:
    """Write all of `data`; `flags` are pwritev2's."""
    while data:
        put = os.pwritev(fd, [data], offset, flags)
        if not put:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = data[put:]
        offset += put
