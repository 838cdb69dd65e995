"""`nbdimg dd`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from drivers.errors import Error, OptionError
from drivers.options.argv import Opt
from nbdclient.image.arguments import FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Given, number, parse

if TYPE_CHECKING:
    from nbdclient.image.session import Images

TABLE = (
    replace(FORMAT, exact=True),
    Opt("target-format", "O", takes_value=True, exact=True),
    IMAGE_OPTS,
    OBJECT,
    FORCE_SHARE,
)
_MAX_BLOCK = (1 << 31) - 1
# Blocks are copied so many bytes at a time: what is read and written is the same.
_STEP = 2 << 20


def run(arguments: Sequence[str]) -> int:
    given = parse("dd", TABLE, arguments)
    operands = _operands(given.operands)
    if "if" not in operands or "of" not in operands:
        raise OptionError("Must specify both input and output files")
    block = number("bs", operands.get("bs", "512"), low=1, high=_MAX_BLOCK)
    count = number("count", operands["count"]) if "count" in operands else None
    skip = number("skip", operands.get("skip", "0"))
    from nbdclient.image import session

    async def command(images: Images) -> None:
        await _copy(images, given, operands, block, count, skip)

    session.run(command, given.objects, untrusted=given.untrusted)
    return 0


def _operands(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in ("bs", "count", "if", "of", "skip"):
            raise OptionError(f"unrecognized operand {name}")
        found[name] = value
    return found


async def _copy(
    images: Images, given: Given, operands: dict[str, str], block: int, count: int | None, skip: int
) -> None:
    from drivers.block.creating import NewImage, make_image
    from drivers.errors import in_words
    from nbdclient.image.__main__ import complain
    from nbdclient.image.session import WRITING, warn

    source = await images.open(
        operands["if"], given.format, image_opts=given.image_opts, force_share=given.force_share
    )
    image_format = given.values.get("target-format", "raw")
    try:
        image = NewImage.plan(images.graph, operands["of"], image_format)
    except OptionError as error:
        if str(error).startswith("Unknown file format"):
            raise OptionError("Unknown file format") from None
        raise
    start = skip * block
    # Unlike dd(1), and like qemu-img, the blocks that are skipped are counted.
    end = source.size if count is None else min(source.size, count * block)
    total = max(0, end - start)
    image.set("size", str(total))
    try:
        await make_image(image, warn=warn)
    except (Error, OSError) as error:
        raise OptionError(f"{operands['of']}: error while creating output image: {in_words(error)}") from None
    target = await images.open(operands["of"], image_format, needed=WRITING)
    if start > end:
        complain(f"{operands['if']}: cannot skip to specified offset")
        return
    buffer = memoryview(bytearray(min(_STEP, total)))
    for offset in range(0, total, _STEP):
        part = buffer[: min(_STEP, total - offset)]
        try:
            await source.read_into(start + offset, part)
        except OSError as error:
            raise OptionError(f"error while reading from input image file: {error.strerror}") from None
        try:
            await target.write(offset, part)
        except OSError as error:
            raise OptionError(f"error while writing to output image file: {error.strerror}") from None
