"""The command `nbdimg`."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from drivers.errors import Error, in_words, leaves
from drivers.options.argv import Opt, UsageError

# QEMU's test suite says by this which name it expects in messages.
PROGRAM = os.environ.get("IOTESTS_PROGNAME") or "nbdimg"
COMMANDS = (
    *("amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd", "info"),
    *("map", "measure", "rebase", "resize", "snapshot"),
)
INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # File names may be any bytes.
        stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    # As C programs have it, whatever PYTHONUNBUFFERED says: see complain().
    sys.stdout.reconfigure(write_through=False, line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except UsageError as error:
        complain(f"{error}\nTry '{PROGRAM} --help' for more information")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left. What Python would flush at exit has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except (Error, OSError) as error:
        complain(in_words(error))
    except BaseExceptionGroup as group:
        causes = list(leaves(group))
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            return INTERRUPTED
        if not all(isinstance(cause, Error | OSError) for cause in causes):
            raise
        complain(in_words(causes[0]))
    return 1


def _dispatch(arguments: list[str]) -> int:
    from nbdclient.image.arguments import getopt

    own: list[str] = []
    while arguments and arguments[0].startswith("-"):
        own.append(arguments.pop(0))
        if own[-1] in ("-T", "--trace") and arguments:
            own.append(arguments.pop(0))
    for name, _ in getopt((Opt("help", "h"), Opt("version", "V"), Opt("trace", "T", True)), own, PROGRAM):
        if name == "help":
            return show_help()
        if name == "version":
            from importlib.metadata import version

            print(f"{PROGRAM} version {version('nbdserve')}")
            return 0
    if not arguments:
        raise UsageError("Not enough arguments")
    command = arguments.pop(0)
    if command not in COMMANDS:
        raise UsageError(f"Command not found: {command}")
    return int(_load(command).run(arguments))


def show_help() -> int:
    from drivers.catalog import ROWS
    from nbdclient.image.help import TEXT

    print(TEXT.format(program=PROGRAM, formats=" ".join(sorted(ROWS))), end="")
    return 0


def _load(command: str) -> ModuleType:
    """The subcommand's module. What is loaded now stays to the end: collecting it, now and then
    and at the end, costs a tenth of the time that a short command takes."""
    gc.disable()
    module = importlib.import_module(f"nbdclient.image.{command}")
    gc.freeze()
    gc.enable()
    return module


def complain(message: str) -> None:
    """On standard error. Where both outputs go to one pipe, what was printed comes behind that, as
    scripts know it from qemu-img."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
