"""Trace events: their names, and the switch that makes them free where they are off."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable

EVENTS = {
    "nbd_client_accepted": "a client connected",
    "nbd_client_closed": "a client's connection ended, and why",
    "nbd_handshake_failed": "a client left, failed or took too long before it had negotiated",
    "nbd_negotiated": "a client's handshake is complete",
    "nbd_request": "a request arrived",
    "nbd_reply": "a request was answered",
    "nbd_request_failed": "a request was answered with an error",
    "export_opened": "an export's image was opened",
    "export_closed": "an export's image was closed",
    "server_listening": "the server accepts clients",
    "server_stopping": "the server was told to end",
}


class Tracer:
    """Called with an event's name and fields. `enabled` costs one attribute check; ask it first, so
    that the fields of an event nobody wants are never put together:

        if trace.enabled:
            trace("nbd_request", cookie=cookie)
    """

    def __init__(self) -> None:
        self.enabled = False
        self._wanted: frozenset[str] = frozenset()
        self._emit: Callable[..., object] = lambda name, **fields: None

    def __call__(self, name: str, /, **fields: object) -> None:
        assert name in EVENTS, name
        if name in self._wanted:
            self._emit(name, **fields)

    def enable(self, names: Iterable[str], emit: Callable[..., object]) -> None:
        """Have events in `names`, and no others, passed to emit(name, **fields)."""
        self._wanted = frozenset(names)
        self._emit = emit
        self.enabled = bool(self._wanted)


# As with logging, where a process writes its trace is its own affair: the one instance that
# the server's modules share.
trace = Tracer()


def selected(patterns: Iterable[str]) -> set[str]:
    """The events that glob patterns choose; a later '-PATTERN' takes away again."""
    names: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(EVENTS, pattern.removeprefix("-"))
        if pattern.startswith("-"):
            names.difference_update(matching)
        else:
            names.update(matching)
    return names


def unknown(pattern: str) -> bool:
    """It is a plain name, and no event has it: most likely a typing mistake."""
    name = pattern.removeprefix("-")
    return not any(character in name for character in "*?[") and name not in EVENTS
