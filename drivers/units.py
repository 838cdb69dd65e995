"""Sizes as people write them, to and from bytes."""

from __future__ import annotations

import re

from drivers.errors import OptionError

_SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_DECIMAL = re.compile(r"\s*\+?(\d+)(\.\d*)?([bkmgtpe]?)", re.IGNORECASE)
_HEX = re.compile(r"\s*\+?0x([0-9a-f]+)", re.IGNORECASE)


def parse_size(text: str, *, unit: str = "b") -> int:
    """Bytes of a size in QEMU's notation: 4096, 64k, 1.5G, 0x200; suffixes b k M G T P E.

    `unit` is the suffix assumed where none stands. Fractions need a suffix above b and round down
    to whole bytes; hexadecimal takes no suffix. Raises OptionError; more than 2^64-1 is refused.
    """
    if hexadecimal := _HEX.fullmatch(text):
        value = int(hexadecimal[1], 16)
    elif decimal := _DECIMAL.fullmatch(text):
        shift = _SUFFIXES[(decimal[3] or unit).lower()]
        value = int(decimal[1]) << shift
        fraction = decimal[2] or ""
        if len(fraction) > 1:
            if not shift:
                raise OptionError(f"'{text}' is not a size: a fraction of a byte")
            digits = fraction[1:19]  # more digits than bytes can show
            value += (int(digits) << shift) // 10 ** len(digits)
        elif fraction and not shift:
            raise OptionError(f"'{text}' is not a size")
    else:
        raise OptionError(
            f"'{text}' is not a size: write a number of bytes, or with a suffix k, M, G, T, P or E"
        )
    if value >= 1 << 64:
        raise OptionError(f"'{text}' is too large: sizes end below 16E")
    return value


def format_size(size: int) -> str:
    """`size` bytes for people, in QEMU's style: 0 B, 512 B, 1.5 KiB, 10 GiB; three digits."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    suffixes = iter("KMGTPE")
    suffix = ""
    while value >= 1000:
        value /= 1024
        suffix = next(suffixes)
    return f"{value:.3g} {suffix}iB"
