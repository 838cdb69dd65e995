"""The `file` driver: an image in a regular file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from drivers.block.extents import Extent, Span
from drivers.block.graph import OpenContext
from drivers.block.image import CreateOption
from drivers.block.limits import Limits
from drivers.block.node import Node, OpenFlags, Preallocation
from drivers.block.permission import ALL, Permission
from drivers.errors import OptionError, RequestError
from drivers.options.schema import Options
from drivers.protocol.file import holes, locks, syscalls
from drivers.protocol.file.aio import AioQueue
from drivers.protocol.file.direct import DirectFile, probe_alignment
from drivers.protocol.file.locks import ImageLocks
from drivers.protocol.file.transfer import BufferedFile

T = TypeVar("T")

# Threads that one file may occupy. They are its own, so that a hung disk starves nobody else.
WORKERS = 16
# Shorter reads are made without asking where the holes are: asking costs as much as reading.
SPARSE_READ = 16 << 10

_ZEROES = bytes(1 << 20)
_SECTOR = 512
_FIRST_BLOCK = 4096
# How fallocate says that it cannot do this, here: then another way is tried.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTTY, errno.ENODEV)


@dataclass(frozen=True, slots=True)
class Opened:
    """An open file as the node takes it over. `sparse`: there may be holes in it. `may_grow`: it can
    be written behind its end. `aio`: how a direct file is read and written without threads, where
    the system can."""

    file: BufferedFile | DirectFile
    flags: OpenFlags
    size: int
    alignment: int
    sparse: bool
    may_grow: bool
    locks: ImageLocks | None
    aio: AioQueue | None


class FileNode(Node):
    """Reads and writes in worker threads; answers plain() unless the page cache is bypassed. Then
    what the kernel can do asynchronously needs no thread.

    A plain read that ends early has met the end of a file that was cut behind our back: what is
    missing reads as zeroes.
    """

    driver_name = "file"
    supports_fua = True

    def __init__(
        self, opened: Opened, *, filename: str, name: str = "", limiter: trio.CapacityLimiter | None = None
    ) -> None:
        limits = Limits(request_alignment=opened.alignment, preferred_block=max(4096, opened.alignment))
        super().__init__(flags=opened.flags, size=opened.size, limits=limits, name=name)
        self.filename = filename
        self._file = opened.file
        self._fd = opened.file.fd
        self._locks = opened.locks
        self._aio = opened.aio
        if self._aio is not None:
            self._aio.start()
        self._sparse = opened.sparse
        self._may_grow = opened.may_grow
        # The node has grown: the file itself may still end before `size`.
        self._grown = False
        self._limiter = limiter or trio.CapacityLimiter(WORKERS)
        self._dsync = os.RWF_DSYNC
        self._flush_errno = 0

    # --- making -----------------------------------------------------------------------------

    create_options = (
        CreateOption("size", "size", "Virtual disk size"),
        CreateOption("nocow", "boolean", "Turn off copy-on-write (valid only on btrfs)"),
        CreateOption("preallocation", "string", "Preallocation mode (allowed values: off, falloc, full)"),
        CreateOption("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
    )

    @classmethod
    async def create(cls, filename: str, options: Options, /) -> None:
        """Make `filename`, unless it is there; see StorageDriver."""
        nocow = options.boolean("nocow", False)
        hint = options.size("extent_size_hint", None)

        def make() -> None:
            try:
                fd = os.open(filename, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise OptionError(f"Could not create '{filename}': {error.strerror}") from None
            try:
                if nocow:
                    syscalls.turn_off_copy_on_write(fd)
                if hint:
                    syscalls.hint_extent_size(fd, hint)
            finally:
                os.close(fd)

        await trio.to_thread.run_sync(make)

    # --- opening ----------------------------------------------------------------------------

    @classmethod
    async def open(cls, context: OpenContext, options: Options, /) -> FileNode:
        filename = options.string("filename", "")
        if not filename:
            raise OptionError(f"The '{cls.driver_name}' block driver requires a file name")
        # Through the page cache all of them lead to the same worker threads.
        default = "native" if context.flags.direct else "threads"
        aio = options.choice("aio", ("threads", "native", "io_uring"), default)
        if aio == "native" and not context.flags.direct:
            raise OptionError(
                "aio=native was specified, but it requires cache.direct=on, which was not specified."
            )
        options.integer("aio-max-batch", 0)
        locking = options.choice("locking", ("auto", "on", "off"), "auto")
        # These two concern live migration, which has no counterpart here.
        options.boolean("drop-cache", True)
        options.boolean("x-check-cache-dropped", False)
        if options.string("pr-manager", None) is not None:
            raise OptionError("persistent reservations (pr-manager) are not supported")
        limiter = trio.CapacityLimiter(WORKERS)
        opened = await trio.to_thread.run_sync(
            lambda: cls._open_file(filename, context.flags, locking, aio), limiter=limiter
        )
        return cls(opened, filename=filename, name=context.name, limiter=limiter)

    @classmethod
    def _open_file(cls, filename: str, flags: OpenFlags, locking: str, aio: str) -> Opened:
        fd, flags = cls._open_fd(filename, flags)
        tail_fd = -1
        try:
            status = os.fstat(fd)
            cls._check_kind(filename, status.st_mode)
            image_locks = None
            if locking != "off":
                if locks.available(fd):
                    image_locks = ImageLocks(fd, filename)
                elif locking == "on":
                    raise OptionError("locking=on was specified, but this system has no OFD locks")
            size = os.lseek(fd, 0, os.SEEK_END)
            file: BufferedFile | DirectFile = BufferedFile(fd)
            alignment = cls._alignment(fd)
            if flags.direct:
                alignment = max(alignment, probe_alignment(fd))
                tail_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY if flags.read_only else os.O_RDWR)
                file = DirectFile(fd, tail_fd, alignment)
            regular = stat.S_ISREG(status.st_mode)
            sparse = regular and status.st_blocks * 512 < size
            queue = None
            if flags.direct and aio != "threads":
                with contextlib.suppress(OSError):  # threads do it as well
                    queue = AioQueue(fd, alignment)
            return Opened(file, flags, size, alignment, sparse, regular, image_locks, queue)
        except BaseException as error:
            if tail_fd >= 0:
                os.close(tail_fd)
            os.close(fd)
            if isinstance(error, OSError):
                raise OptionError(f"Could not open '{filename}': {error.strerror}") from None
            raise

    @classmethod
    def _open_fd(cls, filename: str, flags: OpenFlags) -> tuple[int, OpenFlags]:
        """Open with what `flags` demand; the flags that came of it."""
        mode = os.O_RDONLY if flags.read_only else os.O_RDWR
        try:
            # Looked at before, because opening a FIFO or a tape may wait or do something.
            status = os.stat(filename)
            if not stat.S_ISDIR(status.st_mode):
                cls._check_kind(filename, status.st_mode)
            fd = os.open(filename, mode | (os.O_DIRECT if flags.direct else 0))
            try:
                if not flags.read_only:
                    cls._check_writable(fd)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS) and flags.auto_read_only and not flags.read_only:
                return cls._open_fd(filename, replace(flags, read_only=True))
            if error.errno == errno.EINVAL and flags.direct:
                raise OptionError(
                    f"Could not open '{filename}': filesystem does not support O_DIRECT"
                ) from None
            raise OptionError(f"Could not open '{filename}': {error.strerror}") from None
        except ValueError as error:  # a null byte in the name
            raise OptionError(f"Could not open {filename!r}: {error}") from None
        return fd, flags

    @classmethod
    def _check_kind(cls, filename: str, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise OptionError(f"'{cls.driver_name}' driver requires '{filename}' to be a regular file")

    @classmethod
    def _check_writable(cls, fd: int) -> None:
        """Raise OSError if `fd`, although open for writing, cannot be written to."""

    @classmethod
    def _alignment(cls, fd: int) -> int:
        """What buffered requests must be multiples of, in bytes."""
        return 1

    async def _close(self) -> None:
        if self._aio is not None:
            await self._aio.stop()
            await self._run(self._aio.close)
        try:
            await self._run(self._settle)
        finally:
            await self._run(self._file.close)

    async def _permissions_changed(self, needed: Permission, shared: Permission, /) -> None:
        if self._locks is not None:
            image_locks, shared = self._locks, ALL if self.flags.force_share else shared
            await self._run(lambda: image_locks.change(needed, shared))

    # --- requests ---------------------------------------------------------------------------

    async def _run(self, function: Callable[[], T]) -> T:
        """Run `function` in one of the node's threads. A cancellation waits for its end, since it
        uses the caller's buffer and our descriptor."""
        return await trio.to_thread.run_sync(function, limiter=self._limiter)

    def _plain(self, offset: int, length: int, /) -> Sequence[Span] | None:
        if self._sparse and length >= SPARSE_READ and not self.flags.direct:
            return holes.spans(self._fd, offset, length)
        return None if self.flags.direct else [(self._fd, offset, length)]

    def _plain_write(self, offset: int, length: int, /) -> Sequence[Span] | None:
        return None if self.flags.direct else [(self._fd, offset, length)]

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        if self._aio is None or not await self._aio.read(offset, buffer):
            await self._run(lambda: self._file.read(offset, buffer))

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        if fua:
            await self._write_through(offset, data)
        else:
            await self._put(offset, data)

    async def _put(self, offset: int, data: memoryview, flags: int = 0) -> None:
        if self._aio is None or not await self._aio.write(offset, data, flags):
            await self._run(lambda: self._file.write(offset, data, flags))

    async def _write_through(self, offset: int, data: memoryview) -> None:
        if self._dsync:
            try:
                await self._put(offset, data, self._dsync)
                return
            except OSError as error:
                if error.errno == errno.EIO:
                    # The kernel tells of lost pages once: no later fdatasync would.
                    self._flush_errno = errno.EIO
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            self._dsync = 0
        await self._put(offset, data)
        await self._flush()

    async def _flush(self) -> None:
        await self._run(self._sync)

    def _sync(self) -> None:
        """fdatasync. Once it failed, the kernel takes the lost pages for clean and the next call
        would succeed; so it is not asked again."""
        self._settle()
        if not self._flush_errno:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._flush_errno = error.errno or errno.EIO
        if self._flush_errno:
            raise RequestError(self._flush_errno)

    def _grow(self, size: int, /) -> bool:
        self._grown |= self._may_grow
        return self._may_grow

    def _settle(self) -> None:
        """Give the file the length that the node has grown to. Called in a thread, while others may
        write behind that length: it must never cut the file, as ftruncate with a length that has just
        become too small would."""
        size = self.size
        if self._grown and os.fstat(self._fd).st_size < size:
            try:
                syscalls.fallocate(self._fd, 0, size - 1, 1)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                trio.from_thread.run_sync(self._extend)

    def _extend(self) -> None:
        # On the event loop nobody grows the node meanwhile, and nobody writes behind its end.
        os.ftruncate(self._fd, max(self.size, os.fstat(self._fd).st_size))

    async def _cache(self, offset: int, length: int, /) -> None:
        if not self.flags.direct:
            await self._run(lambda: os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED))

    async def _block_status(self, offset: int, length: int, /) -> list[Extent]:
        return await self._run(lambda: holes.extents(self._fd, offset, length))

    async def _discard(self, offset: int, length: int, /) -> None:
        self._sparse = True
        await self._run(lambda: self._first_of([syscalls.punch_hole], offset, length))

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        self._sparse = True
        ways = [syscalls.zero_range, _punch_and_allocate]
        if may_unmap:
            ways.insert(0, syscalls.punch_hole)
        await self._run(lambda: self._first_of(ways, offset, length))

    def _first_of(self, ways: Sequence[Callable[[int, int, int], None]], offset: int, length: int) -> None:
        """Call the first of `ways` that the system can; RequestError(ENOTSUP) if there is none."""
        for way in ways:
            try:
                way(self._fd, offset, length)
                return
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
        raise RequestError(errno.ENOTSUP)

    async def _allocated_size(self) -> int | None:
        return await self._run(lambda: os.fstat(self._fd).st_blocks * 512)

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        self._sparse = True
        await self._run(lambda: self._resize(size, preallocation))

    def _resize(self, size: int, preallocation: Preallocation) -> None:
        before = os.fstat(self._fd).st_size
        if preallocation is Preallocation.METADATA:
            raise RequestError(errno.ENOTSUP, "Unsupported preallocation mode: metadata")
        if preallocation is not Preallocation.OFF and size < before:
            raise RequestError(errno.ENOTSUP, "Cannot use preallocation for shrinking files")
        doing = "resize file" if preallocation is Preallocation.OFF else "preallocate new data"
        try:
            if preallocation is Preallocation.FALLOC and size > before:
                os.posix_fallocate(self._fd, before, size - before)
                if not before:
                    self._allocate_first_block(size)
                return
            os.ftruncate(self._fd, size)
            if not before and size:
                self._allocate_first_block(size)
            if preallocation is Preallocation.FULL:
                self._write_out_zeroes(before, size)
        except OSError as error:
            if size > before:
                os.ftruncate(self._fd, before)
            raise RequestError(error.errno or errno.EIO, f"Could not {doing}: {error.strerror}") from None

    def _allocate_first_block(self, size: int) -> None:
        """Whoever opens the file with O_DIRECT finds the alignment out by reading, which a hole at
        its start would allow at any. As QEMU does it, whose disk sizes are thus the same."""
        with contextlib.suppress(OSError):
            self._write_out_zeroes(0, _FIRST_BLOCK if size >= _FIRST_BLOCK else _SECTOR, sync=False)

    def _write_out_zeroes(self, start: int, end: int, *, sync: bool = True) -> None:
        # Through the page cache even for a direct file: the old end need not be aligned.
        fd = self._file.tail_fd if isinstance(self._file, DirectFile) else self._fd
        file = BufferedFile(fd)
        for offset in range(start, end, len(_ZEROES)):
            file.write(offset, memoryview(_ZEROES)[: end - offset])
        if sync:
            os.fdatasync(fd)


def _punch_and_allocate(fd: int, offset: int, length: int) -> None:
    """Zeroes with storage behind them, for filesystems that know holes but no ZERO_RANGE."""
    syscalls.punch_hole(fd, offset, length)
    syscalls.fallocate(fd, 0, offset, length)
