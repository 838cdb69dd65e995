"""The project's errors, sorted by who must react.

Bytes from a peer or from an image may raise only the first three. Anything else is our bug.
"""

from __future__ import annotations

import os
from collections.abc import Iterator


class Error(Exception):
    """Base of every error that carries one line for a person to read."""


class ProtocolError(Error):
    """The peer broke the protocol, or left: the connection is lost, nothing else is."""


class RequestError(Error, OSError):
    """One request failed; `errno` says how. The connection and the image live on.

    Being an OSError, it can be caught beside the system's own failures.
    """

    def __init__(self, errno: int, message: str = "") -> None:
        # OSError's own constructor fills in errno and strerror.
        super().__init__(errno, message or os.strerror(errno))

    def __str__(self) -> str:
        return self.strerror or ""


class ImageError(Error):
    """The image is malformed or not supported; the message names the field."""


class OptionError(Error):
    """The user asked for what cannot be done: one line, exit status 1."""


class InUseError(OptionError):
    """Somebody else's use of the image does not agree with ours."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """What an error is made of: itself, or all that a group holds."""
    if isinstance(error, BaseExceptionGroup):
        for below in error.exceptions:
            yield from leaves(below)
    else:
        yield error


def in_words(error: BaseException) -> str:
    """An error in words; those of the system are named by file and reason, not by number."""
    if isinstance(error, OSError) and not isinstance(error, Error):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    return str(error)
