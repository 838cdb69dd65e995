"""What a handshake wants done next. Both sides' handshakes are generators of these steps: they
decide, and whoever drives them moves the bytes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Receive:
    """Answer with exactly `length` bytes from the peer."""

    length: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send `data`; answer with b""."""

    data: bytes


@dataclass(frozen=True, slots=True)
class StartTls:
    """Encrypt the stream from here on; answer with b""."""


Step: TypeAlias = Receive | Send | StartTls
Handshake: TypeAlias = Generator[Step, bytes, T]
