"""`nbdimg convert`: the command line, in the order in which qemu-img judges it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivers.errors import Error, OptionError
from drivers.options.argv import Opt
from drivers.options.flat import parse_flat, wants_help
from drivers.units import parse_number
from nbdclient.image.arguments import (
    CACHE,
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SOURCE_CACHE,
    Given,
    number,
    parse,
)

if TYPE_CHECKING:
    from drivers.block.creating import NewImage
    from drivers.block.node import Node
    from drivers.options.schema import Tree
    from nbdclient.image.copying import Source
    from nbdclient.image.progress import ProgressReport
    from nbdclient.image.session import Images

TABLE = (
    FORMAT,
    *(SOURCE_CACHE, CACHE, PROGRESS, QUIET),
    Opt("target-format", "O", takes_value=True, exact=True),
    Opt("backing", "B", takes_value=True, exact=True),
    Opt("backing-format", "F", takes_value=True, exact=True),
    Opt("copy-range", "C", exact=True),
    Opt("compress", "c", exact=True),
    Opt("no-create", "n", exact=True),
    Opt("options", "o", takes_value=True, exact=True),
    Opt("snapshot", "l", takes_value=True, exact=True),
    Opt("sparse-size", "S", takes_value=True, exact=True),
    Opt("parallel", "m", takes_value=True, exact=True),
    Opt("out-of-order", "W", exact=True),
    Opt("rate-limit", "r", takes_value=True, exact=True),
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    Opt("target-image-opts"),
    Opt("salvage"),
    Opt("target-is-zero"),
    Opt("bitmaps"),
    Opt("skip-broken-bitmaps"),
)

_SECTOR = 512
_MAX_SPARSE = 16 << 20
_DEFAULT_SPARSE = 4096
_MAX_WORKERS = 16


@dataclass(frozen=True)
class Wishes:
    """`sparse`: so many zero bytes in a row are not written; 0: everything is."""

    sources: tuple[str, ...]
    target: str
    target_format: str | None
    sparse: int
    workers: int
    rate: int | None


def run(arguments: Sequence[str]) -> int:
    given = parse("convert", TABLE, arguments)
    sparse = _sparse_size(given)
    workers = parse_number(given.values.get("parallel", "8"), low=1, high=_MAX_WORKERS)
    if workers is None:
        raise OptionError(
            f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {_MAX_WORKERS}"
        )
    rate = number("rate limit", given.values["rate-limit"]) if "rate-limit" in given else None
    target_format = given.get("target-format")
    if target_format is None and "target-image-opts" not in given:
        target_format = "raw"
    _check_clashes(given)
    *sources, target = given.operands or [""]
    if given.options is not None and wants_help(given.options):
        if target_format is None:
            raise OptionError("Option help requires a format be specified")
        from nbdclient.image.optionhelp import show_create_options

        return show_create_options(target if sources else None, target_format)
    if not sources:
        raise OptionError("Must specify image file name")
    wishes = Wishes(tuple(sources), target, target_format, sparse, workers, rate)
    from nbdclient.image import session
    from nbdclient.image.progress import ProgressReport

    with ProgressReport("convert", shown="progress" in given) as progress:

        async def command(images: Images) -> None:
            await _convert(images, given, wishes, progress)

        session.run(command, given.objects, untrusted=given.untrusted)
        progress.finish()
    return 0


def _sparse_size(given: Given) -> int:
    if "sparse-size" not in given:
        return _DEFAULT_SPARSE
    size = number("buffer size for sparse output", given.values["sparse-size"])
    if size % _SECTOR or size > _MAX_SPARSE:
        raise OptionError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
            f"{_SECTOR} up to {_MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


def _check_clashes(given: Given) -> None:
    if "skip-broken-bitmaps" in given and "bitmaps" not in given:
        raise OptionError("Use of --skip-broken-bitmaps requires --bitmaps")
    if "copy-range" in given:
        for name, refusal in (
            ("compress", "Cannot enable copy offloading when -c is used"),
            ("sparse-size", "Cannot enable copy offloading when -S is used"),
            ("salvage", "Cannot use copy offloading in salvaging mode"),
        ):
            if name in given:
                raise OptionError(refusal)
    creates = "no-create" not in given
    if "target-image-opts" in given and creates:
        raise OptionError("--target-image-opts requires use of -n flag")
    if given.options is not None and not creates:
        raise OptionError("-o has no effect when skipping image creation")
    if "target-is-zero" in given and creates:
        raise OptionError("--target-is-zero requires use of -n flag")


async def _convert(images: Images, given: Given, wishes: Wishes, progress: ProgressReport) -> None:
    from drivers.block.image import ImageNode
    from nbdclient.image import bitmaps
    from nbdclient.image.copying import Copy, Target
    from nbdclient.image.session import backing_of

    sources = await _open_sources(images, given, wishes)
    total = sum(source.sectors for source in sources) * _SECTOR
    image = None if "no-create" in given else _plan(images, given, wishes, total)
    backing_name = given.get("backing") or (image.given.get("backing_file") if image is not None else None)
    if backing_name is not None:
        _check_backing(given, image, len(sources))
    if image is not None and "compress" in given:
        _check_compression(image)
    if "bitmaps" in given:
        if len(sources) > 1:
            raise OptionError("Copying bitmaps only possible with single source")
        bitmaps.check_source(sources[0].node, skip_broken="skip-broken-bitmaps" in given)
    target, blank = await _open_target(images, given, wishes, image)
    if "compress" in given and not can_compress(target):
        raise OptionError("Compression not supported for this file format")
    if target.size < total and image is None:
        raise OptionError("output file is smaller than input file")
    below = backing_of(target) if backing_name is not None else None
    cluster = (await target.info()).cluster_size if isinstance(target, ImageNode) else None
    copy = Copy(
        sources,
        Target(
            target,
            is_zero="target-is-zero" in given or (blank and below is None),
            backing_size=None if below is None else below.size,
            compressed_cluster=cluster if "compress" in given else None,
        ),
        sparse=wishes.sparse,
        workers=wishes.workers,
        rate=wishes.rate,
        offload="copy-range" in given,
        salvage="salvage" in given,
        in_order="out-of-order" not in given,
        progress=progress.update if progress.shown else None,
    )
    await copy.run()
    if "bitmaps" in given:
        await bitmaps.copy(sources[0].node, target, skip_broken="skip-broken-bitmaps" in given)


async def _open_sources(images: Images, given: Given, wishes: Wishes) -> list[Source]:
    from nbdclient.image.copying import Source
    from nbdclient.image.session import UNCHANGING, cache_flags
    from nbdclient.image.source import load_snapshot

    flags = cache_flags(given.values.get("source-cache", "writeback"), source=True)
    sources: list[Source] = []
    for filename in wishes.sources:
        node = await images.open(
            filename,
            given.format,
            image_opts=given.image_opts,
            force_share=given.force_share,
            flags=flags,
            shared=UNCHANGING,
        )
        base = sources[-1].base + sources[-1].sectors * _SECTOR if sources else 0
        sources.append(Source(node, base))
    if "snapshot" in given:
        if len(sources) > 1 and not given.values["snapshot"].startswith("snapshot."):
            raise OptionError("No support for concatenating multiple snapshot")
        await load_snapshot(sources[0].node, given.values["snapshot"])
    return sources


def _plan(images: Images, given: Given, wishes: Wishes, total: int) -> NewImage:
    from drivers.block.creating import NewImage

    assert wishes.target_format is not None
    image = NewImage.plan(images.graph, wishes.target, wishes.target_format)
    image.set_all(parse_flat(given.options or ""))
    image.set("size", str(total))
    image.set_backing(given.get("backing"), given.get("backing-format"))
    return image


def _check_backing(given: Given, image: NewImage | None, sources: int) -> None:
    """Whether there can be a backing file below the target."""
    if "target-is-zero" in given:
        raise OptionError("Cannot use --target-is-zero when the destination image has a backing file")
    if sources > 1:
        raise OptionError(
            "Having a backing file for the target makes no sense when concatenating multiple input images"
        )
    if image is not None and "backing_fmt" not in image.given:
        raise OptionError("Use of backing file requires explicit backing format")


def _check_compression(image: NewImage) -> None:
    if any(name.startswith("encrypt") and value != "off" for name, value in image.given.items()):
        raise OptionError("Compression and encryption not supported at the same time")
    if image.given.get("preallocation", "off") != "off":
        raise OptionError("Compression and preallocation not supported at the same time")
    if not can_compress(image.driver):
        raise OptionError("Compression not supported for this file format")


def can_compress(driver: object) -> bool:
    """Whether this node, or a driver's nodes, take compressed writes."""
    from drivers.block.image import ImageNode

    kind = driver if isinstance(driver, type) else type(driver)
    return issubclass(kind, ImageNode) and kind._write_compressed is not ImageNode._write_compressed


async def _open_target(
    images: Images, given: Given, wishes: Wishes, image: NewImage | None
) -> tuple[Node, bool]:
    """The target, made if it is to be, and whether it then reads as zeroes."""
    from dataclasses import replace

    from drivers.block.creating import make_image
    from drivers.errors import in_words
    from drivers.options.nest import nest
    from nbdclient.image.session import WRITING, cache_flags, warn

    flags = replace(cache_flags(given.values.get("cache", "unsafe")), discard=bool(wishes.sparse))
    blank = False
    secrets: Tree = {}
    if image is not None:
        # What was made with a key is opened with it.
        given_secrets = ((name, key) for name, key in image.given.items() if name.endswith("key-secret"))
        secrets = nest((tuple(name.split(".")), key) for name, key in given_secrets)
        try:
            blank = await make_image(image, warn=warn)
        except (Error, OSError) as error:
            raise OptionError(
                f"{wishes.target}: error while converting {image.image_format}: {in_words(error)}"
            ) from None
    node = await images.open(
        wishes.target,
        wishes.target_format,
        image_opts="target-image-opts" in given,
        flags=flags,
        needed=WRITING,
        options=secrets,
    )
    return node, blank
