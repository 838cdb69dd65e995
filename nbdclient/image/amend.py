"""`nbdimg amend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivers.errors import OptionError
from drivers.options.argv import Opt, UsageError
from drivers.options.flat import parse_flat, wants_help
from nbdclient.image.arguments import CACHE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Given, parse

if TYPE_CHECKING:
    from drivers.block.image import ImageNode
    from drivers.options.schema import Tree
    from nbdclient.image.progress import ProgressReport
    from nbdclient.image.session import Images

TABLE = (
    Opt("options", "o", takes_value=True, exact=True),
    Opt("format", "f", takes_value=True, exact=True),
    *(CACHE, PROGRESS, QUIET, OBJECT, IMAGE_OPTS),
    Opt("force"),
)


def run(arguments: Sequence[str]) -> int:
    given = parse("amend", TABLE, arguments)
    options = given.options
    if options is None:
        raise UsageError("Must specify options (-o)")
    from nbdclient.image import session
    from nbdclient.image.progress import ProgressReport

    asked = wants_help(options)
    if asked and given.format is not None:
        from drivers.block.creating import find_format
        from drivers.block.graph import Graph
        from drivers.catalog import Catalog

        return _show_help(find_format(Graph(Catalog()), given.format))
    if len(given.operands) != 1:
        raise OptionError("Expecting one image file name")

    async def command(images: Images) -> None:
        await _amend(images, given, options, progress)

    shown = "progress" in given and not given.quiet and not asked
    with ProgressReport("amend", shown=shown) as progress:
        session.run(command, given.objects, untrusted=given.untrusted)
        progress.update(1.0)
    return 0


def _show_help(driver: type[ImageNode]) -> int:
    from nbdclient.image.optionhelp import show

    _check_amends(driver)
    print(f"Amend options for '{driver.driver_name}':")
    show(driver.amend_options)
    return 0


def _check_amends(driver: object) -> None:
    if not getattr(driver, "amend_options", ()):
        name = getattr(driver, "driver_name", "")
        raise OptionError(f"Format driver '{name}' does not support option amendment")


async def _amend(images: Images, given: Given, options: str, progress: ProgressReport) -> None:
    from drivers.block.image import ImageNode, RebaseNeededError
    from drivers.options.schema import Options
    from nbdclient.image.__main__ import PROGRAM
    from nbdclient.image.session import RESIZING, cache_flags

    flags = cache_flags(given.values.get("cache", "writeback"))
    node = await images.open(
        given.operands[0], given.format, image_opts=given.image_opts, flags=flags, needed=RESIZING
    )
    if wants_help(options):
        _show_help(type(node))  # type: ignore[arg-type]
        return
    _check_amends(node)
    assert isinstance(node, ImageNode)
    tree = _tree(node, options)
    taken = Options(tree, owner=node.driver_name)
    try:
        await node.amend(taken, progress=progress.update, force="force" in given)
    except RebaseNeededError as error:
        raise OptionError(f"{error}\nYou can use '{PROGRAM} rebase' instead.") from None
    taken.finish()


def _tree(node: ImageNode, options: str) -> Tree:
    """The options typed and nested. Raises OptionError."""
    from drivers.block.creating import typed
    from drivers.options.nest import nest

    known = {option.name: option for option in node.amend_options}
    values: Tree = {}
    for name, value in parse_flat(options):
        if name not in known:
            refusal = f"Invalid parameter '{name}'"
            if any(option.name == name for option in node.create_options):
                refusal += "\nThis option is only supported for image creation"
            raise OptionError(refusal)
        values[name] = typed(known[name], value)
    return nest((tuple(name.split(".")), value) for name, value in values.items())
