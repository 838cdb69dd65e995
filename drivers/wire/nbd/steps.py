"""A handshake is a generator of steps; whoever runs it does the input and output.

A test feeds it byte strings, a connection feeds it from a socket: the machine cannot tell.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Receive:
    """Wants exactly `length` bytes, bounded by the machine; is sent them."""

    length: int


@dataclass(frozen=True, slots=True)
class Send:
    """Wants `data` sent; is sent b""."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """Wants the stream to change to TLS now; is sent b""."""


Step: TypeAlias = Receive | Send | StartTls
Handshake: TypeAlias = Generator[Step, bytes, T]
