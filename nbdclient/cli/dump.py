"""`nbdclient dump`: sixteen bytes a line; repeated lines are folded into one `*`."""

from __future__ import annotations

import sys
from argparse import Namespace

import trio

from drivers.errors import OptionError
from nbdclient import client

_CHUNK = 256 << 10
_WIDTH = 16


def run(arguments: Namespace) -> None:
    trio.run(_dump, arguments.uri, arguments.offset, arguments.length)


async def _dump(uri: str, start: int, length: int | None) -> None:
    async with client.connect(uri, contexts=()) as disk:
        end = disk.size if length is None else start + length
        if not start <= end <= disk.size:
            raise OptionError(f"the range ends behind the export, which has {disk.size} bytes")
        printer = _Printer(start)
        block = disk.minimum_block
        offset = start
        while offset < end:
            stop = min(end, offset - offset % _CHUNK + _CHUNK)
            first, last = offset - offset % block, min(disk.size, -(-stop // block) * block)
            data = await disk.read(first, last - first)
            printer.feed(data[offset - first : stop - first])
            offset = stop
        printer.finish()


class _Printer:
    """Lines of hexadecimal; what is fed must come in multiples of a line, but for the end."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._rest = b""
        self._last: bytes | None = None
        self._folding = False

    def feed(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) - len(data) % _WIDTH
        lines: list[str] = []
        for at in range(0, whole, _WIDTH):
            line = data[at : at + _WIDTH]
            if line == self._last:
                if not self._folding:
                    lines.append("*\n")
                self._folding = True
            else:
                lines.append(_line(self._offset, line))
                self._folding = False
            self._last = line
            self._offset += _WIDTH
        self._rest = data[whole:]
        sys.stdout.write("".join(lines))

    def finish(self) -> None:
        if self._rest:
            sys.stdout.write(_line(self._offset, self._rest))
        print(f"{self._offset + len(self._rest):010x}")


def _line(offset: int, data: bytes) -> str:
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
    halves = f"{data[:8].hex(' ')}  {data[8:].hex(' ')}"
    return f"{offset:010x}  {halves:<48}  |{text}|\n"
