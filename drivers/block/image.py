"""What image tools ask of a format beyond reading and writing: making, describing, checking and
amending images, internal snapshots, stored bitmaps, compressed writes.

A format derives from ImageNode and overrides what it has; everything else is refused in words.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Literal, NamedTuple, Protocol

from drivers.block.graph import Graph
from drivers.block.node import Buffer, Node, Preallocation
from drivers.errors import OptionError, RequestError
from drivers.options.schema import Options, Value


class RebaseNeededError(OptionError):
    """Another backing file is the business of rebase."""


class CreateOption(NamedTuple):
    """An option of create(), as `-o help` shows it. `default` as a user would write it.

    A format lists its options in the order in which QEMU tells what it makes; "size" is among them.
    """

    name: str
    kind: Literal["size", "string", "boolean", "number"]
    help: str
    default: str | None = None


class CreateContext(Protocol):
    """What a format's create() works with."""

    graph: Graph
    # The name of the image to make, as the user gave it.
    filename: str

    async def create_file(
        self, filename: str, *, size: int = 0, preallocation: Preallocation = Preallocation.OFF
    ) -> Node:
        """Make the file (or what its protocol has for one) and open it for writing; an existing
        one is emptied. It is closed when the creation ends."""
        ...

    async def open_image(self, filename: str, image_format: str | None, *, read_only: bool = True) -> Node:
        """An existing image, as a backing file or one that is to be kept."""
        ...


class StorageDriver(Protocol):
    """A protocol driver that can make what it opens. Its options besides those of every node are
    taken by create() alone; "preallocation" among them is told to the node that is opened then."""

    create_options: tuple[CreateOption, ...]

    async def create(self, filename: str, options: Options, /) -> None:
        """Make the file, unless it is there. Raises OptionError."""
        ...


class Measurement(NamedTuple):
    """Bytes that an image file will take; `bitmaps` None where the format stores none."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None


@dataclass
class ImageInfo:
    """What `nbdimg info` tells. `specific`: the format's own facts, typed as in JSON, in the order
    that they are shown in."""

    cluster_size: int | None = None
    compressed: bool = False
    encrypted: bool = False
    dirty: bool = False
    backing_filename: str | None = None
    backing_format: str | None = None
    specific: Mapping[str, Value] = field(default_factory=dict)


class Repair(Enum):
    NONE = "none"
    LEAKS = "leaks"
    ALL = "all"


@dataclass
class CheckReport:
    """Found and repaired; `messages` are the lines that a person sees, in order. Cluster counts
    are of guest clusters; `image_end_offset` is where the image's last used cluster ends."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SnapshotInfo:
    """An internal snapshot. Times in seconds and nanoseconds; sizes in bytes; `icount` None where
    none was recorded."""

    id: str
    name: str
    disk_size: int
    vm_state_size: int = 0
    date_seconds: int = 0
    date_nanoseconds: int = 0
    vm_clock_nanoseconds: int = 0
    icount: int | None = None


class Snapshots(Protocol):
    """The internal snapshots of an open image. A name is an id or a name, ids first."""

    def list(self) -> Sequence[SnapshotInfo]: ...

    def find(self, key: str, *, by: Literal["any", "id", "name"] = "any") -> SnapshotInfo | None: ...

    async def create(self, name: str) -> SnapshotInfo: ...

    async def apply(self, key: str) -> None:
        """The image becomes what it was."""
        ...

    async def delete(self, key: str) -> None: ...

    async def load(self, key: str) -> None:
        """Read the snapshot instead of the image; which must be open read-only."""
        ...


Progress = Callable[[float], object]  # from 0.0 to 1.0


class ImageNode(Node):
    """A node that is an image of some format."""

    create_options: ClassVar[tuple[CreateOption, ...]] = ()
    # What amend() takes; none where it does nothing.
    amend_options: ClassVar[tuple[CreateOption, ...]] = ()

    backing: Node | None = None
    snapshots: Snapshots | None = None

    @classmethod
    async def create(cls, context: CreateContext, options: Options, /) -> None:
        """Make an image of `options` ("size" in bytes among them). What is taken from `options` is
        known to the format; the caller refuses the rest."""
        raise OptionError(f"Format driver '{cls.driver_name}' does not support image creation")

    @classmethod
    async def measure(cls, options: Options, source: Node | None, /) -> Measurement:
        """What an image with the content of `source` (or none, of options' "size") would take."""
        raise OptionError(f"Block driver '{cls.driver_name}' does not support size measurement")

    async def info(self) -> ImageInfo:
        return ImageInfo()

    async def check(self, repair: Repair = Repair.NONE) -> CheckReport:
        raise RequestError(errno.ENOTSUP, "This image format does not support checks")

    async def amend(
        self, options: Options, /, *, progress: Progress | None = None, force: bool = False
    ) -> None:
        """Change what create() was told; with `force` also what cannot be undone."""
        raise OptionError(f"Format driver '{self.driver_name}' does not support option amendment")

    async def change_backing(self, filename: str | None, image_format: str | None) -> None:
        """Rewrite the reference to the backing file; what is open stays as it is."""
        raise RequestError(errno.ENOTSUP, "the format has no backing files")

    async def make_empty(self) -> None:
        """Drop all of the image's own content, so that the backing file shows."""
        raise RequestError(errno.ENOTSUP)

    # --- stored bitmaps: Node.bitmaps holds them while the image is open ---------------------

    async def add_bitmap(self, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        """Add a persistent bitmap. The granularity is in bytes."""
        raise OptionError("Cannot store dirty bitmaps in this format")

    async def remove_bitmap(self, name: str) -> None:
        raise OptionError("Cannot store dirty bitmaps in this format")

    # --- compressed writes ------------------------------------------------------------------

    async def write_compressed(self, offset: int, data: Buffer, /) -> None:
        """Store `data`, whole clusters (but for the image's end), compressed where that saves
        space. Calls may run side by side."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view), writing=True)
        request, _, _ = await self._begin(offset, len(view), writing=True)
        try:
            await self._write_compressed(offset, view)
        finally:
            self.requests.finish(request)

    async def _write_compressed(self, offset: int, data: memoryview, /) -> None:
        raise RequestError(errno.ENOTSUP, "Compression not supported for this file format")
