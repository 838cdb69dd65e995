"""`nbdclient map`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

import trio

from drivers.errors import OptionError
from drivers.units import format_size
from drivers.wire.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP_PREFIX
from nbdclient import client
from nbdclient.client import Extent

_ALLOCATION = {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}


def run(arguments: Namespace) -> None:
    extents, size = trio.run(_extents, arguments.uri, arguments.context)
    context = arguments.context
    if arguments.plot:
        import nbdclient.cli.plot as plot

        picture = plot.Picture(size, [(e.offset, e.length, describe(context, e.status)) for e in extents])
        plot.draw(picture, arguments.plot)
    elif arguments.json:
        rows = [
            {
                "offset": extent.offset,
                "length": extent.length,
                "type": extent.status,
                "description": describe(context, extent.status),
            }
            for extent in extents
        ]
        json.dump(rows, sys.stdout, indent=1)
        print()
    elif arguments.totals:
        _print_totals(context, extents, size)
    else:
        for offset, length, status in extents:
            print(f"{offset:>15} {length:>15}  {status:>3}  {describe(context, status)}")


async def _extents(uri: str, context: str) -> tuple[list[Extent], int]:
    async with client.connect(uri, contexts=(context,)) as disk:
        if disk.size and context not in disk.contexts:
            raise OptionError(f"the server does not offer the context '{context}' for this export")
        return [extent async for extent in disk.extents(context)], disk.size


def _print_totals(context: str, extents: list[Extent], size: int) -> None:
    totals: dict[int, int] = {}
    for extent in extents:
        totals[extent.status] = totals.get(extent.status, 0) + extent.length
    for status, length in sorted(totals.items()):
        share = 100 * length / size
        text = describe(context, status)
        print(f"{length:>15} {format_size(length):>10} {share:5.1f}%  {status:>3}  {text}")


def describe(context: str, status: int) -> str:
    """A status of `context` in words."""
    if context == BASE_ALLOCATION:
        return _ALLOCATION.get(status, f"unknown {status}")
    if context.startswith(DIRTY_BITMAP_PREFIX):
        return "dirty" if status & 1 else "clean"
    if context == ALLOCATION_DEPTH:
        return {0: "unallocated", 1: "local"}.get(status, f"backing depth {status}")
    return str(status)
