"""The command nbdserve."""

from __future__ import annotations

import os
import sys

from drivers.errors import Error, in_words, leaves
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
        _complain(in_words(error))
    except BaseExceptionGroup as group:
        # trio's nurseries wrap what went wrong inside them.
        causes = list(leaves(group))
        if not all(isinstance(cause, Error | OSError) for cause in causes):
            raise
        _complain(in_words(causes[0]))
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


def _complain(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
