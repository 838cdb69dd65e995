"""The command nbdserve."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from drivers.errors import Error
from drivers.options.argv import UsageError
from nbdserve import __version__
from nbdserve.cli.nbd import Answer, ArgumentCountError, parse
from nbdserve.settings import ListSettings, ServeSettings

# QEMU's test suite says by this which name it expects in messages.
PROGRAM = os.environ.get("IOTESTS_PROGNAME") or "nbdserve"


def main() -> int:
    """Do what the command line says; the exit status."""
    hint = f"Try `{PROGRAM} --help' for more information."
    try:
        wanted = parse(sys.argv[1:], os.environ)
        if isinstance(wanted, Answer):
            return _answer(wanted)
        return _do(wanted)
    except UsageError as error:
        _complain(str(error))
        _complain(hint)
    except ArgumentCountError as error:
        _complain(f"{error}\n{hint}")
    except KeyboardInterrupt:
        return 130
    except (Error, OSError) as error:
        _complain(_line(error))
    except BaseExceptionGroup as group:
        # trio's nurseries wrap what went wrong inside them.
        leaves = list(_leaves(group))
        if not all(isinstance(leaf, Error | OSError) for leaf in leaves):
            raise
        _complain(_line(leaves[0]))
    return 1


def _do(wanted: ServeSettings | ListSettings) -> int:
    from nbdserve.tracing import set_up

    set_up(wanted.trace, warn=lambda message: _complain(f"warning: {message}"))
    if isinstance(wanted, ListSettings):
        from nbdserve.cli.list import list_exports

        return list_exports(wanted)
    from nbdserve.run import serve_until_told

    return serve_until_told(wanted)


def _answer(question: Answer) -> int:
    topic = question.topic
    if topic == "help":
        from nbdserve.cli.help import TEXT

        print(TEXT.format(program=PROGRAM), end="")
    elif topic == "version":
        print(f"{PROGRAM} {__version__}")
    elif topic == "object":
        from drivers.objects.store import help_text

        print(help_text(question.about))
    else:
        from nbdserve.trace import EVENTS

        print("\n".join(sorted(EVENTS)))
    return 0


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for below in error.exceptions:
            yield from _leaves(below)
    else:
        yield error


def _line(error: BaseException) -> str:
    """An error in words; those of the system are named by file and reason, not by number."""
    if isinstance(error, OSError) and not isinstance(error, Error):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    return str(error)


def _complain(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
