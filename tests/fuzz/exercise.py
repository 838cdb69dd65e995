"""Using an image that may be anything: whatever it holds, only the errors that are meant for it come
out, in bounded time and memory, and no file is touched that it was not given."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from drivers.block.graph import Graph
from drivers.block.image import ImageNode, Repair
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.errors import ImageError, OptionError
from drivers.testing.model import write_plain
from tests.fuzz.mutate import Case

# What one image may take.
SECONDS = 30
MEMORY = 1 << 30
# So much of an image is read: one that claims exabytes would take its time otherwise.
MAX_READ = 8 << 20
MAX_EXTENTS = 256


class Misbehaviour(Exception):
    """What an image must not be able to do to us."""


class Hang(BaseException):
    """Raised wherever we are when the time is up."""


class Watch:
    """Sees every file, connection and process that Python opens, for good: audit hooks stay."""

    def __init__(self) -> None:
        self.directory: str | None = None
        self.strange: list[str] = []
        # What Python itself reads: modules that are imported late.
        self._own = (*{os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sys.path) if path},)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.directory is None:
            return
        if event == "open":
            path = arguments[0]
            if isinstance(path, bytes):
                path = os.fsdecode(path)
            if isinstance(path, str) and not self._allowed(os.path.realpath(path)):
                self.strange.append(f"opened {path}")
        elif event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.strange.append(f"{event} {arguments}")

    def _allowed(self, path: str) -> bool:
        assert self.directory is not None
        if path.startswith((self.directory, "/proc/self/", "/sys/dev/block/", "/sys/devices/")):
            return True
        return path.endswith((".py", ".pyc", ".so")) and path.startswith(self._own)

    @contextmanager
    def over(self, directory: Path, *, only: Path | None = None) -> Iterator[None]:
        """What is in `directory` may be opened; or `only` one file there."""
        self.strange.clear()
        self.directory = os.path.realpath(directory if only is None else only)
        try:
            yield
        finally:
            self.directory = None
        if self.strange:
            raise Misbehaviour(", ".join(self.strange))


@contextmanager
def bounds() -> Iterator[None]:
    """Time that passes without a wait ends in Hang, memory in MemoryError."""

    def ring(*_: object) -> None:
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    ringing = signal.signal(signal.SIGALRM, ring)
    signal.alarm(2 * SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, ringing)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run_case(case: Case, watch: Watch) -> None:
    """Raises what must not happen."""
    for read_only, untrusted in ((True, False), (False, False), (False, True)):
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            path = case.build(directory)
            descriptors = len(os.listdir("/proc/self/fd"))
            flags = OpenFlags(read_only=read_only, discard=True)
            with bounds(), watch.over(directory, only=path if untrusted else None):
                trio.run(_limited, case, path, flags, untrusted)
            if len(os.listdir("/proc/self/fd")) != descriptors:
                raise Misbehaviour("it left files open")


async def _limited(case: Case, path: Path, flags: OpenFlags, untrusted: bool) -> None:
    with trio.fail_after(SECONDS):
        await _use(case, path, flags, untrusted)


async def _use(case: Case, path: Path, flags: OpenFlags, untrusted: bool) -> None:
    graph = Graph(Catalog(), untrusted=untrusted)
    tree: dict[str, Any] = {
        "driver": case.format.name,
        "file": {"driver": "file", "filename": str(path)},
    }
    if case.base.secret is not None:
        graph.objects.add({"qom-type": "secret", "id": "sec0", "data": case.base.secret})
        tree["encrypt"] = {"key-secret": "sec0"}
    try:
        node = await graph.open(tree, flags)
    except (ImageError, OptionError) as error:
        if not str(error).strip():
            raise Misbehaviour("it was refused without a word") from error
        if graph.nodes:
            raise Misbehaviour(f"what was opened for it stays open: {list(graph.nodes)}") from error
        return
    try:
        await _read(node)
        if not flags.read_only:
            await _change(node, random.Random(f"{case.name}/use"))
    finally:
        await _attempt(node.aclose)
        if not node.closed:
            raise Misbehaviour("it does not close")


async def _attempt(call: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any) -> Any:
    """Errors of one request are the guest's to live with; so is what the image cannot do."""
    try:
        return await call(*arguments, **options)
    except (OSError, ImageError, OptionError) as error:
        if not str(error).strip():
            raise Misbehaviour("a request failed without a word") from error
        return None


async def _read(node: Node) -> None:
    left, offset = MAX_READ, 0
    ranges = [(0, 1 << 16), (max(0, node.size - 70000), 70000)]
    for _ in range(MAX_EXTENTS):
        if offset >= node.size:
            break
        extents = await _attempt(node.block_status, offset, node.size - offset)
        if not extents:
            offset += 1 << 16
            continue
        for extent in extents[:MAX_EXTENTS]:
            ranges.append((offset, extent.length))
            offset += extent.length
    for offset, length in ranges:
        length = min(length, node.size - offset, left, 1 << 20)
        if length > 0:
            node.plain(offset, length)
            await _attempt(node.read_into, offset, bytearray(length))
            left -= length
    if isinstance(node, ImageNode):
        await _attempt(node.info)
        await _attempt(node.check)
        if node.snapshots is not None:
            for info in list(node.snapshots.list())[:8]:
                node.snapshots.find(info.id)
                if node.flags.read_only:
                    await _attempt(
                        node.snapshots.load,
                        info.id,
                    )
                    await _attempt(node.read_into, 0, bytearray(min(node.size, 1 << 16)))


async def _change(node: Node, chance: random.Random) -> None:
    for _ in range(8):
        if not node.size:
            break
        offset = chance.choice((0, chance.randrange(node.size), max(0, node.size - 5000)))
        length = min(chance.choice((1, 512, 5000, 70000)), node.size - offset)
        roll = chance.random()
        if roll < 0.6:
            if not write_plain(node, offset, b"w" * length):
                await _attempt(node.write, offset, b"w" * length)
        elif roll < 0.8:
            await _attempt(node.write_zeroes, offset, length)
        else:
            await _attempt(node.discard, offset, length)
    await _attempt(node.flush)
    if isinstance(node, ImageNode):
        await _change_image(node, chance)
    await _attempt(node.truncate, node.size + (1 << 20) if chance.random() < 0.5 else node.size // 2 & ~511)
    await _attempt(node.write, 0, b"x" * min(node.size, 100))
    if isinstance(node, ImageNode):
        await _attempt(node.check, chance.choice(list(Repair)))


async def _change_image(node: ImageNode, chance: random.Random) -> None:
    if node.snapshots is not None:
        await _attempt(node.snapshots.create, "new")
        for info in list(node.snapshots.list())[:4]:
            if chance.random() < 0.3:
                await _attempt(node.snapshots.apply, info.id)
            if chance.random() < 0.5:
                await _attempt(node.snapshots.delete, info.id)
    await _attempt(node.add_bitmap, "new")
    for name in list(node.bitmaps)[:4]:
        await _attempt(node.remove_bitmap, name)


def where(error: BaseException) -> str:
    """What tells two failures apart: the error and the innermost place of ours that it came from."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/drivers/" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}: {str(error)[:160]}"
