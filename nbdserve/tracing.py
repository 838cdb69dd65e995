"""Where trace events go. structlog is imported only if an event is wanted at all."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from drivers.errors import OptionError
from nbdserve.settings import TraceSettings
from nbdserve.trace import selected, trace, unknown

if TYPE_CHECKING:
    import structlog


def set_up(settings: TraceSettings, *, warn: Callable[[str], object]) -> TextIO:
    """Switch on the events that the user wants; the stream they go to.

    Raises OptionError if the file cannot be written.
    """
    for pattern in settings.patterns:
        if unknown(pattern):
            warn(f"trace event '{pattern}' does not exist")
    names = selected(settings.patterns)
    stream = sys.stderr
    if settings.file is not None:
        try:
            stream = open(settings.file, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - kept till the end
        except OSError as error:
            raise OptionError(f"Error opening logfile {settings.file}: {error.strerror}") from None
    if not names:
        return stream
    trace.enable(names, _logger(stream).info)
    return stream


class Log:
    """What the server tells: ordinary events are traced, errors always come to standard error."""

    def debug(self, event: str, **fields: object) -> None:
        trace(event, **fields)

    def error(self, event: str, **fields: object) -> None:
        _logger(sys.stderr).error(event, **fields)


@functools.cache
def _logger(stream: TextIO) -> structlog.BoundLogger:
    import structlog

    logger: structlog.BoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        processors=[
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "event"]),
        ],
        wrapper_class=structlog.BoundLogger,
    )
    return logger
