"""What the command line asks for. Only data: nothing is opened, bound or imported for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from drivers.net.address import Address
from drivers.options.schema import Tree


@dataclass(frozen=True, slots=True)
class CacheMode:
    """`direct` bypasses the host's page cache, `no_flush` ignores flushes, `writethrough` makes every
    write durable before its reply."""

    direct: bool = False
    no_flush: bool = False
    writethrough: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotChoice:
    """An internal snapshot: by its id and its name, as far as they are given, or by `either`."""

    id: str | None = None
    name: str | None = None
    either: str | None = None


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """One export. `image` is what the user wrote: a file name, or with `options` set the text that
    they were parsed from. `image_format` is None where the format is to be found by probing;
    `offset` is in bytes and asks for a raw layer on top. `bitmaps` are the names of those that clients
    may ask for; `internal_snapshot` is shown instead of the image."""

    image: str
    options: Tree | None = None
    image_format: str | None = None
    name: str = ""
    description: str = ""
    offset: int = 0
    read_only: bool = False
    snapshot: bool = False
    allocation_depth: bool = False
    bitmaps: tuple[str, ...] = ()
    internal_snapshot: SnapshotChoice | None = None
    cache: CacheMode = CacheMode()
    aio: Literal["threads", "native", "io_uring"] | None = None
    discard: bool = False
    detect_zeroes: Literal["off", "on", "unmap"] = "off"


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """`patterns` are glob patterns of event names in the order given; a leading '-' switches off.
    `file` is where the events are written, None for standard error."""

    patterns: tuple[str, ...] = ()
    file: str | None = None


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """A server. It listens on `address`, or on the inherited descriptors `inherited`, or, with
    neither, on a private Unix socket.

    `shared` is how many clients may be connected at once, 0 for any number; without `persistent`
    the server ends with its last client. `handshake_limit` is in seconds, 0 for none. `run_command`
    is a shell command whose end ends the server. `pid_file` and all image names are relative to
    the directory of the start. `objects` are what ObjectStore.add() takes, in order. `untrusted`:
    of the files that images name none is opened.
    """

    exports: tuple[ExportSettings, ...]
    address: Address | None
    inherited: tuple[int, ...] = ()
    shared: int = 1
    persistent: bool = False
    handshake_limit: int = 10
    pid_file: str | None = None
    fork: bool = False
    run_command: str | None = None
    selinux_label: str | None = None
    verbose: bool = False
    trace: TraceSettings = field(default_factory=TraceSettings)
    objects: tuple[Tree, ...] = ()
    untrusted: bool = False


@dataclass(frozen=True, slots=True)
class ListSettings:
    """Listing what another server has."""

    address: Address
    json: bool = False
    verbose: bool = False
    trace: TraceSettings = field(default_factory=TraceSettings)
    objects: tuple[Tree, ...] = ()
