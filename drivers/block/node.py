"""The node contract: what every format, protocol and filter is to the rest of the program.

The public operations are final. They check liveness, range and permission, align, track what is
in flight and emulate what a driver lacks; a driver implements the hooks whose names begin with an
underscore and never checks a range. The least a driver needs is `_read_into`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal, NamedTuple

import trio

from drivers.block.dirty import DirtyBitmap
from drivers.block.edge import Edge, attach
from drivers.block.extents import Extent, ExtentFlags, Span, clipped, merged
from drivers.block.limits import MAX_REQUEST, MAX_SIZE, Limits
from drivers.block.permission import ALL, NONE, Permission
from drivers.block.requests import Request, RequestTracker
from drivers.errors import OptionError, RequestError

Buffer = bytes | bytearray | memoryview

# One buffer of zeroes serves every emulated write of zeroes.
_ZEROES = bytes(1 << 20)

# block_status() describes at most so many extents at once.
MAX_EXTENTS = 8192


class Preallocation(Enum):
    """How storage behind newly added bytes is treated."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class OpenFlags:
    """The options that every node takes, whatever its driver.

    `direct` bypasses the host's page cache, `no_flush` ignores flushes, `discard` lets discards
    reach storage, `detect_zeroes` turns written zeroes into write_zeroes (and with "unmap" into
    holes). `auto_read_only` falls back to read-only where writing is not possible. `force_share`
    opens read-only beside a writer. `no_backing` leaves the backing file alone, whatever the image names;
    `for_check` opens what is to be checked or repaired: neither damage nor a dirty mark is in its way;
    `for_info` what is only to be described: guest data are neither read nor written. So both go without
    the key of an encrypted image; `for_info` does not even look at it.
    """

    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    direct: bool = False
    no_flush: bool = False
    discard: bool = False
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    no_backing: bool = False
    for_check: bool = False
    for_info: bool = False


class Hold(NamedTuple):
    """Spans of `node` stay valid, and what they came from in the nodes below."""

    node: Node
    request: Request
    below: list[Hold]


class Node:
    """An open image, protocol or filter.

    size: bytes. limits: see Limits. Attributes are read-only for users.
    """

    driver_name: ClassVar[str]
    # The hook _write honours fua itself; otherwise a flush follows the write.
    supports_fua: ClassVar[bool] = False

    def __init__(self, *, flags: OpenFlags, size: int, limits: Limits | None = None, name: str = "") -> None:
        if not 0 <= size <= MAX_SIZE:
            raise OptionError(f"{self.driver_name}: image size {size} is out of range")
        self.name = name
        self.flags = flags
        self.size = size
        self.limits = limits or Limits()
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.requests = RequestTracker()
        self.closed = False
        # See lend().
        self.lent = False
        # By name; those that are enabled are told of every write. See track() and untrack().
        self.bitmaps: dict[str, DirtyBitmap] = {}
        self._tracking: tuple[DirtyBitmap, ...] = ()
        # Truncating and closing exclude each other.
        self._reshaping = trio.Lock()
        self._close_callbacks: list[Callable[[], object]] = []

    # --- what drivers implement -------------------------------------------------------------

    def _plain(self, offset: int, length: int, /) -> Sequence[Span] | None:
        """See plain(). The range lies inside the node."""
        return None

    def _plain_write(self, offset: int, length: int, /) -> Sequence[Span] | None:
        """See plain_write(). The node is writable and the range lies inside it."""
        return None

    def _write_now(self, offset: int, data: memoryview, /) -> bool:
        """See write_now(). The node is writable and the range lies inside it."""
        return False

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill all of `buffer`."""
        raise NotImplementedError

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        raise RequestError(errno.ENOTSUP)

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        """Make the range read as zeroes without being sent the zeroes. RequestError(ENOTSUP) where
        that is not possible: the zeroes are then written. With `fast`, ENOTSUP unless it is
        quicker than writing."""
        raise RequestError(errno.ENOTSUP)

    async def _discard(self, offset: int, length: int, /) -> None:
        """Advice: the range's content is of no more use. ENOTSUP is ignored."""
        raise RequestError(errno.ENOTSUP)

    async def _write_back(self) -> None:
        """Hand to the children what is only in memory. Called where flushes are ignored."""

    async def _flush(self) -> None:
        """Make every completed write durable."""

    def _grow(self, size: int, /) -> bool:
        """See grow(); `size` is more than the node's."""
        return False

    async def _cache(self, offset: int, length: int, /) -> None:
        """Advice: the range will be read soon."""

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        """At least one extent, at most MAX_EXTENTS; may describe less than was asked, or more. The
        range may have any alignment."""
        return [Extent(length, ExtentFlags.DATA)]

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        raise RequestError(errno.ENOTSUP, "the image cannot be resized")

    async def _allocated_size(self) -> int | None:
        """See allocated_size(). The default suits whoever keeps everything in its children."""
        total: int | None = None
        for role, edge in self.children.items():
            if role != "backing" and (size := await edge.child.allocated_size()) is not None:
                total = (total or 0) + size
        return total

    def _child_permissions(
        self, role: str, needed: Permission, shared: Permission, /
    ) -> tuple[Permission, Permission]:
        """What to ask of the child in `role` when the parents ask for `needed` and `shared`.
        The default suits filters: the same."""
        return needed, shared

    async def _permissions_changed(self, needed: Permission, shared: Permission, /) -> None:
        """The sum over all parents is now `needed` and `shared`: pass it on to the children, lock
        files accordingly, or raise OptionError and leave things as they were."""
        done: list[tuple[Edge, Permission, Permission]] = []
        try:
            for role, edge in self.children.items():
                before = edge, edge.needed, edge.shared
                await edge.set_permissions(*self._child_permissions(role, needed, shared))
                done.append(before)
        except BaseException:
            with trio.CancelScope(shield=True):
                for edge, *old in reversed(done):
                    await edge.set_permissions(*old)
            raise

    async def _close(self) -> None:
        """Release what the driver holds. Called once; no request is in flight."""

    # --- the synchronous fast path ----------------------------------------------------------

    def plain(self, offset: int, length: int, /) -> Sequence[Span] | None:
        """The spans of host files where these bytes lie, in order, or None where that is not
        known at once. None also tells that the request must be made by read_into(), because
        somebody has to see it.

        The range must lie inside the node. A span is valid until the caller's next await, unless
        hold() is called before it.
        """
        return None if self.requests.guarded else self._plain(offset, length)

    def plain_write(self, offset: int, length: int, /) -> Sequence[Span] | None:
        """Like plain(), for bytes that may be overwritten where they lie. The caller writes all of
        them, or has an error to report: a format may have taken storage for them."""
        if self.requests.guarded or self.flags.read_only or self.flags.detect_zeroes != "off":
            return None
        spans = self._plain_write(offset, length)
        if spans is not None and self._tracking:
            self._mark(offset, length)
        return spans

    def write_now(self, offset: int, data: memoryview, /) -> bool:
        """Write `data` where plain_write() knows no place for them, if that takes no waiting. False
        if it does, or failed: write() then tells. The range must lie inside the node."""
        if self.requests.guarded or self.flags.read_only or self.flags.detect_zeroes != "off":
            return False
        if not self._write_now(offset, data):
            return False
        if self._tracking:
            self._mark(offset, len(data))
        return True

    def grow(self, size: int, /) -> bool:
        """Have the node end at `size` or behind: what is added reads as zeroes, and takes no
        storage before it is written. False where the node cannot grow at once. Never blocks."""
        if size <= self.size:
            return True
        if self.closed or self.flags.read_only or size > MAX_SIZE or not self._grow(size):
            return False
        self.size = size
        return True

    def hold(self, offset: int, length: int, /) -> Hold:
        """Keep the spans just returned valid until release()."""
        below = [edge.child.hold(0, edge.child.size) for edge in self.children.values()]
        return Hold(self, self.requests.hold(offset, length), below)

    def release(self, hold: Hold, /) -> None:
        for below in hold.below:
            below.node.release(below)
        self.requests.finish(hold.request)

    def lend(self) -> None:
        """From now on the caller hands out pages of the page cache that hold this node's bytes, as
        sendfile does. They show what is written to them later: who gives the place of some bytes to
        others has to take care that these come to lie in other pages."""
        if not self.lent:
            self.lent = True
            for edge in self.children.values():
                edge.child.lend()

    # --- operations -------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: bytearray | memoryview, /) -> None:
        """Fill `buffer` from `offset`. Raises RequestError or OSError."""
        view = memoryview(buffer).cast("B")
        self._check(offset, len(view))
        if not view:
            return
        request, start, end = await self._begin(offset, len(view))
        try:
            if start == offset and end == offset + len(view):
                await self._read_into(offset, view)
            else:
                bounce = memoryview(bytearray(end - start))
                await self._read_into(start, bounce)
                view[:] = bounce[offset - start :][: len(view)]
        finally:
            self.requests.finish(request)

    async def write(self, offset: int, data: Buffer, /, *, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua` it is durable on return."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view), writing=True)
        if not view:
            return
        if self.flags.detect_zeroes != "off" and is_zero(view):
            unmap = self.flags.detect_zeroes == "unmap"
            await self.write_zeroes(offset, len(view), fua=fua, may_unmap=unmap)
            return
        request, start, end = await self._begin(offset, len(view), writing=True)
        try:
            if start != offset or end != offset + len(view):
                view = await self._modified(start, end, offset, view)
            fua = fua and not self.flags.no_flush
            self._mark(offset, len(data))
            await self._write(start, view, fua=fua and self.supports_fua)
            if fua and not self.supports_fua:
                await self._flush()
        finally:
            self.requests.finish(request)

    async def write_zeroes(
        self, offset: int, length: int, /, *, fua: bool = False, may_unmap: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes. `may_unmap` allows a hole to be made; with `fast` it
        fails with ENOTSUP where it would be no quicker than write()."""
        self._check(offset, length, writing=True, bounded=False)
        if not length:
            return
        # A layer passes the wish on; what is at the bottom has "discard" on, unless told otherwise.
        may_unmap = may_unmap and (self.flags.discard or bool(self.children))
        start, end = self._inner(offset, length)
        if start > offset or end < offset + length:
            if fast:
                raise RequestError(errno.ENOTSUP)
            if end <= start:
                start = end = offset + length
        await self._write_zero_buffers(offset, start - offset)
        if start < end:
            request, *aligned = await self._begin(start, end - start, writing=True, bounded=False)
            try:
                if aligned != [start, end]:
                    # The end was the node's when it was found, and the node has grown since.
                    raise RequestError(errno.ENOTSUP)
                self._mark(start, end - start)
                await self._write_zeroes(start, end - start, may_unmap=may_unmap, fast=fast)
            except OSError as error:
                if fast or error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
                emulate = True
            else:
                emulate = False
            finally:
                self.requests.finish(request)
            if emulate:
                await self._write_zero_buffers(start, end - start)
        await self._write_zero_buffers(end, offset + length - end)
        if fua:
            await self.flush()

    async def discard(self, offset: int, length: int, /) -> None:
        """Advice that the range's content is of no more use; what it reads as is undefined."""
        self._check(offset, length, writing=True, bounded=False)
        if not self.flags.discard:
            return
        start, end = self._inner(offset, length)
        if start >= end:
            return
        request, *aligned = await self._begin(start, end - start, writing=True, bounded=False)
        try:
            if aligned == [start, end]:  # else the node has grown since its end was found
                self._mark(start, end - start)
                await self._discard(start, end - start)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
        finally:
            self.requests.finish(request)

    async def flush(self) -> None:
        """Every write that has returned is durable when this returns."""
        request, _, _ = await self._begin(0, 0)
        try:
            if self.flags.no_flush:
                await self._write_back()
            else:
                await self._flush()
        finally:
            self.requests.finish(request)

    async def cache(self, offset: int, length: int, /) -> None:
        """Advice that the range will be read soon."""
        request, _, _ = await self._begin(offset, length, bounded=False)
        try:
            await self._cache(offset, length)
        finally:
            self.requests.finish(request)

    async def block_status(self, offset: int, length: int, /) -> list[Extent]:
        """What lies at `offset`: at least one extent (of a range that is not empty), neighbours
        joined, at most `length` bytes of them; fewer where there are very many."""
        self._check(offset, length, bounded=False)
        if not length:
            return []
        request, _, _ = await self._begin(offset, length, bounded=False)
        try:
            return clipped(merged(await self._block_status(offset, length)), length)
        finally:
            self.requests.finish(request)

    async def allocated_size(self) -> int | None:
        """Bytes that the node takes on the host, without its backing files; None where nobody knows."""
        self._check_alive()
        return await self._allocated_size()

    async def truncate(self, size: int, /, *, preallocation: Preallocation = Preallocation.OFF) -> None:
        """Make the node `size` bytes long; added bytes read as zeroes."""
        self._check_alive()
        if self.flags.read_only:
            raise RequestError(errno.EACCES, "the image is read-only")
        if not 0 <= size <= MAX_SIZE:
            raise RequestError(errno.EFBIG)
        async with self._reshaping, self.requests.quiesced():
            self._check_alive()
            await self._truncate(size, preallocation=preallocation)
            self.size = size
            for bitmap in self.bitmaps.values():
                bitmap.resize(size)

    async def aclose(self) -> None:
        """Flush and release the node and, through its edges, its children. Idempotent."""
        with trio.CancelScope(shield=True):
            async with self._reshaping, self.requests.quiesced():
                if self.closed:
                    return
                try:
                    if not self.flags.read_only and not self.flags.no_flush:
                        await self._flush()
                finally:
                    self.closed = True
                    self.requests.guarded += 1  # for good: the fast path asks for nothing else
                    # Each of these is done, whichever of them fails.
                    async with AsyncExitStack() as stack:
                        for callback in self._close_callbacks:
                            stack.callback(callback)
                        for edge in self.children.values():
                            stack.push_async_callback(edge.detach)
                        await self._close()

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once the node is closed."""
        self._close_callbacks.append(callback)

    # --- dirty bitmaps ----------------------------------------------------------------------

    def track(self, bitmap: DirtyBitmap) -> None:
        """Take a bitmap of the node's size into `bitmaps`, or notice that it was enabled or disabled."""
        self.bitmaps[bitmap.name] = bitmap
        self._find_tracking()

    def untrack(self, name: str) -> None:
        del self.bitmaps[name]
        self._find_tracking()

    def _find_tracking(self) -> None:
        self._tracking = tuple(
            bitmap for bitmap in self.bitmaps.values() if bitmap.enabled and not bitmap.inconsistent
        )

    def _mark(self, offset: int, length: int) -> None:
        for bitmap in self._tracking:
            bitmap.mark(offset, length)

    # --- permissions ------------------------------------------------------------------------

    async def use(self, role: str, child: Node) -> Node:
        """Attach `child` in `role`, with the permissions that follow from this node's own."""
        needed, shared = self._child_permissions(role, *self.cumulative_permissions())
        await attach(role, child, parent=self, user=self.name, needed=needed, shared=shared)
        return child

    def cumulative_permissions(self) -> tuple[Permission, Permission]:
        """What the parents need, together, and what all of them share."""
        needed, shared = NONE, ALL
        for edge in self.parents:
            needed |= edge.needed
            shared &= edge.shared
        return needed, shared

    # --- the choke point's parts ------------------------------------------------------------

    def _check_alive(self) -> None:
        if self.closed:
            raise RequestError(errno.ENOMEDIUM, "the image is closed")

    def _check(self, offset: int, length: int, *, writing: bool = False, bounded: bool = True) -> None:
        self._check_alive()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise RequestError(errno.EINVAL, "the range lies outside the image")
        if bounded and length > MAX_REQUEST:
            raise RequestError(errno.EINVAL, "the request is too large")
        if writing and self.flags.read_only:
            raise RequestError(errno.EPERM, "the image is read-only")

    async def _begin(
        self, offset: int, length: int, *, writing: bool = False, bounded: bool = True
    ) -> tuple[Request, int, int]:
        """Check a request and register the aligned range around it, from the second to the third
        result; serialising if that is more than is to be written."""
        while True:
            self._check(offset, length, writing=writing, bounded=bounded)
            size = self.size
            start, end = self._aligned(offset, length)
            rest = start != offset or end != offset + length
            request = await self.requests.begin(start, end - start, serialising=writing and rest)
            if not self.closed and self.size == size:
                return request, start, end
            # While it waited the node was resized or closed: what was found is no longer true.
            self.requests.finish(request)

    def _aligned(self, offset: int, length: int) -> tuple[int, int]:
        """The smallest aligned range around this one; its end may be the node's instead."""
        mask = self.limits.request_alignment - 1
        end = offset + length
        return offset & ~mask, end if end == self.size else min(self.size, (end + mask) & ~mask)

    def _inner(self, offset: int, length: int) -> tuple[int, int]:
        """The largest aligned range inside this one; its end may be the node's instead."""
        mask = self.limits.request_alignment - 1
        end = offset + length
        return (offset + mask) & ~mask, end if end == self.size else end & ~mask

    async def _modified(self, start: int, end: int, offset: int, data: memoryview) -> memoryview:
        """The bytes from `start` to `end` with `data` laid over them; only the edges are read."""
        mask = self.limits.request_alignment - 1
        whole = memoryview(bytearray(end - start))
        head_end = min(end, (offset | mask) + 1) if offset > start else start
        if head_end > start:
            await self._read_into(start, whole[: head_end - start])
        tail_start = max(head_end, (offset + len(data)) & ~mask)
        if tail_start < end and offset + len(data) < end:
            await self._read_into(tail_start, whole[tail_start - start :])
        whole[offset - start :][: len(data)] = data
        return whole

    async def _write_zero_buffers(self, offset: int, length: int) -> None:
        zeroes = memoryview(_ZEROES)
        while length > 0:
            chunk = min(length, len(zeroes))
            request, start, end = await self._begin(offset, chunk, writing=True)
            whole = start == offset and end == offset + chunk
            try:
                data = zeroes[:chunk] if whole else await self._modified(start, end, offset, zeroes[:chunk])
                self._mark(offset, chunk)
                await self._write(start, data, fua=False)
            finally:
                self.requests.finish(request)
            offset += chunk
            length -= chunk


def is_zero(data: memoryview) -> bool:
    """Whether all bytes are zero."""
    # Comparing bytes is memcmp; comparing memoryviews goes item by item. The first few bytes
    # answer for most data that is not zero.
    if bytes(data[:64]).count(0) != min(len(data), 64):
        return False
    return all(
        bytes(data[start : start + len(_ZEROES)]) == _ZEROES[: len(data) - start]
        for start in range(0, len(data), len(_ZEROES))
    )
