"""`nbdimg rebase`."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from drivers.errors import Error, OptionError
from drivers.options.argv import Opt, UsageError
from nbdclient.image.arguments import (
    CACHE,
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SOURCE_CACHE,
    Given,
    parse,
)

if TYPE_CHECKING:
    from drivers.block.node import Node, OpenFlags
    from nbdclient.image.progress import ProgressReport
    from nbdclient.image.session import Images

TABLE = (
    Opt("format", "f", takes_value=True, exact=True),
    Opt("backing-format", "F", takes_value=True, exact=True),
    Opt("backing", "b", takes_value=True, exact=True),
    Opt("unsafe", "u", exact=True),
    *(PROGRESS, CACHE, SOURCE_CACHE, QUIET, OBJECT, IMAGE_OPTS, FORCE_SHARE),
)


def run(arguments: Sequence[str]) -> int:
    given = parse("rebase", TABLE, arguments)
    filename = given.one_image()
    if "unsafe" not in given and "backing" not in given:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    from nbdclient.image import session
    from nbdclient.image.progress import ProgressReport

    with ProgressReport("rebase", shown="progress" in given and not given.quiet) as progress:

        async def command(images: Images) -> None:
            await _rebase(images, given, filename, progress)

        session.run(command, given.objects, untrusted=given.untrusted)
        progress.update(1.0)
    return 0


async def _rebase(images: Images, given: Given, filename: str, progress: ProgressReport) -> None:
    from nbdclient.image.session import WRITING, cache_flags

    flags = replace(cache_flags(given.values.get("cache", "writeback")), discard=True)
    source_flags = cache_flags(given.values.get("source-cache", "writeback"), source=True)
    unsafe = "unsafe" in given
    node = await images.open(
        filename,
        given.format,
        image_opts=given.image_opts,
        force_share=given.force_share,
        flags=replace(flags, no_backing=unsafe),
        needed=WRITING,
    )
    image_format = given.get("backing-format")
    if image_format is not None and image_format not in images.graph.catalog.prefixes():
        try:
            images.graph.catalog.driver(image_format)
        except OptionError:
            raise OptionError(f"Invalid format name: '{image_format}'") from None
    if not unsafe:
        await _keep_content(images, given, filename, node, source_flags, progress)
    await _change(node, given.get("backing"), image_format)


async def _keep_content(
    images: Images, given: Given, filename: str, node: Node, flags: OpenFlags, progress: ProgressReport
) -> None:
    """Write to the image whatever would read differently with the new backing file."""
    from drivers.options.backing import resolve_backing
    from nbdclient.image.basechange import BaseChange
    from nbdclient.image.session import backing_of, find_below

    old = backing_of(node)
    new: Node | None = None
    below: Node | None = None
    backing = given.values["backing"]
    if backing:
        try:
            path = resolve_backing(filename, backing)
        except OptionError as error:
            raise OptionError(f"Could not resolve backing filename: {error}") from None
        below = await find_below(node, filename, path)
        new = below or await _open_new(images, path, given.get("backing-format"), flags)
    await BaseChange(node, old, new, in_chain=below is not None).run(progress.update)


async def _open_new(images: Images, path: str, image_format: str | None, flags: OpenFlags) -> Node:
    try:
        return await images.open(path, image_format, flags=flags)
    except OptionError as error:
        reason = str(error).removeprefix(f"Could not open '{path}': ")
        raise OptionError(f"Could not open new backing file '{path}': {reason}") from None


async def _change(node: Node, backing: str | None, image_format: str | None) -> None:
    from drivers.block.image import ImageNode

    failed = f"Could not change the backing file to '{backing}': "
    if backing and image_format is None:
        raise OptionError(f"{failed}backing format must be specified")
    if not isinstance(node, ImageNode):
        raise OptionError(f"{failed}Operation not supported")
    try:
        await node.change_backing(backing or None, image_format if backing else None)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OptionError(f"{failed}No space left in the file header") from None
        if error.errno == errno.ENOTSUP:
            raise OptionError(f"{failed}Operation not supported") from None
        raise OptionError(f"{failed}{error.strerror}") from None
    except Error as error:
        raise OptionError(f"{failed}{error}") from None
