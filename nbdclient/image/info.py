"""`nbdimg info`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from drivers.errors import OptionError
from drivers.options.argv import Opt
from nbdclient.image.arguments import FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Given, parse

if TYPE_CHECKING:
    from nbdclient.image.description import Description
    from nbdclient.image.session import Images

TABLE = (FORMAT, OUTPUT, Opt("backing-chain"), OBJECT, IMAGE_OPTS, FORCE_SHARE)


def run(arguments: Sequence[str]) -> int:
    given = parse("info", TABLE, arguments)
    filename = given.one_image()
    as_json = given.json
    from nbdclient.image import session
    from nbdclient.image.render import as_json as render_json

    async def command(images: Images) -> list[Description]:
        return await _collect(images, given, filename)

    found = session.run(command, given.objects, untrusted=given.untrusted)
    if not as_json:
        print("\n\n".join("\n".join(one.lines()) for one in found))
    elif "backing-chain" in given:
        print(render_json([one.as_json() for one in found]))
    else:
        print(render_json(found[0].as_json()))
    return 0


async def _collect(images: Images, given: Given, filename: str) -> list[Description]:
    """The image, and with --backing-chain what lies below it; each is opened by itself."""
    from drivers.block.node import OpenFlags
    from drivers.block.permission import NONE
    from nbdclient.image.description import describe

    flags = replace(OpenFlags(), no_backing=True, for_info=True)
    found: list[Description] = []
    seen: set[str] = set()
    name: str | None = filename
    image_format, image_opts = given.format, given.image_opts
    while name is not None:
        if name in seen:
            raise OptionError(f"Backing file '{name}' creates an infinite loop.")
        seen.add(name)
        node = await images.open(
            name, image_format, image_opts=image_opts, force_share=given.force_share, flags=flags, needed=NONE
        )
        by_options = image_opts or name.startswith("json:")
        options = images.tree(name, image_format, image_opts, given.force_share) if by_options else None
        one = await describe(node, name, options=options)
        await images.close(node)
        found.append(one)
        if "backing-chain" not in given or one.info.backing_filename is None:
            break
        name = one.full_backing_filename
        if images.graph.untrusted:
            raise OptionError(f"the image is not trusted, and names a backing file: '{name}'")
        if name is None:
            raise OptionError(
                "Could not determine absolute backing filename, but backing filename "
                f"'{one.info.backing_filename}' present"
            )
        image_format, image_opts = one.info.backing_format, False
    return found
