"""`nbdimg check`."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from drivers.options.argv import Opt, UsageError
from nbdclient.image.arguments import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    QUIET,
    SOURCE_CACHE,
    Given,
    parse,
)

if TYPE_CHECKING:
    from drivers.block.image import CheckReport, Repair
    from drivers.block.node import Node
    from nbdclient.image.session import Images

TABLE = (
    FORMAT,
    Opt("repair", "r", takes_value=True),
    OUTPUT,
    SOURCE_CACHE,
    QUIET,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
)

FAILED, CORRUPT, LEAKS, UNSUPPORTED = 1, 2, 3, 63


def run(arguments: Sequence[str]) -> int:
    given = parse("check", TABLE, arguments)
    repair = given.get("repair")
    if repair not in (None, "leaks", "all"):
        raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {repair}")
    as_json = given.json
    filename = given.one_image()
    from nbdclient.image import session

    async def command(images: Images) -> int:
        return await _check(images, given, filename, repair or "none", as_json=as_json)

    return session.run(command, given.objects, untrusted=given.untrusted)


async def _check(images: Images, given: Given, filename: str, repair: str, *, as_json: bool) -> int:
    from drivers.block.image import CheckReport, Repair
    from drivers.errors import in_words
    from nbdclient.image.__main__ import complain
    from nbdclient.image.session import READING, RESIZING, cache_flags

    flags = cache_flags(given.values.get("source-cache", "writeback"), source=True)
    node = await images.open(
        filename,
        given.format,
        image_opts=given.image_opts,
        force_share=given.force_share,
        flags=replace(flags, discard=True, for_check=True, no_backing=given.untrusted),
        needed=READING if repair == "none" else RESIZING,
    )
    failure: OSError | None = None
    try:
        report = await _checked(node, Repair(repair))
        if report.corruptions_fixed or report.leaks_fixed:
            if not as_json and not given.quiet:
                print(
                    "The following inconsistencies were found and repaired:\n\n"
                    f"    {report.leaks_fixed} leaked clusters\n"
                    f"    {report.corruptions_fixed} corruptions\n\n"
                    "Double checking the fixed image now..."
                )
            fixed = report
            report = await _checked(node, Repair.NONE)
            report.corruptions_fixed, report.leaks_fixed = fixed.corruptions_fixed, fixed.leaks_fixed
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
            complain("This image format does not support checks")
            return UNSUPPORTED
        failure, report = error, CheckReport(check_errors=1)
    if failure is None:
        _show(report, filename, node.driver_name, as_json=as_json, quiet=given.quiet)
    if failure is not None or report.check_errors:
        complain("Check failed" + (f": {in_words(failure)}" if failure is not None else ""))
        return FAILED
    return CORRUPT if report.corruptions else LEAKS if report.leaks else 0


async def _checked(node: Node, repair: Repair) -> CheckReport:
    """A check whose messages have been shown."""
    from drivers.block.image import ImageNode
    from drivers.errors import RequestError
    from nbdclient.image.session import warn

    if not isinstance(node, ImageNode):
        raise RequestError(errno.ENOTSUP)
    report = await node.check(repair)
    for message in report.messages:
        warn(message)
    return report


def _show(report: CheckReport, filename: str, image_format: str, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        from nbdclient.image.render import as_json as render_json

        print(render_json(_facts(report, filename, image_format)))
    elif not quiet:
        for line in _lines(report):
            print(line)


def _facts(report: CheckReport, filename: str, image_format: str) -> dict[str, object]:
    counts = {
        "image-end-offset": report.image_end_offset,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
    }
    always = {"filename": filename, "format": image_format, "check-errors": report.check_errors}
    return always | {key: value for key, value in counts.items() if value}


def _lines(report: CheckReport) -> Iterator[str]:
    if not report.corruptions and not report.leaks and not report.check_errors:
        yield "No errors were found on the image."
    if report.corruptions:
        yield f"\n{report.corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if report.leaks:
        yield f"\n{report.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if report.check_errors:
        yield f"\n{report.check_errors} internal errors have occurred during the check."
    total, allocated = report.total_clusters, report.allocated_clusters
    if total and allocated:
        yield (
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
            f"{100 * report.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * report.compressed_clusters / allocated:.2f}% compressed clusters"
        )
    if report.image_end_offset:
        yield f"Image end offset: {report.image_end_offset}"
