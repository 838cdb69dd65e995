"""`nbdimg bench`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from drivers.errors import OptionError
from drivers.options.argv import Opt
from drivers.units import parse_number
from nbdclient.image.arguments import FORCE_SHARE, FORMAT, IMAGE_OPTS, Given, number, parse

if TYPE_CHECKING:
    from drivers.block.node import Node
    from nbdclient.image.session import Images

_MAX_INT = (1 << 31) - 1
TABLE = (
    Opt("count", "c", takes_value=True, exact=True),
    Opt("depth", "d", takes_value=True, exact=True),
    FORMAT,
    Opt("aio", "i", takes_value=True, exact=True),
    Opt("native", "n", exact=True),
    Opt("offset", "o", takes_value=True, exact=True),
    Opt("quiet", "q", exact=True),
    Opt("size", "s", takes_value=True, exact=True),
    Opt("step-size", "S", takes_value=True, exact=True),
    Opt("cache", "t", takes_value=True, exact=True),
    Opt("write", "w", exact=True),
    FORCE_SHARE,
    Opt("flush-interval", takes_value=True),
    Opt("pattern", takes_value=True),
    Opt("no-drain"),
    IMAGE_OPTS,
)


@dataclass(frozen=True)
class Load:
    """`count` requests of `size` bytes, `depth` of them in flight, each `step` bytes behind the one
    before it. A flush every `flush_interval` requests; 0: none. With `drain` nothing else is in
    flight then."""

    count: int
    depth: int
    size: int
    step: int
    offset: int
    write: bool
    pattern: int
    flush_interval: int
    drain: bool


def run(arguments: Sequence[str]) -> int:
    given = parse("bench", TABLE, arguments)
    load = _load(given)
    filename = given.one_image()
    if load.flush_interval and not load.write:
        raise OptionError("--flush-interval is only available in write tests")
    if load.flush_interval and load.flush_interval < load.depth:
        raise OptionError("Flush interval can't be smaller than depth")
    from nbdclient.image import session

    async def command(images: Images) -> None:
        await _bench(images, given, filename, load)

    session.run(command, untrusted=given.untrusted)
    return 0


def _load(given: Given) -> Load:
    size = number("buffer size", given.values.get("size", "4096"), low=1, high=_MAX_INT)
    if given.get("aio") not in (None, "threads", "native", "io_uring"):
        raise OptionError(f"Invalid aio option: {given.get('aio')}")
    return Load(
        count=_count(given, "count", 75000, "Invalid request count specified"),
        depth=max(1, _count(given, "depth", 64, "Invalid queue depth specified")),
        size=size,
        step=number("step_size", given.values.get("step-size", "0"), high=_MAX_INT) or size,
        offset=number("offset", given.values.get("offset", "0")),
        write="write" in given,
        pattern=_count(given, "pattern", 0, "Invalid pattern byte specified", high=0xFF),
        flush_interval=_count(given, "flush-interval", 0, "Invalid flush interval specified"),
        drain="no-drain" not in given,
    )


def _count(given: Given, name: str, default: int, refusal: str, *, high: int = _MAX_INT) -> int:
    value = parse_number(given.values.get(name, str(default)), high=high)
    if value is None:
        raise OptionError(refusal)
    return value


async def _bench(images: Images, given: Given, filename: str, load: Load) -> None:
    from nbdclient.image.session import READING, WRITING, cache_flags

    try:
        flags = cache_flags(given.values.get("cache", "writeback"))
    except OptionError:
        raise OptionError("Invalid cache mode") from None
    aio = "native" if "native" in given else given.get("aio")
    node = await images.open(
        filename,
        given.format,
        image_opts=given.image_opts,
        force_share=given.force_share,
        flags=replace(flags, discard=True),
        needed=WRITING if load.write else READING,
        aio=aio,
    )
    kind = "write" if load.write else "read"
    print(
        f"Sending {load.count} {kind} requests, {load.size} bytes each, {load.depth} in parallel "
        f"(starting at offset {load.offset}, step size {load.step})"
    )
    if load.flush_interval:
        print(f"Sending flush every {load.flush_interval} requests", flush=True)
    start = time.perf_counter()
    await _send(node, load)
    print(f"Run completed in {time.perf_counter() - start:.3f} seconds.")


async def _send(node: Node, load: Load) -> None:
    """Raises OptionError."""
    import trio

    numbers = iter(range(load.count))
    gate = _Gate(load.depth)

    async def work() -> None:
        buffer = memoryview(bytearray(bytes((load.pattern,)) * load.size))
        for index in numbers:
            offset = load.offset + index * load.step
            if offset + load.size > node.size:
                offset = (index * load.step) % max(1, node.size - load.size + 1)
            async with gate.shared:
                if load.write:
                    await node.write(offset, buffer)
                else:
                    await node.read_into(offset, buffer)
            if load.flush_interval and (index + 1) % load.flush_interval == 0:
                if load.drain:
                    async with gate.alone():
                        await node.flush()
                else:
                    await node.flush()

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(load.depth):
                nursery.start_soon(work)
    except* OSError as group:
        raise OptionError(f"Failed request: {group.exceptions[0]}") from None


class _Gate:
    """Requests share it; a flush that drains has it alone."""

    def __init__(self, depth: int) -> None:
        import trio

        self.shared = trio.CapacityLimiter(depth)
        self._lock = trio.Lock()
        self._depth = depth

    def alone(self) -> _Alone:
        return _Alone(self)


class _Alone:
    def __init__(self, gate: _Gate) -> None:
        self._gate = gate
        self._tokens: list[object] = []

    async def __aenter__(self) -> None:
        await self._gate._lock.acquire()
        for _ in range(self._gate._depth):
            token = object()
            await self._gate.shared.acquire_on_behalf_of(token)
            self._tokens.append(token)

    async def __aexit__(self, *_: object) -> None:
        for token in self._tokens:
            self._gate.shared.release_on_behalf_of(token)
        self._gate._lock.release()
