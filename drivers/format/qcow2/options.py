"""The runtime options of a qcow2 node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from drivers.block.node import OpenFlags
from drivers.errors import OptionError
from drivers.format.qcow2.header import Compatible, Header
from drivers.options.schema import Options

DEFAULT_L2_CACHE = 32 << 20
DEFAULT_L2_CACHE_ENTRY = 64 << 10
MIN_CACHE_ENTRIES = 2
MIN_REFCOUNT_CACHE_ENTRIES = 4
DEFAULT_CLEAN_INTERVAL = 600  # seconds

# What the overlap checks may look at before data are written; the templates take them from the left.
OVERLAP_CHECKS = (
    "main-header",
    "active-l1",
    "refcount-table",
    "snapshot-table",
    "bitmap-directory",
    "inactive-l1",
    "active-l2",
    "refcount-block",
    "inactive-l2",
)
_TEMPLATES = {
    "none": 0,
    "constant": 5,
    "cached": 8,
    "all": 9,
}


@dataclass(frozen=True, kw_only=True)
class Qcow2Options:
    """Sizes in bytes, the interval in seconds. `passes_discard`: whether freed clusters are
    discarded in the file below, by the reason why they were freed."""

    lazy_refcounts: bool
    l2_cache_size: int
    l2_cache_entry_size: int
    refcount_cache_size: int
    cache_clean_interval: int
    discard_no_unref: bool
    passes_discard: Mapping[str, bool]
    overlap_checks: frozenset[str] = field(default_factory=frozenset)


def take_options(options: Options, header: Header, flags: OpenFlags) -> Qcow2Options:
    """Take what is known here from `options`. Raises OptionError."""
    lazy = options.boolean("lazy-refcounts", bool(header.compatible & Compatible.LAZY_REFCOUNTS))
    if lazy and header.version < 3:
        raise OptionError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    entry_size = options.size("l2-cache-entry-size", min(header.cluster_size, DEFAULT_L2_CACHE_ENTRY))
    if entry_size & (entry_size - 1) or not 1 << 9 <= entry_size <= header.cluster_size:
        raise OptionError(
            "L2 cache entry size must be a power of two between 512 and the cluster size "
            f"({header.cluster_size})"
        )
    l2_cache, refcount_cache = _cache_sizes(options, header, entry_size)
    passes = {
        "request": options.boolean("pass-discard-request", flags.discard),
        "snapshot": options.boolean("pass-discard-snapshot", True),
        "other": options.boolean("pass-discard-other", False),
    }
    no_unref = options.boolean("discard-no-unref", False)
    if no_unref and header.version < 3:
        raise OptionError("discard-no-unref is only supported since qcow2 version 3")
    interval = options.integer("cache-clean-interval", DEFAULT_CLEAN_INTERVAL, low=-(1 << 63))
    if not 0 <= interval < 1 << 32:
        raise OptionError("Cache clean interval too big")
    return Qcow2Options(
        lazy_refcounts=lazy,
        l2_cache_size=l2_cache,
        l2_cache_entry_size=entry_size,
        refcount_cache_size=refcount_cache,
        cache_clean_interval=interval,
        discard_no_unref=no_unref,
        passes_discard=passes,
        overlap_checks=_overlap_checks(options),
    )


def _cache_sizes(options: Options, header: Header, entry_size: int) -> tuple[int, int]:
    """(L2 cache, refcount cache), as large as they can be of use at most."""
    total = options.size("cache-size", None)
    l2 = options.size("l2-cache-size", None)
    refcount = options.size("refcount-cache-size", None)
    smallest_refcount = MIN_REFCOUNT_CACHE_ENTRIES * header.cluster_size
    all_of_l2 = -(-header.size // header.cluster_size) * header.l2_entry_size
    all_of_l2 = max(-(-all_of_l2 // header.cluster_size), 1) * header.cluster_size
    if total is not None:
        if l2 is not None and refcount is not None:
            raise OptionError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        if l2 is not None and l2 > total:
            raise OptionError("l2-cache-size may not exceed cache-size")
        if refcount is not None and refcount > total:
            raise OptionError("refcount-cache-size may not exceed cache-size")
        if l2 is not None:
            refcount = total - l2
        elif refcount is not None:
            l2 = total - refcount
        else:
            # What maps the whole disk is worth more than more refcounts.
            l2 = min(all_of_l2, max(0, total - smallest_refcount))
            refcount = total - l2
    if l2 is None:
        l2 = min(all_of_l2, DEFAULT_L2_CACHE)
    l2 = min(l2, all_of_l2)
    if refcount is None:
        refcount = smallest_refcount
    for name, size in (("L2", l2), ("Refcount", refcount)):
        if size > (1 << 31) - 1:
            raise OptionError(f"{name} cache size too big")
    return max(l2, MIN_CACHE_ENTRIES * entry_size), max(refcount, smallest_refcount)


def _overlap_checks(options: Options) -> frozenset[str]:
    given = options.reference("overlap-check")
    nested = Options(given if isinstance(given, dict) else {}, owner=options.owner)
    template = given if isinstance(given, str) else nested.string("template", "cached")
    if template not in _TEMPLATES:
        raise OptionError(
            f"Unsupported value '{template}' for qcow2 option 'overlap-check'. "
            "Allowed are any of the following: none, constant, cached, all"
        )
    chosen = set(OVERLAP_CHECKS[: _TEMPLATES[template]])
    for name in OVERLAP_CHECKS:
        if nested.boolean(name, name in chosen):
            chosen.add(name)
        else:
            chosen.discard(name)
    if left := nested.left():
        raise OptionError(f"Block format 'qcow2' does not support the option 'overlap-check.{left}'")
    return frozenset(chosen)
