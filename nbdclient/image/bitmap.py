"""`nbdimg bitmap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivers.errors import Error, OptionError
from drivers.options.argv import Opt
from nbdclient.image.arguments import FORMAT, IMAGE_OPTS, OBJECT, Given, getopt, number, parse

if TYPE_CHECKING:
    from drivers.block.dirty import DirtyBitmap
    from drivers.block.node import Node
    from nbdclient.image.session import Images

ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")
TABLE = (
    *(Opt(name, takes_value=name == "merge") for name in ACTIONS),
    FORMAT,
    Opt("source-file", "b", takes_value=True),
    Opt("source-format", "F", takes_value=True),
    Opt("granularity", "g", takes_value=True),
    OBJECT,
    IMAGE_OPTS,
)


def run(arguments: Sequence[str]) -> int:
    given = parse("bitmap", TABLE, arguments)
    granularity = (
        number("granularity", given.values["granularity"], low=1) if "granularity" in given else None
    )
    # Each as often as it was given, in the order given.
    actions = [(name, value) for name, value in getopt(TABLE, arguments, "bitmap") if name in ACTIONS]
    _check(given, actions)
    from nbdclient.image import session

    async def command(images: Images) -> None:
        await _act(images, given, actions, granularity)

    session.run(command, given.objects, untrusted=given.untrusted)
    return 0


def _check(given: Given, actions: list[tuple[str, str]]) -> None:
    names = {name for name, _ in actions}
    if not actions:
        listed = ", ".join(f"--{name}" for name in ACTIONS[:-1])
        raise OptionError(f"Need at least one of {listed}, or --merge")
    if "granularity" in given and "add" not in names:
        raise OptionError("granularity only supported with --add")
    if "source-format" in given and "source-file" not in given:
        raise OptionError("-F only supported with -b")
    if "source-file" in given and "merge" not in names:
        raise OptionError("Merge bitmap source file only supported with --merge")
    if len(given.operands) != 2:
        raise OptionError("Expecting filename and bitmap name")


async def _act(images: Images, given: Given, actions: list[tuple[str, str]], granularity: int | None) -> None:
    from drivers.errors import in_words
    from nbdclient.image.session import WRITING

    filename, name = given.operands
    node = await images.open(filename, given.format, image_opts=given.image_opts, needed=WRITING)
    source = node
    if "source-file" in given:
        # Its backing file may be the image itself.
        source = await images.open_over(given.values["source-file"], given.get("source-format"), None)
    for action, value in actions:
        try:
            await _do(node, name, action, source, value, granularity)
        except (Error, OSError) as error:
            raise OptionError(f"Operation {action} on bitmap {name} failed: {in_words(error)}") from None


async def _do(node: Node, name: str, action: str, source: Node, value: str, granularity: int | None) -> None:
    from drivers.block.image import ImageNode
    from nbdclient.image.bitmaps import stores_bitmaps

    if action == "add":
        _check_new(node, name, granularity)
        if not isinstance(node, ImageNode) or not stores_bitmaps(node):
            raise OptionError(f"Can't store persistent bitmaps to {node.name}: Operation not supported")
        await node.add_bitmap(name, granularity)
        return
    bitmap = _find(node, name)
    if action == "remove":
        assert isinstance(node, ImageNode)
        await node.remove_bitmap(name)
        return
    _check_usable(bitmap)
    match action:
        case "clear":
            bitmap.clear()
        case "enable" | "disable":
            bitmap.enabled = action == "enable"
        case "merge":
            other = _find(source, value)
            _check_usable(other)
            bitmap.merge(other)
    node.track(bitmap)


def _check_new(node: Node, name: str, granularity: int | None) -> None:
    if not name:
        raise OptionError("Bitmap name cannot be empty")
    if granularity is not None and (granularity < 512 or granularity & (granularity - 1)):
        raise OptionError("Granularity must be power of 2 and at least 512")
    if name in node.bitmaps:
        raise OptionError(f"Bitmap already exists: {name}")


def _find(node: Node, name: str) -> DirtyBitmap:
    if name not in node.bitmaps:
        raise OptionError(f"Dirty bitmap '{name}' not found")
    return node.bitmaps[name]


def _check_usable(bitmap: DirtyBitmap) -> None:
    if bitmap.inconsistent:
        raise OptionError(
            f"Bitmap '{bitmap.name}' is inconsistent and cannot be used\n"
            "Try block-dirty-bitmap-remove to delete this bitmap from disk"
        )
