"""`nbdimg snapshot`."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from drivers.errors import Error, ImageError, OptionError
from drivers.options.argv import Opt, UsageError
from nbdclient.image.arguments import FORCE_SHARE, IMAGE_OPTS, OBJECT, QUIET, Given, getopt, parse

if TYPE_CHECKING:
    from drivers.block.image import Snapshots
    from nbdclient.image.session import Images

_ACTIONS = {"list": "-l", "apply": "-a", "create": "-c", "delete": "-d"}
TABLE = (
    Opt("list", "l", exact=True),
    Opt("apply", "a", takes_value=True, exact=True),
    Opt("create", "c", takes_value=True, exact=True),
    Opt("delete", "d", takes_value=True, exact=True),
    QUIET,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
)


def run(arguments: Sequence[str]) -> int:
    given = parse("snapshot", TABLE, arguments)
    actions = [name for name, _ in getopt(TABLE, arguments, "snapshot") if name in _ACTIONS]
    if len(actions) > 1:
        raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    filename = given.one_image()
    from nbdclient.image import session

    async def command(images: Images) -> None:
        await _act(images, given, filename, actions[0] if actions else "")

    session.run(command, given.objects, untrusted=given.untrusted)
    return 0


async def _act(images: Images, given: Given, filename: str, action: str) -> None:
    from drivers.block.image import ImageNode
    from drivers.block.node import OpenFlags
    from nbdclient.image.session import READING, WRITING

    node = await images.open(
        filename,
        image_opts=given.image_opts,
        force_share=given.force_share,
        flags=replace(OpenFlags(), discard=True),
        needed=READING if action == "list" else WRITING,
    )
    snapshots = node.snapshots if isinstance(node, ImageNode) else None
    match action:
        case "list":
            _list(snapshots)
        case "create":
            await _create(snapshots, given.values["create"])
        case "apply":
            await _apply(snapshots, given.values["apply"])
        case "delete":
            await _delete(snapshots, given.values["delete"])


def _list(snapshots: Snapshots | None) -> None:
    from nbdclient.image.render import SNAPSHOT_HEAD, snapshot_line

    found = () if snapshots is None else snapshots.list()
    if found:
        print("Snapshot list:")
        print(SNAPSHOT_HEAD)
        for snapshot in found:
            print(snapshot_line(snapshot))


async def _create(snapshots: Snapshots | None, name: str) -> None:
    number, reason = errno.ENOTSUP, os.strerror(errno.ENOTSUP)
    if snapshots is not None:
        try:
            await snapshots.create(name)
            return
        except OSError as error:
            number = error.errno or errno.EIO
            reason = os.strerror(number)
    raise OptionError(f"Could not create snapshot '{name}': {-number} ({reason})")


async def _apply(snapshots: Snapshots | None, name: str) -> None:
    failed = f"Could not apply snapshot '{name}'"
    if snapshots is None:
        raise OptionError(f"{failed}: Block driver does not support snapshots")
    if snapshots.find(name) is None:
        raise OptionError(f"{failed}: Failed to load snapshot: {os.strerror(errno.ENOENT)}")
    try:
        await snapshots.apply(name)
    except (ImageError, OSError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, ImageError):
            from nbdclient.image.__main__ import complain

            complain(str(error))
            number = errno.EFBIG if str(error).endswith("too large") else errno.EINVAL
        reason = os.strerror(number or errno.EIO)
        raise OptionError(f"{failed}: Failed to load snapshot: {reason}") from None


async def _delete(snapshots: Snapshots | None, name: str) -> None:
    # Here the name comes first: an id may be the name of another.
    found = None if snapshots is None else snapshots.find(name, by="name") or snapshots.find(name, by="id")
    if snapshots is None or found is None:
        raise OptionError(f"Could not delete snapshot '{name}': snapshot not found")
    try:
        await snapshots.delete(found.id)
    except (Error, OSError) as error:
        raise OptionError(
            f"Could not delete snapshot '{name}': {getattr(error, 'strerror', None) or error}"
        ) from None
