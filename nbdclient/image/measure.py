"""`nbdimg measure`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivers.errors import OptionError
from drivers.options.argv import Opt
from drivers.options.flat import parse_flat
from nbdclient.image.arguments import FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Given, number, parse

if TYPE_CHECKING:
    from drivers.block.image import Measurement
    from nbdclient.image.session import Images

TABLE = (
    FORMAT,
    Opt("target-format", "O", takes_value=True, exact=True),
    Opt("options", "o", takes_value=True, exact=True),
    Opt("snapshot", "l", takes_value=True, exact=True),
    Opt("size", takes_value=True),
    OBJECT,
    IMAGE_OPTS,
    OUTPUT,
    FORCE_SHARE,
)


def run(arguments: Sequence[str]) -> int:
    given = parse("measure", TABLE, arguments)
    as_json = given.json
    size = number("image size", given.values["size"]) if "size" in given else None
    if len(given.operands) > 1:
        raise OptionError("At most one filename argument is allowed.")
    if not given.operands and (given.image_opts or given.format is not None or "snapshot" in given):
        raise OptionError("--image-opts, -f, and -l require a filename argument.")
    if (size is None) == (not given.operands):
        raise OptionError(
            "Either --size N or one filename must be specified."
            if size is None
            else "--size N cannot be used together with a filename."
        )
    from nbdclient.image import session

    async def command(images: Images) -> Measurement:
        return await _measure(images, given, size)

    found = session.run(command, given.objects, untrusted=given.untrusted)
    _show(found, as_json=as_json)
    return 0


async def _measure(images: Images, given: Given, size: int | None) -> Measurement:
    from drivers.block.creating import NewImage
    from drivers.options.schema import Options
    from nbdclient.image.source import load_snapshot

    source = None
    if given.operands:
        source = await images.open(
            given.operands[0], given.format, image_opts=given.image_opts, force_share=given.force_share
        )
        if "snapshot" in given:
            await load_snapshot(source, given.values["snapshot"])
    image_format = given.values.get("target-format", "raw")
    image = NewImage.plan(images.graph, None, image_format)
    try:
        image.set_all(parse_flat(given.options or ""))
    except OptionError as error:
        from nbdclient.image.__main__ import PROGRAM

        raise OptionError(f"{error}\n{PROGRAM}: Invalid options for file format '{image_format}'") from None
    if size is not None:
        image.set("size", str(size))
    tree, _ = image.split()
    return await image.driver.measure(Options(tree, owner=image_format), source)


def _show(found: Measurement, *, as_json: bool) -> None:
    if as_json:
        from nbdclient.image.render import as_json as render_json

        facts = {"required": found.required, "fully-allocated": found.fully_allocated}
        if found.bitmaps is not None:
            facts["bitmaps"] = found.bitmaps
        print(render_json(facts))
        return
    print(f"required size: {found.required}")
    print(f"fully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")
