"""Telling an image's format from its first bytes.

Formats that no driver reads yet are known here too: an image of one must never be taken for raw,
and nobody who writes to a probed raw image may turn it into one (CVE-2008-2004).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# So many bytes from the start decide (QEMU's BLOCK_PROBE_BUF_SIZE).
PROBE_SIZE = 512


class Signature(NamedTuple):
    driver: str
    matches: Callable[[bytes], bool]


def _cloop(head: bytes) -> bool:
    return head.startswith(
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
    )


def _bochs(head: bytes) -> bool:
    return head.startswith(b"Bochs Virtual HD Image\0") and head[32:].startswith(b"Redolog\0")


def _vmdk_descriptor(head: bytes) -> bool:
    """A text descriptor: after comments and blank lines comes the version."""
    for line in head.split(b"\n"):
        line = line.strip()
        if line and not line.startswith(b"#"):
            return line.startswith((b"version=1", b"version=2", b"version=3"))
    return False


def _vmdk(head: bytes) -> bool:
    return head.startswith((b"KDMV", b"COWD")) or _vmdk_descriptor(head)


SIGNATURES = (
    Signature("qcow2", lambda head: head.startswith(b"QFI\xfb") and head[4:8] >= b"\0\0\0\x02"),
    Signature("qcow", lambda head: head.startswith(b"QFI\xfb\0\0\0\x01")),
    Signature("qed", lambda head: head.startswith(b"QED\0")),
    Signature("luks", lambda head: head.startswith(b"LUKS\xba\xbe\0\x01")),
    Signature("vdi", lambda head: head[64:68] == b"\x7f\x10\xda\xbe"),
    Signature("vmdk", _vmdk),
    Signature("vpc", lambda head: head.startswith(b"conectix")),
    Signature("vhdx", lambda head: head.startswith(b"vhdxfile")),
    Signature("parallels", lambda head: head.startswith((b"WithoutFreeSpace", b"WithouFreSpacExt"))),
    Signature("bochs", _bochs),
    Signature("cloop", _cloop),
)


def probe(head: bytes) -> str:
    """The name of the format that begins with `head`, or "raw"."""
    for signature in SIGNATURES:
        if signature.matches(head[:PROBE_SIZE]):
            return signature.driver
    return "raw"
