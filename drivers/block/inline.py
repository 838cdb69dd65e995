"""Reading and writing in the page cache without a thread, for formats that must see the bytes."""

from __future__ import annotations

import os
import time

from drivers.block.node import Node
from drivers.block.pace import Pace
from drivers.block.transfer import write_full


def read_now(node: Node, offset: int, buffer: memoryview) -> bool:
    """Fill `buffer` from where the bytes lie in the page cache; False, with anything in the buffer,
    where they do not. The range lies inside the node. Never blocks; other failures are for
    read_into() to meet and to report."""
    spans = node.plain(offset, len(buffer))
    if spans is None:
        return False
    start = 0
    for fd, position, length in spans:
        part = buffer[start : start + length]
        start += length
        if fd < 0:
            part[:] = bytes(length)
            continue
        try:
            if os.preadv(fd, (part,), position, os.RWF_NOWAIT) != length:
                return False
        except OSError:
            return False
    return True


def write_now(node: Node, offset: int, data: memoryview, pace: Pace) -> bool:
    """Write `data` into the page cache, where the bytes may be overwritten where they lie and `pace`
    does not advise against it; False if nothing was done. The range lies inside the node. Raises
    OSError."""
    if not pace.inline and not pace.recover():
        return False
    spans = node.plain_write(offset, len(data))
    if spans is None:
        return False
    began = time.perf_counter()
    try:
        start = 0
        for fd, position, length in spans:
            write_full(fd, position, data[start : start + length])
            start += length
    finally:
        pace.note(time.perf_counter() - began)
    return True
