"""What is read from: an internal snapshot of an image, in place of the image."""

from __future__ import annotations

from typing import Literal

from drivers.block.image import ImageNode
from drivers.block.node import Node
from drivers.errors import Error, OptionError, in_words
from drivers.options.flat import parse_flat
from nbdclient.image.__main__ import PROGRAM


def parse_snapshot(text: str) -> tuple[str, Literal["any", "id", "name"]]:
    """What `-l` names, and by what: an id or a name, or "snapshot.id=X" or "snapshot.name=X". Of both
    forms together the id decides. Raises OptionError."""
    if not text.startswith("snapshot."):
        return text, "any"
    found: dict[str, str] = {}
    for name, value in parse_flat(text):
        if name not in ("snapshot.id", "snapshot.name"):
            raise OptionError(
                f"Invalid parameter '{name}'\n{PROGRAM}: Failed in parsing snapshot param '{text}'"
            )
        found[name] = value
    if "snapshot.id" in found:
        return found["snapshot.id"], "id"
    return found["snapshot.name"], "name"


async def load_snapshot(node: Node, text: str) -> None:
    """Have `node` read as it was. Raises OptionError."""
    key, by = parse_snapshot(text)
    snapshots = node.snapshots if isinstance(node, ImageNode) else None
    if snapshots is None:
        raise OptionError(
            f"Failed to load snapshot: Block format '{node.driver_name}' used by device '' does not support "
            "temporarily loading internal snapshots"
        )
    found = snapshots.find(key, by=by)
    if found is None:
        raise OptionError("Failed to load snapshot: Can't find snapshot")
    try:
        await snapshots.load(found.id)
    except (Error, OSError) as error:
        raise OptionError(f"Failed to load snapshot: {in_words(error)}") from None
