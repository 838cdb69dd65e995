"""Changing what an image was created with: see ImageNode.amend().

All that is asked for is looked at before anything is changed. Then each change takes effect with one
write of the header; one that fails leaves the image as it was before that change.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivers.block.image import Progress, RebaseNeededError
from drivers.errors import ImageError, OptionError, RequestError
from drivers.format.qcow2.downgrading import Downgrade, check_downgrade
from drivers.format.qcow2.header import FULL_LENGTH, Autoclear, Compatible, CryptMethod, Header
from drivers.format.qcow2.new import VERSIONS, power_of_two
from drivers.format.qcow2.refcount_width import change_refcount_width
from drivers.objects.encryption import amend_slots
from drivers.options.schema import Options, Tree

if TYPE_CHECKING:
    from drivers.format.qcow2.driver import Qcow2Node


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What is to be; None where nothing was said. `encrypt` are the options that begin with it."""

    version: int
    refcount_order: int
    size: int | None
    lazy_refcounts: bool | None
    data_file: str | None
    data_file_raw: bool | None
    encrypt: Tree


async def amend(node: Qcow2Node, options: Options, *, force: bool, progress: Progress) -> None:
    """Raises OptionError, in the words of qemu-img, for what cannot be changed."""
    header = node.image.header
    wanted = _take(options, header)
    _check(wanted, node)
    steps = [
        (wanted.version > header.version, _upgrade),
        (bool(wanted.encrypt), lambda node, told: _amend_slots(node, wanted.encrypt, force=force)),
        (wanted.refcount_order != header.refcount_order, lambda node, told: _recount(node, wanted, told)),
        (wanted.data_file_raw is False and header.raw_data_file, _forget_raw),
        (wanted.data_file is not None, lambda node, told: _name_data_file(node, wanted.data_file)),
        (wanted.lazy_refcounts is not None, lambda node, told: _be_lazy(node, bool(wanted.lazy_refcounts))),
        # As by QEMU, 0 is no size.
        (bool(wanted.size), lambda node, told: node.truncate(wanted.size or 0)),
        (wanted.version < header.version, _downgrade),
    ]
    todo: list[_Step] = [step for needed, step in steps if needed]
    for number, step in enumerate(todo):
        await step(node, _Part(progress, number / len(todo), 1 / len(todo)))
    progress(1.0)


# What there is to do, and whom to tell how far it is.
_Step = Callable[["Qcow2Node", Progress], Awaitable[None]]


class _Part:
    """The progress of a part of the whole."""

    def __init__(self, whole: Progress, start: float, share: float) -> None:
        self._whole = whole
        self._start = start
        self._share = share

    def __call__(self, done: float) -> None:
        self._whole(self._start + done * self._share)


# --- what is asked for --------------------------------------------------------------------------


def _take(options: Options, header: Header) -> _Wanted:
    compat = options.string("compat", None)
    if compat is not None and compat not in VERSIONS:
        raise OptionError(f"Unknown compatibility level {compat}")
    bits = options.integer("refcount_bits", None)
    order = header.refcount_order
    if bits is not None:
        message = "Refcount width must be a power of two and may not exceed 64 bits"
        order = power_of_two(bits, 0, 6, message)
    version = header.version if compat is None else VERSIONS[compat]
    lazy = options.boolean("lazy_refcounts", None)
    if version < 3 and bits not in (None, 16):
        raise OptionError(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above "
            "(use compat=1.1 or greater)"
        )
    if version < 3 and lazy:
        raise OptionError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )
    backing = options.string("backing_file", None), options.string("backing_fmt", None)
    if backing != (None, None):
        raise RebaseNeededError("Cannot amend the backing file")
    return _Wanted(
        version=version,
        refcount_order=order,
        size=options.size("size", None),
        lazy_refcounts=lazy,
        data_file=options.string("data_file", None),
        data_file_raw=options.boolean("data_file_raw", None),
        encrypt=options.subtree("encrypt"),
    )


def _check(wanted: _Wanted, node: Qcow2Node) -> None:
    image, header = node.image, node.image.header
    if wanted.encrypt and header.crypt_method == CryptMethod.NONE:
        raise OptionError("Can't amend encryption options - encryption not present")
    if wanted.encrypt and header.crypt_method != CryptMethod.LUKS:
        raise OptionError("Only LUKS encryption options can be amended")
    if wanted.data_file is not None and not header.has_data_file:
        raise OptionError("data-file can only be set for images that use an external data file")
    if wanted.data_file_raw and not header.raw_data_file:
        raise OptionError("data-file-raw cannot be set on existing images")
    if wanted.size and wanted.size % 512:
        raise OptionError("The new size must be a multiple of 512")
    if wanted.version < header.version:
        check_downgrade(image, wanted.refcount_order)
        for bitmap in node.bitmaps.values():
            if bitmap.busy:
                raise OptionError(
                    f"Bitmap '{bitmap.name}' is currently in use by another operation and cannot be used"
                )


# --- the changes --------------------------------------------------------------------------------


async def _switch(node: Qcow2Node, **changes: Any) -> None:
    try:
        await node.image.file.switch_header(**changes)
    except ImageError as error:
        raise RequestError(errno.ENOSPC, str(error)) from None


async def _upgrade(node: Qcow2Node, told: Progress) -> None:
    async with node.alone():
        fields = {"version": 3, "header_length": FULL_LENGTH}
        if node.snapshots.complete:
            await _switch(node, **fields)
        else:
            await node.snapshots.rewrite_table(**fields)
        node.image.mapping.follow_version()


async def _amend_slots(node: Qcow2Node, encrypt: Tree, *, force: bool) -> None:
    options = Options(encrypt, owner="qcow2")
    assert node.image.volume is not None
    async with node.alone():
        await amend_slots(node.image.volume, options, node.objects, force=force)
        node.image.luks = node.image.volume.header
    if left := options.left():
        raise OptionError(f"Parameter 'encrypt.{left}' is unexpected")


async def _recount(node: Qcow2Node, wanted: _Wanted, told: Progress) -> None:
    async with node.alone():
        await change_refcount_width(node.image, wanted.refcount_order, told)


async def _forget_raw(node: Qcow2Node, told: Progress) -> None:
    async with node.alone():
        await _switch(node, autoclear=node.image.header.autoclear & ~Autoclear.RAW_DATA_FILE)


async def _name_data_file(node: Qcow2Node, name: str | None) -> None:
    async with node.alone():
        await _switch(node, data_file_name=name or None)


async def _be_lazy(node: Qcow2Node, lazy: bool) -> None:
    image = node.image
    async with node.alone():
        await image.metadata.finish()
        compatible = image.header.compatible
        changed = compatible | Compatible.LAZY_REFCOUNTS if lazy else compatible & ~Compatible.LAZY_REFCOUNTS
        await _switch(node, compatible=changed)
        image.metadata.lazy = lazy


async def _downgrade(node: Qcow2Node, told: Progress) -> None:
    async with node.alone():
        await Downgrade(node.image, node.snapshots, node.stored_bitmaps, node.writer, told).run()
