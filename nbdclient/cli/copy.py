"""`nbdclient copy`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from nbdclient.copy import CopyOptions, Progress, copy


def run(arguments: Namespace) -> None:
    options = CopyOptions(
        connections=arguments.connections,
        requests=arguments.requests,
        request_size=arguments.request_size,
        allocated=arguments.allocated,
        destination_is_zero=arguments.destination_is_zero,
        flush=arguments.flush,
    )
    shown = arguments.progress or (sys.stderr.isatty() and not arguments.quiet)
    with _bar(arguments.progress) if shown else _nothing() as report:
        trio.run(copy, arguments.source, arguments.target, options, report)


@contextmanager
def _nothing() -> Iterator[Callable[[Progress], object]]:
    yield lambda _: None


@contextmanager
def _bar(forced: bool) -> Iterator[Callable[[Progress], object]]:
    """A progress bar on standard error, with the rate and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskProgressColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    bar = Bar(
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True, force_terminal=forced or None),
    )
    with bar:
        task = bar.add_task("copy", total=None)
        yield lambda progress: bar.update(task, completed=progress.done, total=progress.total)
