"""What the user of a node may do, and what it lets others do meanwhile.

The bits are QEMU's, because they are also byte offsets of the file locks that both of us take.
"""

from __future__ import annotations

from enum import IntFlag


class Permission(IntFlag):
    """`CONSISTENT_READ`: what is read makes sense; `WRITE`; `WRITE_UNCHANGED`: writes that do not
    alter what is visible (copy-on-read); `RESIZE`."""

    CONSISTENT_READ = 1 << 0
    WRITE = 1 << 1
    WRITE_UNCHANGED = 1 << 2
    RESIZE = 1 << 3


NONE = Permission(0)
ALL = Permission(0b1111)

# The names that QEMU's error messages use.
NAMES = {
    Permission.CONSISTENT_READ: "consistent read",
    Permission.WRITE: "write",
    Permission.WRITE_UNCHANGED: "write unchanged",
    Permission.RESIZE: "resize",
}


def names(permissions: Permission) -> str:
    return ", ".join(text for bit, text in NAMES.items() if bit & permissions)
