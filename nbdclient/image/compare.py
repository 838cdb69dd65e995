"""`nbdimg compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from drivers.errors import Error, OptionError
from drivers.options.argv import Opt, UsageError
from nbdclient.image.arguments import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SOURCE_CACHE,
    Given,
    parse,
)

if TYPE_CHECKING:
    from drivers.block.node import Node
    from nbdclient.image.session import Images

TABLE = (
    replace(FORMAT, exact=True),
    Opt("format-2", "F", takes_value=True, exact=True),
    SOURCE_CACHE,
    PROGRESS,
    QUIET,
    Opt("strict", "s", exact=True),
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
)

SAME, DIFFERENT, CANNOT_OPEN = 0, 1, 2


def run(arguments: Sequence[str]) -> int:
    from nbdclient.image.__main__ import complain

    given = parse("compare", TABLE, arguments)
    if len(given.operands) != 2:
        raise UsageError("Expecting two image file names")
    from nbdclient.image import session

    async def command(images: Images) -> int:
        return await _compare(images, given)

    try:
        return session.run(command, given.objects, untrusted=given.untrusted)
    except OptionError as error:
        complain(str(error))
        return CANNOT_OPEN


async def _compare(images: Images, given: Given) -> int:
    from nbdclient.image.__main__ import complain
    from nbdclient.image.comparison import Failure
    from nbdclient.image.progress import ProgressReport

    first, second = await _open_both(images, given)
    with ProgressReport("compare", shown="progress" in given) as progress:
        try:
            status, text = await _judge(first, second, given, progress.update)
        except Failure as failure:
            complain(str(failure))
            return failure.status
        except (Error, OSError) as error:
            complain(str(error))
            return CANNOT_OPEN
        if text and not given.quiet:
            print(text)
    return status


async def _open_both(images: Images, given: Given) -> tuple[Node, Node]:
    from nbdclient.image.session import cache_flags

    flags = cache_flags(given.values.get("source-cache", "writeback"), source=True)
    formats = given.format, given.get("format-2")
    nodes = [
        await images.open(
            filename, image_format, image_opts=given.image_opts, force_share=given.force_share, flags=flags
        )
        for filename, image_format in zip(given.operands, formats, strict=True)
    ]
    return nodes[0], nodes[1]


async def _judge(first: Node, second: Node, given: Given, progress: object) -> tuple[int, str]:
    """The exit status, and what is said with it."""
    from nbdclient.image.comparison import Comparison
    from nbdclient.image.session import guest_size

    strict = "strict" in given
    same_size = guest_size(first) == guest_size(second)
    if strict and not same_size:
        return DIFFERENT, "Strict mode: Image size mismatch!"
    comparison = Comparison(given.operands[0], first, given.operands[1], second, progress)  # type: ignore[arg-type]
    offset = await comparison.run(strict=strict)
    if offset is not None:
        return DIFFERENT, comparison.difference or f"Content mismatch at offset {offset}!"
    if first.size != second.size:
        if not same_size and not given.quiet:
            print("Warning: Image size mismatch!")
        offset = await comparison.rest_is_zero()
        if offset is not None:
            return DIFFERENT, f"Content mismatch at offset {offset}!"
    progress(1.0)  # type: ignore[operator]
    return SAME, "Images are identical."
