"""`-p`: a bar on a terminal, elsewhere the figures that scripts know from qemu-img."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

# Steps smaller than this are not worth a line; in percent.
_STEP = 1.0


class ProgressReport:
    """Is told how much is done; shows it if `shown`."""

    def __init__(self, what: str, *, shown: bool, step: float = _STEP) -> None:
        self._what = what
        self.shown = shown
        self._step = step
        self._last = -1.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressReport:
        if self.shown and sys.stdout.isatty():
            self._start_bar()
        self.update(0.0)
        return self

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=1.0)

    def update(self, done: float) -> None:
        """`done` from 0.0 to 1.0."""
        if not self.shown:
            return
        percent = min(100.0, 100.0 * done)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif percent - self._last >= self._step or self._last < 0 or (percent == 100.0 != self._last):
            self._last = percent
            sys.stdout.write(f"    ({percent:.2f}/100%)\r")
            sys.stdout.flush()

    def finish(self) -> None:
        """All is done, which is said even if the last update said it too."""
        self._last = -1.0
        self.update(1.0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.shown:
            sys.stdout.write("\n")
            sys.stdout.flush()
