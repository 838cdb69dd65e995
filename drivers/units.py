"""Sizes as people write them, to and from bytes; numbers as C programs read them."""

from __future__ import annotations

import re

from drivers.errors import OptionError


class TooLargeError(OptionError):
    """A size beyond what 64 bits hold."""


_SUFFIXES = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_DECIMAL = re.compile(r"\s*\+?(\d{1,1000})(\.\d{0,1000})?([bkmgtpe]?)", re.IGNORECASE | re.ASCII)
# b and e are digits here, so they cannot be suffixes.
_HEX = re.compile(r"\s*\+?0x([0-9a-f]{1,1000})([kmgtp]?)", re.IGNORECASE | re.ASCII)
_C_NUMBER = re.compile(
    r"\s*(?P<sign>[+-]?)(?:0x(?P<hex>[0-9a-f]{1,1000})|0(?P<octal>[0-7]{0,1000})|(?P<decimal>[1-9][0-9]{0,1000}))",
    re.IGNORECASE | re.ASCII,
)


def parse_size(text: str, *, unit: str = "b") -> int:
    """Bytes of a size in QEMU's notation: 4096, 64k, 1.5G, 0x200; suffixes b k M G T P E.

    `unit` is the suffix assumed where none stands. Fractions need a suffix above b and round down
    to whole bytes. Raises OptionError, for more than 2^64-1 TooLargeError.
    """
    if hexadecimal := _HEX.fullmatch(text):
        value = int(hexadecimal[1], 16) << _SUFFIXES[(hexadecimal[2] or unit).lower()]
    elif decimal := _DECIMAL.fullmatch(text):
        shift = _SUFFIXES[(decimal[3] or unit).lower()]
        # QEMU's fractions are doubles; with ours as floats the last byte agrees with it.
        fraction = float("0" + (decimal[2] or ""))
        if fraction and not shift:
            raise OptionError(f"'{text}' is not a size: a fraction of a byte")
        value = (int(decimal[1]) << shift) + int(fraction * (1 << shift))
    else:
        raise OptionError(
            f"'{text[:100]}' is not a size: write a number of bytes, or with a suffix k, M, G, T, P or E"
        )
    if value >= 1 << 64:
        raise TooLargeError(f"'{text[:100]}' is too large: sizes end below 16E")
    return value


def parse_number(text: str, *, low: int = 0, high: int) -> int | None:
    """A whole number as strtol() with base 0 reads it: decimal, 0x hexadecimal or 0 octal. None if
    it is no number, or not within `low` and `high`."""
    match = _C_NUMBER.fullmatch(text)
    if match is None:
        return None
    if match["hex"]:
        value = int(match["hex"], 16)
    elif match["decimal"]:
        value = int(match["decimal"])
    else:
        value = int(match["octal"] or "0", 8)
    if match["sign"] == "-":
        value = -value
    return value if low <= value <= high else None


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
