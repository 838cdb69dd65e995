"""Sizes a node promises or demands, all in bytes."""

from __future__ import annotations

from dataclasses import dataclass

# One request through a node: larger ones are the caller's to split.
MAX_REQUEST = 64 << 20

# The largest image: what fits a signed 64-bit offset with room for rounding, as in QEMU.
MAX_SIZE = (1 << 63) - (1 << 30)


@dataclass(frozen=True, slots=True)
class Limits:
    """`request_alignment` is a power of two: a driver's hooks see only multiples of it (a request
    that ends at the node's size may be shorter). The others are hints to whoever sends requests.
    """

    request_alignment: int = 1
    preferred_block: int = 4096
    max_transfer: int = 32 << 20
