"""What a copy reads from and writes to: NBD exports, local files and devices, pipes, nothing."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple, Protocol

import trio

from drivers.errors import OptionError, RequestError
from drivers.net.stream import Buffer
from drivers.wire.nbd.constants import BASE_ALLOCATION, AllocationState
from nbdclient import client

_ZEROES = bytes(1 << 20)
_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.ENOTTY)


class Piece(NamedTuple):
    """`length` bytes at `offset`: zeroes, or `data`, which is None if it is still to be read."""

    offset: int
    length: int
    zero: bool = False
    data: bytes | None = None


class Source(Protocol):
    """`size` is None where only the end will tell; then the pieces carry their data."""

    name: str
    size: int | None
    block: int

    def pieces(self) -> AsyncIterator[Piece]:
        """All of it, in order."""
        ...

    async def read_into(self, offset: int, view: memoryview) -> None: ...


class Target(Protocol):
    """`ordered`: pieces must be written one after the other. `is_zero`: it reads as zeroes before
    anything is written. `discards`: nothing needs to be written at all."""

    name: str
    block: int
    ordered: bool
    is_zero: bool
    discards: bool

    async def prepare(self, size: int | None) -> None:
        """Make room for `size` bytes. Raises OptionError where they do not fit."""
        ...

    async def write(self, offset: int, data: Buffer) -> None: ...

    async def zero(self, offset: int, length: int) -> None: ...

    async def finish(self, size: int, *, flush: bool) -> None:
        """Everything is written: `size` bytes."""
        ...


class NbdEndpoint:
    """An export, as source or target."""

    ordered = False
    discards = False

    def __init__(self, disk: client.Disk, name: str, *, allocated: bool, is_zero: bool) -> None:
        self.disk = disk
        self.name = name
        self.size: int | None = disk.size
        self.block = disk.minimum_block
        self.is_zero = is_zero
        self._allocated = allocated

    async def pieces(self) -> AsyncIterator[Piece]:
        if BASE_ALLOCATION not in self.disk.contexts:
            yield Piece(0, self.disk.size)
            return
        async for offset, length, status in self.disk.extents():
            yield Piece(offset, length, zero=bool(status & AllocationState.ZERO))

    async def read_into(self, offset: int, view: memoryview) -> None:
        await self.disk.read_into(offset, view)

    async def prepare(self, size: int | None) -> None:
        if self.disk.read_only:
            raise OptionError(f"{self.name} is read-only")
        if size is not None and size > self.disk.size:
            raise OptionError(f"{self.name} is too small: {self.disk.size} bytes for {size}")

    async def write(self, offset: int, data: Buffer) -> None:
        await self.disk.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        if self.disk.can_zero:
            await self.disk.zero(offset, length, no_hole=self._allocated)
            return
        while length:
            count = min(length, len(_ZEROES))
            await self.disk.write(offset, memoryview(_ZEROES)[:count])
            offset, length = offset + count, length - count

    async def finish(self, size: int, *, flush: bool) -> None:
        if flush and self.disk.can_flush:
            await self.disk.flush()


class FileSource:
    """A regular file or a block device."""

    block = 1

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self.size: int | None = os.lseek(fd, 0, os.SEEK_END)
        self._flags = getattr(os, "RWF_NOWAIT", 0)

    async def pieces(self) -> AsyncIterator[Piece]:
        size = self.size or 0
        offset = 0
        while offset < size:
            try:
                data = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno not in (errno.ENXIO, *_NOT_HERE):
                    raise
                data = size if error.errno == errno.ENXIO else offset
            if data > offset:
                yield Piece(offset, min(data, size) - offset, zero=True)
                offset = data
            if offset < size:
                try:
                    hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
                except OSError:
                    hole = size
                end = min(hole, size) if hole > offset else size
                yield Piece(offset, end - offset)
                offset = end

    async def read_into(self, offset: int, view: memoryview) -> None:
        while view:
            try:
                count = os.preadv(self._fd, [view], offset, self._flags)
            except BlockingIOError:
                # Not in the page cache: waiting for the disk is a thread's work.
                count = await trio.to_thread.run_sync(os.preadv, self._fd, [view], offset)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP or not self._flags:
                    raise
                self._flags = 0
                continue
            if not count:
                raise RequestError(errno.EIO, "the file became shorter")
            view = view[count:]
            offset += count


class FileTarget:
    """A regular file, made as long as the source, or a block device."""

    ordered = False
    discards = False
    block = 1

    def __init__(self, fd: int, name: str, *, regular: bool, allocated: bool, is_zero: bool) -> None:
        self.name = name
        self.is_zero = is_zero
        self._fd = fd
        self._regular = regular
        self._allocated = allocated

    async def prepare(self, size: int | None) -> None:
        if self._regular:
            os.ftruncate(self._fd, 0)
            if size is not None:
                os.ftruncate(self._fd, size)
            self.is_zero = not self._allocated
            return
        available = os.lseek(self._fd, 0, os.SEEK_END)
        if size is not None and size > available:
            raise OptionError(f"{self.name} is too small: {available} bytes for {size}")

    async def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    async def zero(self, offset: int, length: int) -> None:
        # ctypes takes its time to load; most copies make no holes.
        from drivers.protocol.file import syscalls

        try:
            make = syscalls.zero_range if self._allocated else syscalls.punch_hole
            await trio.to_thread.run_sync(make, self._fd, offset, length)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            while length:
                count = min(length, len(_ZEROES))
                await self.write(offset, memoryview(_ZEROES)[:count])
                offset, length = offset + count, length - count

    async def finish(self, size: int, *, flush: bool) -> None:
        if self._regular:
            os.ftruncate(self._fd, size)
        if flush:
            await trio.to_thread.run_sync(os.fsync, self._fd)


class PipeSource:
    """Whatever comes out of a descriptor, until it ends."""

    size: int | None = None
    block = 1

    def __init__(self, fd: int, name: str, chunk: int) -> None:
        self.name = name
        self._fd = fd
        self._chunk = chunk

    async def pieces(self) -> AsyncIterator[Piece]:
        offset = 0
        while data := await trio.to_thread.run_sync(self._read, abandon_on_cancel=True):
            yield Piece(offset, len(data), data=data)
            offset += len(data)

    def _read(self) -> bytes:
        parts: list[bytes] = []
        missing = self._chunk
        while missing and (part := os.read(self._fd, missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    async def read_into(self, offset: int, view: memoryview) -> None:
        raise AssertionError("a pipe's pieces carry their data")


class PipeTarget:
    """A descriptor that takes bytes in their order only."""

    ordered = True
    is_zero = False
    discards = False
    block = 1

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd

    async def prepare(self, size: int | None) -> None:
        pass

    async def write(self, offset: int, data: Buffer) -> None:
        await trio.to_thread.run_sync(self._write, data, abandon_on_cancel=True)

    def _write(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    async def zero(self, offset: int, length: int) -> None:
        while length:
            count = min(length, len(_ZEROES))
            await self.write(offset, memoryview(_ZEROES)[:count])
            offset, length = offset + count, length - count

    async def finish(self, size: int, *, flush: bool) -> None:
        pass


class NullTarget:
    """Takes everything and keeps nothing."""

    ordered = False
    is_zero = True
    discards = True
    block = 1

    def __init__(self, name: str) -> None:
        self.name = name

    async def prepare(self, size: int | None) -> None:
        pass

    async def write(self, offset: int, data: Buffer) -> None:
        pass

    async def zero(self, offset: int, length: int) -> None:
        pass

    async def finish(self, size: int, *, flush: bool) -> None:
        pass


async def open_source(text: str, stack: AsyncExitStack, *, connections: int, request_size: int) -> Source:
    """An NBD URI, "-" for standard input, or a path. `stack` closes it."""
    if is_nbd(text):
        disk = await stack.enter_async_context(client.connect(text, connections=connections))
        return NbdEndpoint(disk, text, allocated=False, is_zero=False)
    if text == "-":
        return PipeSource(0, "standard input", request_size)
    fd = _open(text, os.O_RDONLY, stack)
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind) or stat.S_ISBLK(kind):
        return FileSource(fd, text)
    if stat.S_ISDIR(kind):
        raise OptionError(f"{text} is a directory")
    return PipeSource(fd, text, request_size)


async def open_target(
    text: str, stack: AsyncExitStack, *, connections: int, allocated: bool, is_zero: bool, source: str
) -> Target:
    """An NBD URI, "-" for standard output, "null:", or a path, whose file is made if need be.
    A file that is `source` too is refused."""
    if is_nbd(text):
        disk = await stack.enter_async_context(client.connect(text, contexts=(), connections=connections))
        return NbdEndpoint(disk, text, allocated=allocated, is_zero=is_zero)
    if text == "-":
        return PipeTarget(1, "standard output")
    if text == "null:":
        return NullTarget(text)
    if not is_nbd(source) and source != "-" and _same_file(source, text):
        raise OptionError(f"{text} is the source too")
    fd = _open(text, os.O_WRONLY | os.O_CREAT, stack)
    found = os.fstat(fd)
    if stat.S_ISCHR(found.st_mode) and found.st_rdev == os.stat(os.devnull).st_rdev:
        return NullTarget(text)
    if stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode):
        regular = stat.S_ISREG(found.st_mode)
        return FileTarget(fd, text, regular=regular, allocated=allocated, is_zero=is_zero)
    return PipeTarget(fd, text)


def is_nbd(text: str) -> bool:
    scheme, colon, _ = text.partition(":")
    return bool(colon) and scheme.lower() in ("nbd", "nbds", "nbd+tcp", "nbd+unix", "nbds+unix", "nbds+tcp")


def _same_file(first: str, second: str) -> bool:
    return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)


def _open(path: str, flags: int, stack: AsyncExitStack) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from None
    stack.callback(os.close, fd)
    return fd
