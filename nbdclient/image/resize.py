"""`nbdimg resize`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivers.errors import OptionError
from drivers.options.argv import Opt, UsageError
from drivers.options.flat import refuse_size
from drivers.units import parse_size
from nbdclient.image.arguments import FORMAT, IMAGE_OPTS, OBJECT, QUIET, Given, parse

if TYPE_CHECKING:
    from nbdclient.image.session import Images

TABLE = (
    FORMAT,
    QUIET,
    OBJECT,
    IMAGE_OPTS,
    Opt("preallocation", takes_value=True),
    Opt("shrink"),
)


def run(arguments: Sequence[str]) -> int:
    # The size comes last, and "-1G" is no option: it is taken away before they are looked for.
    if len(arguments) < 2:
        if "-h" in arguments or "--help" in arguments:
            parse("resize", TABLE, arguments)
        raise UsageError("Not enough arguments")
    *rest, size = arguments
    given = parse("resize", TABLE, rest)
    if given.get("preallocation") not in (None, "off", "metadata", "falloc", "full"):
        raise OptionError(f"Invalid preallocation mode '{given.get('preallocation')}'")
    if len(given.operands) != 1:
        raise UsageError("Expecting image file name and size")
    sign = size[0] if size[:1] in ("+", "-") else ""
    try:
        amount = parse_size(size[len(sign) :])
    except OptionError:
        raise refuse_size("size") from None
    from nbdclient.image import session

    async def command(images: Images) -> None:
        await _resize(images, given, sign, amount)

    session.run(command, given.objects, untrusted=given.untrusted)
    return 0


async def _resize(images: Images, given: Given, sign: str, amount: int) -> None:
    from drivers.block.node import Preallocation
    from nbdclient.image.session import RESIZING, guest_size

    node = await images.open(given.operands[0], given.format, image_opts=given.image_opts, needed=RESIZING)
    preallocation = Preallocation(given.values.get("preallocation", "off"))
    total = {"": amount, "+": guest_size(node) + amount, "-": guest_size(node) - amount}[sign]
    if total <= 0:
        raise OptionError("New image size must be positive")
    if total <= guest_size(node) and preallocation is not Preallocation.OFF:
        raise OptionError("Preallocation can only be used for growing images")
    if total < guest_size(node) and "shrink" not in given:
        from nbdclient.image.__main__ import PROGRAM

        raise OptionError(
            "Use the --shrink option to perform a shrink operation.\n"
            f"{PROGRAM}: warning: Shrinking an image will delete all data beyond the shrunken image's end. "
            "Before performing such an operation, make sure there is no important data there."
        )
    await node.truncate(total, preallocation=preallocation)
    if not given.quiet:
        print("Image resized.")
