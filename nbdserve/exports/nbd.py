"""An export: a node under a name, with what clients may do to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import trio

from drivers.block.dirty import DirtyBitmap
from drivers.block.edge import Edge, attach
from drivers.block.node import Node
from drivers.block.pace import Pace
from drivers.block.permission import ALL, Permission
from drivers.errors import OptionError
from drivers.wire.nbd.constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_BITMAP_PREFIX,
    MAX_PAYLOAD,
    MAX_STRING,
    TransmissionFlag,
)
from drivers.wire.nbd.server_handshake import ExportInfo
from nbdserve.exports.bitmaps import find_bitmaps
from nbdserve.exports.contexts import CONTEXTS, BitmapContext, Context

MAX_THREADS = 8


class NbdExport:
    """One export. `writethrough` makes every write durable before it is answered. `contexts` are the
    metadata contexts by name.

    Made by open(), which takes the permissions it needs on the node.
    """

    def __init__(
        self,
        name: str,
        node: Node,
        *,
        description: str,
        writable: bool,
        writethrough: bool,
        info: ExportInfo,
        contexts: Mapping[str, Context] = CONTEXTS,
        bitmaps: Sequence[DirtyBitmap] = (),
    ) -> None:
        self.name = name
        self.node = node
        self.description = description
        self.writable = writable
        self.writethrough = writethrough
        self.info = info
        self.contexts = contexts
        # They stay as they are, but for writes, as long as clients may look at them.
        self._bitmaps = bitmaps
        for bitmap in bitmaps:
            bitmap.busy = True
        self.pace = Pace()
        # Threads that wait for this export's disk: a hung one holds up no other export.
        self.threads = trio.CapacityLimiter(MAX_THREADS)
        self._edge: Edge | None = None

    @classmethod
    async def open(
        cls,
        name: str,
        node: Node,
        *,
        description: str = "",
        writable: bool = True,
        writethrough: bool = False,
        multi_conn: bool = False,
        allocation_depth: bool = False,
        bitmaps: Sequence[str] = (),
    ) -> NbdExport:
        """Take `node` into use. `multi_conn` says that more than one connection is possible: the
        node is one for all of them, so their flushes cover each other. `bitmaps` are the names of
        those that clients may ask for."""
        for text, what in ((name, "export name"), (description, "export description")):
            if len(text.encode("utf-8", "surrogateescape")) > MAX_STRING:
                raise OptionError(f"{what} too long")
        try:
            f"{name}{description}".encode()
        except UnicodeEncodeError:
            raise OptionError("export names and descriptions must be UTF-8") from None
        writable = writable and not node.flags.read_only
        found = find_bitmaps(node, bitmaps, writable=writable)
        contexts: dict[str, Context] = {BASE_ALLOCATION: CONTEXTS[BASE_ALLOCATION]}
        if allocation_depth:
            contexts[ALLOCATION_DEPTH] = CONTEXTS[ALLOCATION_DEPTH]
        contexts |= {f"{DIRTY_BITMAP_PREFIX}{bitmap.name}": BitmapContext(bitmap) for bitmap in found}
        info = ExportInfo(
            name=name,
            size=node.size,
            flags=_flags(writable=writable, multi_conn=multi_conn),
            description=description,
            minimum_block=min(node.limits.request_alignment, 64 << 10),
            preferred_block=max(4096, node.limits.preferred_block),
            maximum_payload=min(MAX_PAYLOAD, node.limits.max_transfer),
            contexts=tuple(contexts),
        )
        export = cls(
            name,
            node,
            description=description,
            writable=writable,
            writethrough=writethrough,
            info=info,
            contexts=contexts,
            bitmaps=found,
        )
        needed = Permission.CONSISTENT_READ | (Permission.WRITE if writable else Permission(0))
        export._edge = await attach(
            f"export {name}", node, user="NBD server", needed=needed, shared=ALL & ~Permission.RESIZE
        )
        return export

    async def aclose(self) -> None:
        """Give the node back; it closes, flushed, if nobody else uses it."""
        if self._edge is not None:
            edge, self._edge = self._edge, None
            for bitmap in self._bitmaps:
                bitmap.busy = False
            await edge.detach()


def _flags(*, writable: bool, multi_conn: bool) -> TransmissionFlag:
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_CACHE
    )
    if writable:
        flags |= (
            TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        )
    else:
        flags |= TransmissionFlag.READ_ONLY
    if multi_conn:
        flags |= TransmissionFlag.CAN_MULTI_CONN
    return flags


class ExportTable:
    """The exports of a server, as a handshake sees them."""

    def __init__(self, exports: Iterable[NbdExport]) -> None:
        self.exports = {export.name: export for export in exports}

    def listed(self) -> Iterable[tuple[str, str]]:
        return [(export.name, export.description) for export in self.exports.values()]

    def find(self, name: str) -> ExportInfo | None:
        export = self.exports.get(name)
        return None if export is None else export.info
