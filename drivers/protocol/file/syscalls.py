"""System calls that Python's os module does not offer. All of them may block."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# linux/fs.h
_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_XFLAG_EXTSIZE = 0x00000800
# struct fsxattr: flags, extent size hint, extents, project, copy-on-write hint, padding.
_FSXATTR = struct.Struct("=5I8x")

_libc = ctypes.CDLL(None, use_errno=True)
# Where off_t may have 32 bits, the variant with 64 has a name of its own.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError."""
    while _fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    fallocate(fd, FALLOC_FL_ZERO_RANGE, offset, length)


def _device_integer(fd: int, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def device_is_read_only(fd: int) -> bool:
    return bool(_device_integer(fd, _BLKROGET))


def device_block_size(fd: int) -> int:
    """The logical block size, bytes."""
    return _device_integer(fd, _BLKSSZGET)


def device_discard(fd: int, offset: int, length: int) -> None:
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", offset, length))


def device_zero(fd: int, offset: int, length: int) -> None:
    """Zero the range, by writing where the device has no better way."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))


def turn_off_copy_on_write(fd: int) -> None:
    """On filesystems that can (btrfs), for a file that is still empty. Others go on as they are."""
    with contextlib.suppress(OSError):
        (flags,) = struct.unpack("l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, struct.pack("l", 0)))
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", flags | _FS_NOCOW_FL))


def hint_extent_size(fd: int, size: int) -> None:
    """Have storage allocated in steps of `size` bytes, on filesystems that can (XFS)."""
    with contextlib.suppress(OSError, struct.error):
        flags, _, *rest = _FSXATTR.unpack(fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
        fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(flags | _FS_XFLAG_EXTSIZE, size, *rest))
