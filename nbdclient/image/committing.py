"""Writing what an overlay has into the image below it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from drivers.block.extents import ExtentFlags
from drivers.block.node import Node
from drivers.errors import OptionError
from nbdclient.image.cursor import ExtentCursor

STEP = 1 << 20


async def commit_down(
    top: Node, base: Node, *, rate: int | None, progress: Callable[[float], object]
) -> None:
    """Make `base` read as `top` does, of which no layer reaches down to it: what none of them has is
    the base's already. `rate` in bytes a second. Raises OptionError."""
    try:
        if base.size < top.size:
            await base.truncate(top.size)
        cursor = ExtentCursor(top)
        buffer = memoryview(bytearray(STEP))
        offset, ready = 0, trio.current_time()
        while offset < top.size:
            extent = await cursor.at(offset, top.size)
            length = extent.length
            if extent.depth:
                if extent.flags & ExtentFlags.ZERO:
                    await base.write_zeroes(offset, length)
                else:
                    length = min(length, STEP)
                    await top.read_into(offset, buffer[:length])
                    await base.write(offset, buffer[:length])
                if rate:
                    ready = max(ready, trio.current_time()) + length / rate
                    await trio.sleep_until(ready)
            offset += length
            progress(offset / top.size)
        await base.flush()
    except OSError as error:
        raise OptionError(error.strerror or str(error)) from None
