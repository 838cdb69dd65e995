"""`nbdimg map`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivers.errors import OptionError
from drivers.options.argv import Opt
from nbdclient.image.arguments import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    MAX_INT64,
    OBJECT,
    OUTPUT,
    Given,
    number,
    parse,
)

if TYPE_CHECKING:
    from drivers.block.node import Node
    from nbdclient.image.mapping import Run
    from nbdclient.image.session import Images

TABLE = (
    FORMAT,
    OUTPUT,
    Opt("start-offset", "s", takes_value=True),
    Opt("max-length", "l", takes_value=True),
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
)


def run(arguments: Sequence[str]) -> int:
    given = parse("map", TABLE, arguments)
    start = number("start offset", given.values.get("start-offset", "0"))
    length = number("max length", given.values.get("max-length", str(MAX_INT64)))
    as_json = given.json
    filename = given.one_image()
    from nbdclient.image import session

    async def command(images: Images) -> None:
        await _map(images, given, filename, start, length, as_json=as_json)

    session.run(command, given.objects, untrusted=given.untrusted)
    return 0


async def _map(
    images: Images, given: Given, filename: str, start: int, length: int, *, as_json: bool
) -> None:
    from nbdclient.image.mapping import Run, runs
    from nbdclient.image.session import guest_size

    node = await images.open(
        filename, given.format, image_opts=given.image_opts, force_share=given.force_share
    )
    lines = _Json() if as_json else _Table(node)
    # What is printed where there is nothing to map.
    last = Run(start, 0, 0, False, False, False, False, None)
    async for run in runs(node, start, min(guest_size(node), start + length)):
        seen = lines.seen(run)
        if last.length and seen.continues(last):
            last = last._replace(length=last.length + seen.length)
        else:
            if last.length:
                lines.show(last)
            last = seen
    lines.end(last)


class _Table:
    """The data, for people: where it lies in which file."""

    def __init__(self, node: Node) -> None:
        from nbdclient.image.description import display_name
        from nbdclient.image.session import chain

        self._names = [display_name(layer) or layer.name for layer in chain(node)]
        print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")

    def seen(self, run: Run) -> Run:
        # Whatever is not data is left out: no need to tell one kind from the other.
        return run if run.data and not run.zero else run._replace(data=False, zero=True)

    def show(self, run: Run) -> None:
        if run.data and not run.zero:
            if run.host_offset is None:
                raise OptionError("File contains external, encrypted or compressed clusters.")
            numbers = (f"{_hexadecimal(n):<16}" for n in (run.start, run.length, run.host_offset))
            print("".join(numbers) + self._names[run.layer])

    def end(self, run: Run) -> None:
        self.show(run)


def _hexadecimal(number: int) -> str:
    """As C's %#x."""
    return f"{number:#x}" if number else "0"


class _Json:
    def __init__(self) -> None:
        self._lead = "["

    def seen(self, run: Run) -> Run:
        return run

    def _text(self, run: Run) -> str:
        present, zero, data = (str(flag).lower() for flag in (run.present, run.zero, run.data))
        offset = "" if run.host_offset is None else f', "offset": {run.host_offset}'
        lead, self._lead = self._lead, ""
        return (
            f'{lead}{{ "start": {run.start}, "length": {run.length}, "depth": {run.layer}, '
            f'"present": {present}, "zero": {zero}, "data": {data}{offset}}}'
        )

    def show(self, run: Run) -> None:
        print(f"{self._text(run)},")

    def end(self, run: Run) -> None:
        print(f"{self._text(run)}]")
