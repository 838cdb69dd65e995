"""Sockets inherited from the process that started this one (systemd's socket activation)."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from drivers.errors import OptionError
from drivers.units import parse_number

FIRST_FD = 3
# More would be a mistake: one is all that is used.
MAX_FDS = 1024


def take_inherited(environ: MutableMapping[str, str]) -> tuple[int, ...]:
    """The descriptors handed over by LISTEN_PID and LISTEN_FDS, which are removed from `environ` so
    that children do not believe them theirs. None are meant for us if the process id is another's.

    Raises OptionError if one of them is not open.
    """
    if parse_number(environ.get("LISTEN_PID", ""), high=(1 << 31) - 1) != os.getpid():
        return ()
    count = parse_number(environ.get("LISTEN_FDS", ""), high=MAX_FDS)
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    if not count:
        return ()
    fds = tuple(range(FIRST_FD, FIRST_FD + count))
    for fd in fds:
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise OptionError(
                f"Socket activation failed: invalid file descriptor fd = {fd}: {error.strerror}"
            ) from None
    return fds
