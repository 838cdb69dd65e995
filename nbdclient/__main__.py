"""The command `nbdclient`: where its parts are put together."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from drivers.errors import Error
from nbdclient.cli.arguments import parse

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status. Errors are one line on standard error."""
    arguments = parse(argv)
    try:
        command = _load(arguments.module)
        status = command.run(arguments)
        sys.stdout.flush()
        return int(status or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left. What Python would flush at exit has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except (Error, OSError) as error:
        text = str(error) if isinstance(error, Error) or not error.strerror else _plain(error)
        print(f"nbdclient: {' '.join(text.split())}", file=sys.stderr)
        return 1


def _load(module: str) -> ModuleType:
    """The subcommand's module. What is loaded now stays to the end: collecting it, now and then
    and at the end, costs a tenth of the time that a short command takes."""
    gc.disable()
    command = importlib.import_module(f"nbdclient.cli.{module}")
    gc.freeze()
    gc.enable()
    return command


def _plain(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


if __name__ == "__main__":
    sys.exit(main())
