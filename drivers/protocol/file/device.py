"""The `host_device` driver: an image on a block device of this host."""

from __future__ import annotations

import errno
import os
import stat

from drivers.block.node import Preallocation
from drivers.errors import OptionError, RequestError
from drivers.protocol.file import syscalls
from drivers.protocol.file.driver import FileNode


class HostDeviceNode(FileNode):
    """As FileNode, with the device's ways to discard and to zero. Its logical block is the
    request alignment, since the kernel discards and zeroes nothing smaller."""

    driver_name = "host_device"

    @classmethod
    def _check_kind(cls, filename: str, mode: int) -> None:
        if not stat.S_ISBLK(mode):
            raise OptionError(f"'{cls.driver_name}' driver requires '{filename}' to be a block device")

    @classmethod
    def _check_writable(cls, fd: int) -> None:
        # Opening a write-protected device for writing succeeds.
        if syscalls.device_is_read_only(fd):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    @classmethod
    def _alignment(cls, fd: int) -> int:
        return syscalls.device_block_size(fd)

    async def _discard(self, offset: int, length: int, /) -> None:
        await self._run(lambda: self._first_of([syscalls.device_discard], offset, length))

    async def _write_zeroes(self, offset: int, length: int, /, *, may_unmap: bool, fast: bool) -> None:
        # Punching fails where the device would have to write; the others then write in the kernel.
        ways = [] if fast else [syscalls.zero_range, syscalls.device_zero]
        if may_unmap:
            ways.insert(0, syscalls.punch_hole)
        await self._run(lambda: self._first_of(ways, offset, length))

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        if preallocation is not Preallocation.OFF:
            raise RequestError(
                errno.ENOTSUP,
                f"Preallocation mode '{preallocation.value}' unsupported for this non-regular file",
            )
        if size > self.size:
            raise RequestError(errno.EINVAL, "Cannot grow device files")
        if size < self.size:
            raise RequestError(errno.ENOTSUP, "Cannot resize device files")
