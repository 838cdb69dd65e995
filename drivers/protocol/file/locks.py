"""Locks on an image file, in QEMU's scheme, so that a QEMU process and we refuse each other.

Byte 100 + i of the file is locked for every permission i that is held, byte 200 + i for every
one that is not shared with others. All locks are shared ones: a conflict is found by asking, once
one's own locks are set, whether an exclusive lock could be had. Two processes that come at the
same moment may both be refused, but never both be let in.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from drivers.block.permission import ALL, NONE, Permission, names
from drivers.errors import InUseError, OptionError

_HELD_BASE = 100
_UNSHARED_BASE = 200

# Locks of the open file description (linux/fcntl.h): unlike POSIX ones they are not lost when
# some other descriptor of the same file is closed.
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
# struct flock: type, whence, start, length, pid. The trailing 0q pads it as C does.
_FLOCK = struct.Struct("hhqqi0q")


def available(fd: int) -> bool:
    """Whether this kernel has such locks."""
    try:
        _holder_exists(fd, _HELD_BASE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _set(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _holder_exists(fd: int, byte: int) -> bool:
    """Whether somebody else has locked `byte`."""
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


class ImageLocks:
    """The locks that one open file holds. They vanish with the descriptor."""

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self._filename = filename
        self._bytes: frozenset[int] = frozenset()

    def change(self, needed: Permission, shared: Permission) -> None:
        """Hold `needed` and share only `shared`. Raises OptionError, with the locks as before,
        where another process forbids it. May block."""
        wanted = frozenset(
            base + bit
            for base, permissions in ((_HELD_BASE, needed), (_UNSHARED_BASE, ALL & ~shared))
            for bit in range(ALL.bit_length())
            if permissions >> bit & 1
        )
        before = self._bytes
        try:
            for byte in sorted(wanted - before):
                self._lock(byte)
            self._refuse_conflicts(needed, shared)
        except BaseException:
            self._unlock(self._bytes - before)
            raise
        self._unlock(before - wanted)

    def _lock(self, byte: int) -> None:
        try:
            _set(self._fd, fcntl.F_RDLCK, byte)
        except OSError as error:
            raise OptionError(f"Failed to lock byte {byte}: {error.strerror}") from None
        self._bytes |= {byte}

    def _unlock(self, surplus: frozenset[int]) -> None:
        for byte in surplus:
            _set(self._fd, fcntl.F_UNLCK, byte)
        self._bytes -= surplus

    def _refuse_conflicts(self, needed: Permission, shared: Permission) -> None:
        for base, permissions, kind in (
            (_UNSHARED_BASE, needed, ""),
            (_HELD_BASE, ALL & ~shared, "shared "),
        ):
            for bit in range(ALL.bit_length()):
                permission = permissions & Permission(1 << bit)
                if permission != NONE and _holder_exists(self._fd, base + bit):
                    raise InUseError(
                        f'Failed to get {kind}"{names(permission)}" lock\n'
                        f"Is another process using the image [{self._filename}]?"
                    )
