"""`nbdimg create`."""

from __future__ import annotations

from collections.abc import Sequence

from drivers.errors import Error, OptionError
from drivers.options.argv import Opt, UsageError
from drivers.options.flat import parse_flat, wants_help
from nbdclient.image.arguments import OBJECT, QUIET, Given, number, parse

TABLE = (
    Opt("backing-format", "F", takes_value=True, exact=True),
    Opt("backing", "b", takes_value=True, exact=True),
    Opt("format", "f", takes_value=True, exact=True),
    Opt("options", "o", takes_value=True, exact=True),
    Opt("unsafe", "u", exact=True),
    QUIET,
    OBJECT,
)


def run(arguments: Sequence[str]) -> int:
    given = parse("create", TABLE, arguments)
    image_format = given.format or "raw"
    operands = given.operands
    if given.options is not None and wants_help(given.options):
        from nbdclient.image.optionhelp import show_create_options

        return show_create_options(operands[0] if operands else None, image_format)
    if not operands:
        raise UsageError("Expecting image file name")
    size = number("image size", operands[1]) if len(operands) > 1 else None
    if len(operands) > 2:
        raise UsageError(f"Unexpected argument: {operands[2]}")
    _create(given, operands[0], image_format, size)
    return 0


def _create(given: Given, filename: str, image_format: str, size: int | None) -> None:
    from drivers.block.creating import NewImage, complete_backing, make_image
    from drivers.errors import in_words
    from nbdclient.image.session import Images, run, warn

    async def create(images: Images) -> None:
        image = NewImage.plan(images.graph, filename, image_format)
        if given.options is not None:
            image.set_all(parse_flat(given.options))
        if size is not None:
            if "size" in image.given:
                raise OptionError("The image size must be specified only once")
            image.set("size", str(size))
        image.set_backing(given.get("backing"), given.get("backing-format"))
        await complete_backing(image, unchecked="unsafe" in given, warn=warn)
        if not given.quiet:
            print(image.describe(), flush=True)
        await make_image(image, warn=warn)

    async def named(images: Images) -> None:
        try:
            await create(images)
        except (Error, OSError) as error:
            raise OptionError(f"{filename}: {in_words(error)}") from None

    run(named, given.objects)
