"""`nbdimg commit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from drivers.errors import Error, OptionError
from drivers.options.argv import Opt
from nbdclient.image.arguments import CACHE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Given, number, parse

if TYPE_CHECKING:
    from drivers.block.node import Node
    from drivers.options.schema import Tree
    from nbdclient.image.progress import ProgressReport
    from nbdclient.image.session import Images

TABLE = (
    Opt("format", "f", takes_value=True, exact=True),
    Opt("base", "b", takes_value=True, exact=True),
    Opt("drop", "d", exact=True),
    Opt("rate-limit", "r", takes_value=True, exact=True),
    *(CACHE, PROGRESS, QUIET, OBJECT, IMAGE_OPTS),
)


def run(arguments: Sequence[str]) -> int:
    given = parse("commit", TABLE, arguments)
    rate = number("rate limit", given.values["rate-limit"]) if "rate-limit" in given else None
    filename = given.one_image()
    from nbdclient.image import session
    from nbdclient.image.progress import ProgressReport

    with ProgressReport("commit", shown="progress" in given and not given.quiet) as progress:

        async def command(images: Images) -> None:
            await _commit(images, given, filename, rate, progress)

        session.run(command, given.objects, untrusted=given.untrusted)
        progress.update(1.0)
    if not given.quiet:
        print("Image committed.")
    return 0


async def _commit(
    images: Images, given: Given, filename: str, rate: int | None, progress: ProgressReport
) -> None:
    from drivers.block.image import ImageNode
    from nbdclient.image.committing import commit_down
    from nbdclient.image.session import RESIZING, WRITING, cache_flags

    flags = replace(cache_flags(given.values.get("cache", "writeback")), discard=True)
    top = await images.open(filename, given.format, image_opts=given.image_opts, flags=flags, needed=WRITING)
    layers = await _layers(top, filename, given.get("base"))
    names = [_name_of(layer) for layer in layers]
    options = _options(images.tree(filename, given.format, given.image_opts), len(layers))
    await images.close(top)
    # The base is written to, so nobody above may have it for a backing file meanwhile.
    base = await images.open(
        names[-1], layers[-1].driver_name, flags=flags, needed=RESIZING, options=options[-1]
    )
    above: Node | None = None
    for index in reversed(range(1, len(layers) - 1)):
        above = await images.open_over(names[index], layers[index].driver_name, above, options=options[index])
    top = await images.open_over(
        filename, given.format, above, image_opts=given.image_opts, flags=flags, needed=WRITING
    )
    await commit_down(top, base, rate=rate, progress=progress.update)
    # What lies above another base than the next would show up again, were it dropped from the top.
    if "drop" not in given and "base" not in given and isinstance(top, ImageNode):
        try:
            await top.make_empty()
        except (Error, OSError) as error:
            raise OptionError(f"Could not empty {filename}: {error}") from None


def _options(tree: Tree, count: int) -> list[Tree]:
    """Of the options that the top image is opened with those that are of each layer."""
    found = [tree]
    while len(found) < count:
        below = found[-1].get("backing")
        found.append(below if isinstance(below, dict) else {})
    return found


async def _layers(top: Node, filename: str, base: str | None) -> list[Node]:
    """The layers from the top down to the base, both among them. Raises OptionError."""
    from drivers.options.backing import resolve_backing
    from nbdclient.image.session import chain, find_below

    layers = chain(top)
    if base is None:
        if len(layers) < 2:
            raise OptionError("Image does not have a backing file")
        return layers[:2]
    found = await find_below(top, filename, resolve_backing(filename, base))
    if found is None:
        raise OptionError(f"Did not find '{base}' in the backing chain of '{filename}'")
    return layers[: layers.index(found) + 1]


def _name_of(layer: Node) -> str:
    from nbdclient.image.description import display_name

    name = display_name(layer)
    if name is None:
        raise OptionError(f"Cannot tell the file name of the layer {layer.name}")
    return name
