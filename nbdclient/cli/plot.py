"""`nbdclient map --plot`: the disk as a bar, from its first byte on the left to its last.

Where a column or cell covers several kinds, it has their mixed colour.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple
from xml.sax.saxutils import escape

from drivers.errors import OptionError
from drivers.units import format_size

Colour = tuple[int, int, int]

_COLOURS: dict[str, Colour] = {
    "data": (31, 119, 180),
    "local": (31, 119, 180),
    "dirty": (214, 39, 40),
    "zero": (174, 199, 232),
    "hole,zero": (225, 225, 225),
    "hole": (158, 158, 158),
    "unallocated": (225, 225, 225),
    "clean": (225, 225, 225),
}
# Where there are no colours.
_SIGNS = {
    "data": "#",
    "local": "#",
    "dirty": "#",
    "zero": "-",
    "hole,zero": ".",
    "hole": "o",
    "unallocated": ".",
    "clean": ".",
}
# For kinds without a colour of their own, in the order in which they come.
_OTHERS: tuple[Colour, ...] = (
    (255, 127, 14),
    (44, 160, 44),
    (148, 103, 189),
    (227, 119, 194),
    (188, 189, 34),
    (23, 190, 207),
)
_WIDTH, _HEIGHT, _MARGIN = 1000, 60, 10
_LEGEND_LINE = 24
# More rectangles than this no viewer likes; then columns are drawn instead.
_MAX_RECTANGLES = 20_000


class Picture:
    """`extents` are (offset, length, kind), in order, and fill `size` bytes."""

    def __init__(self, size: int, extents: list[tuple[int, int, str]]) -> None:
        self.size = size
        self.extents = extents
        self.totals: dict[str, int] = {}
        for _, length, kind in extents:
            self.totals[kind] = self.totals.get(kind, 0) + length
        unnamed = [kind for kind in self.totals if kind not in _COLOURS]
        self.colours = {kind: _COLOURS[kind] for kind in self.totals if kind in _COLOURS}
        self.colours |= {kind: _OTHERS[at % len(_OTHERS)] for at, kind in enumerate(unnamed)}

    def columns(self, count: int) -> list[Colour]:
        """The colours of `count` columns of equal width."""
        mixed = [[0.0, 0.0, 0.0] for _ in range(count)]
        for offset, length, kind in self.extents:
            start, end = offset * count / self.size, (offset + length) * count / self.size
            for column in range(int(start), min(count, int(end) + 1)):
                share = min(end, column + 1) - max(start, column)
                for part, value in enumerate(self.colours[kind]):
                    mixed[column][part] += value * share
        return [tuple(min(255, round(value)) for value in colour) for colour in mixed]  # type: ignore[misc]

    def legend(self) -> Iterator[tuple[Colour, str]]:
        for kind, length in self.totals.items():
            yield self.colours[kind], f"{kind}  {format_size(length)}  {100 * length / self.size:.1f}%"


class _Layout(NamedTuple):
    width: int
    height: int


def draw(picture: Picture, where: str) -> None:
    """Draw into the terminal for "-", else into a file named .svg or .png."""
    if not picture.size:
        raise OptionError("there is nothing to draw: the export is empty")
    kind = os.path.splitext(where)[1].lower()
    if where == "-":
        _draw_terminal(picture)
    elif kind == ".svg":
        with open(where, "w", encoding="utf-8") as file:
            file.write(svg(picture))
    elif kind == ".png":
        with open(where, "wb") as file:
            file.write(png(picture))
    else:
        raise OptionError(f"--plot writes .svg and .png files, not '{where}'")


def _draw_terminal(picture: Picture) -> None:
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    console = Console(highlight=False)
    # Without colours the kinds need signs.
    coloured = console.color_system is not None
    signs = {kind: "█" if coloured else _SIGNS.get(kind, "?") for kind in picture.totals}
    unnamed = (kind for kind, sign in signs.items() if sign == "?")
    signs |= {kind: "+=*~%@"[at % 6] for at, kind in enumerate(unnamed)}
    width = max(10, console.width - 2)
    bar = Text()
    if coloured:
        for red, green, blue in picture.columns(width):
            bar.append("█", Style(color=f"rgb({red},{green},{blue})"))
    else:
        bar.append("".join(signs[kind] for kind in _dominant(picture, width)))
    for _ in range(2):
        console.print(bar)
    console.print(f"0{format_size(picture.size):>{width - 1}}")
    for (colour, text), sign in zip(picture.legend(), signs.values(), strict=True):
        console.print(Text(sign, Style(color="rgb({},{},{})".format(*colour))), text)


def _dominant(picture: Picture, count: int) -> list[str]:
    """The kind that fills most of each column."""
    best: list[tuple[float, str]] = [(0.0, "")] * count
    shares: dict[tuple[int, str], float] = {}
    for offset, length, kind in picture.extents:
        start, end = offset * count / picture.size, (offset + length) * count / picture.size
        for column in range(int(start), min(count, int(end) + 1)):
            share = shares.get((column, kind), 0.0) + min(end, column + 1) - max(start, column)
            shares[column, kind] = share
            best[column] = max(best[column], (share, kind))
    return [kind for _, kind in best]


def svg(picture: Picture) -> str:
    """An SVG document."""
    layout = _layout(picture)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{layout.width}" height="{layout.height}" '
        f'font-family="sans-serif" font-size="13">',
        f'<rect width="{layout.width}" height="{layout.height}" fill="white"/>',
    ]
    if len(picture.extents) <= _MAX_RECTANGLES:
        scale = _WIDTH / picture.size
        for offset, length, kind in picture.extents:
            parts.append(
                f'<rect x="{_MARGIN + offset * scale:.3f}" y="{_MARGIN}" width="{length * scale:.3f}" '
                f'height="{_HEIGHT}" fill="{_hex(picture.colours[kind])}">'
                f"<title>{escape(kind)}: {length} bytes at {offset}</title></rect>"
            )
    else:
        for at, colour in enumerate(picture.columns(_WIDTH)):
            parts.append(
                f'<rect x="{_MARGIN + at}" y="{_MARGIN}" width="1" height="{_HEIGHT}" fill="{_hex(colour)}"/>'
            )
    for line, (colour, text) in enumerate(picture.legend()):
        y = 2 * _MARGIN + _HEIGHT + line * _LEGEND_LINE
        parts.append(
            f'<rect x="{_MARGIN}" y="{y}" width="16" height="16" fill="{_hex(colour)}" stroke="black" '
            f'stroke-width="0.5"/><text x="{_MARGIN + 24}" y="{y + 13}">{escape(text)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def png(picture: Picture) -> bytes:
    """A PNG file."""
    width, height = _layout(picture)
    pixels = bytearray(b"\xff" * (width * height * 3))

    def fill(x: int, y: int, wide: int, high: int, colour: Colour) -> None:
        row = bytes(colour) * wide
        for line in range(y, y + high):
            start = (line * width + x) * 3
            pixels[start : start + len(row)] = row

    for at, colour in enumerate(picture.columns(_WIDTH)):
        fill(_MARGIN + at, _MARGIN, 1, _HEIGHT, colour)
    for line, (colour, text) in enumerate(picture.legend()):
        y = 2 * _MARGIN + _HEIGHT + line * _LEGEND_LINE
        fill(_MARGIN, y, 16, 16, (0, 0, 0))
        fill(_MARGIN + 1, y + 1, 14, 14, colour)
        for at, letter in enumerate(text.upper()[:100]):
            for row, bits in enumerate(_FONT.get(letter, _FONT["-"])):
                for column in range(3):
                    if int(bits) & (4 >> column):
                        fill(_MARGIN + 24 + 8 * at + 2 * column, y + 3 + 2 * row, 2, 2, (0, 0, 0))
    rows = b"".join(b"\0" + pixels[start : start + width * 3] for start in range(0, len(pixels), width * 3))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _layout(picture: Picture) -> _Layout:
    return _Layout(_WIDTH + 2 * _MARGIN, _HEIGHT + 3 * _MARGIN + len(picture.totals) * _LEGEND_LINE)


def _hex(colour: Colour) -> str:
    return "#" + bytes(colour).hex()


# Letters of three by five dots: each digit is a row, its bits the dots.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.%,():-/ "
_SHAPES = (
    "25755656563444365556746477464434553557557222711152556554444757755"
    "65555255526564425573656553421672222555575555255775552555522271247"
    "75557262276124761216557117461634757712227575775716"
    "000025124500024122214222402020007001124400000"
)
_FONT = {letter: _SHAPES[5 * at : 5 * at + 5] for at, letter in enumerate(_LETTERS)}
