"""What an image says of itself: `nbdimg info`."""

from __future__ import annotations

from drivers.block.dirty import DirtyBitmap
from drivers.block.image import ImageInfo
from drivers.crypto.luks.layout import Header as LuksHeader
from drivers.format.qcow2.header import Compatible, CryptMethod, Header, Incompatible
from drivers.format.qcow2.image import Image
from drivers.objects.encryption import describe as describe_luks
from drivers.options.schema import Tree, Value


def describe(image: Image, bitmaps: list[DirtyBitmap]) -> ImageInfo:
    header = image.header
    return ImageInfo(
        cluster_size=header.cluster_size,
        encrypted=header.crypt_method != CryptMethod.NONE,
        dirty=bool(header.incompatible & Incompatible.DIRTY),
        backing_filename=header.backing_name,
        backing_format=header.backing_format,
        specific=_specific(image, header, bitmaps),
    )


def _specific(image: Image, header: Header, bitmaps: list[DirtyBitmap]) -> Tree:
    facts: Tree = {
        "compat": "0.10" if header.version < 3 else "1.1",
        "compression-type": header.compression_type.name.lower(),
    }
    if header.version >= 3:
        facts["lazy-refcounts"] = bool(header.compatible & Compatible.LAZY_REFCOUNTS)
        if bitmaps:
            facts["bitmaps"] = [_bitmap(bitmap) for bitmap in bitmaps]
    facts["refcount-bits"] = header.refcount_bits
    if header.has_data_file:
        if header.data_file_name is not None:
            facts["data-file"] = header.data_file_name
        facts["data-file-raw"] = header.raw_data_file
    if header.crypt_method == CryptMethod.AES:
        facts["encrypt"] = {"format": "aes"}
    elif image.luks is not None:
        facts["encrypt"] = _luks(image.luks)
    if header.version >= 3:
        facts["corrupt"] = bool(header.incompatible & Incompatible.CORRUPT)
        facts["extended-l2"] = header.extended_l2
    return facts


def _luks(header: LuksHeader) -> Tree:
    facts: Tree = {}
    for key, value in describe_luks(header).items():
        if key == "cipher-mode":
            facts["format"] = "luks"
        facts[key] = value
    return facts


def _bitmap(bitmap: DirtyBitmap) -> Tree:
    flags: list[Value] = ["in-use"] if bitmap.inconsistent else []
    if bitmap.enabled:
        flags.append("auto")
    return {"flags": flags, "name": bitmap.name, "granularity": bitmap.granularity}
