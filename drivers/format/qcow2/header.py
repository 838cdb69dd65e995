"""The header of a qcow2 image and its extensions: parsed and bounded, and built.

See QEMU's docs/interop/qcow2.txt, "Header" and "Header extensions". Every count, offset and size
is held against a limit before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag

from drivers.errors import ImageError
from drivers.format.qcow2.layout import (
    MAX_BACKING_NAME,
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    MAX_CLUSTER_BITS,
    MAX_HEADER_EXTENSIONS,
    MAX_HOST_OFFSET,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    SNAPSHOT_ENTRY_SIZE,
)

MAGIC = 0x514649FB
V2_LENGTH = 72
V3_LENGTH = 104
# With compression_type, padded to a multiple of 8.
FULL_LENGTH = 112
_V2 = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")


class Incompatible(IntFlag):
    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    BITMAPS = 1 << 0
    RAW_DATA_FILE = 1 << 1


class CryptMethod(IntEnum):
    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    ZLIB = 0
    ZSTD = 1


class ExtensionType(IntEnum):
    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


# (type, bit, name) of the features that this driver knows, for the feature name table.
FEATURE_NAMES: tuple[tuple[int, int, str], ...] = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
# Smaller first clusters go without the table.
FEATURE_NAMES_CLUSTER_BITS = 13
_FEATURE_NAME = struct.Struct(">BB46s")
_KNOWN_INCOMPATIBLE = (1 << 5) - 1
KNOWN_AUTOCLEAR = (1 << 2) - 1


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    count: int
    directory_size: int
    directory_offset: int

    FORMAT = struct.Struct(">IIQQ")

    def build(self) -> bytes:
        return self.FORMAT.pack(self.count, 0, self.directory_size, self.directory_offset)


@dataclass(frozen=True, slots=True)
class EncryptionHeader:
    offset: int
    length: int

    FORMAT = struct.Struct(">QQ")

    def build(self) -> bytes:
        return self.FORMAT.pack(self.offset, self.length)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header with its extensions. Features are plain integers, bits as in the enums above.

    `unknown_fields` are the bytes behind the fields that are known here; `extensions` those that
    are kept as they were found: (type, data).
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    crypt_method: CryptMethod = CryptMethod.NONE
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = FULL_LENGTH
    compression_type: CompressionType = CompressionType.ZLIB
    unknown_fields: bytes = b""
    backing_name: str | None = None
    backing_format: str | None = None
    data_file_name: str | None = None
    bitmaps: BitmapsExtension | None = None
    encryption: EncryptionHeader | None = None
    feature_names: tuple[tuple[int, int, str], ...] = ()
    extensions: tuple[tuple[int, bytes], ...] = ()

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        return self.has_data_file and bool(self.autoclear & Autoclear.RAW_DATA_FILE)

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_bits(self) -> int:
        """log2 of the entries of an L2 table."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    def needed_l1_size(self, size: int) -> int:
        """L1 entries for an image of `size` bytes."""
        shift = self.cluster_bits + self.l2_bits
        return (size + (1 << shift) - 1) >> shift

    def build(self) -> bytes:
        """The header cluster up to the end of the backing file name, without padding to the
        cluster. Raises ImageError if it does not fit in."""
        out = bytearray(self.header_length if self.version >= 3 else V2_LENGTH)
        extensions = b"".join(_extension(*pair) for pair in self._all_extensions())
        backing = b"" if self.backing_name is None else self.backing_name.encode(errors="surrogateescape")
        backing_offset = len(out) + len(extensions) if self.backing_name is not None else 0
        _V2.pack_into(
            out, 0, MAGIC, self.version, backing_offset, len(backing), self.cluster_bits, self.size,
            self.crypt_method, self.l1_size, self.l1_table_offset, self.refcount_table_offset,
            self.refcount_table_clusters, self.snapshot_count, self.snapshots_offset,
        )  # fmt: skip
        if self.version >= 3:
            _V3.pack_into(
                out, V2_LENGTH, self.incompatible, self.compatible, self.autoclear,
                self.refcount_order, self.header_length,
            )  # fmt: skip
            if self.header_length > V3_LENGTH:
                out[V3_LENGTH] = self.compression_type
            out[V3_LENGTH + 1 :][: len(self.unknown_fields)] = self.unknown_fields
        whole = bytes(out) + extensions + backing
        if len(whole) > self.cluster_size:
            raise ImageError("the header with the backing file name does not fit into the first cluster")
        return whole

    def _all_extensions(self) -> Iterator[tuple[int, bytes]]:
        if self.backing_format is not None:
            yield ExtensionType.BACKING_FORMAT, self.backing_format.encode(errors="surrogateescape")
        if self.data_file_name is not None:
            yield ExtensionType.DATA_FILE, self.data_file_name.encode(errors="surrogateescape")
        if self.encryption is not None:
            yield ExtensionType.ENCRYPTION, self.encryption.build()
        # The names would leave too little room for others in small clusters.
        if self.version >= 3 and self.cluster_bits >= FEATURE_NAMES_CLUSTER_BITS:
            table = (_FEATURE_NAME.pack(kind, bit, name.encode()) for kind, bit, name in FEATURE_NAMES)
            yield ExtensionType.FEATURE_NAMES, b"".join(table)
        if self.bitmaps is not None:
            yield ExtensionType.BITMAPS, self.bitmaps.build()
        yield from self.extensions
        yield ExtensionType.END, b""


def _extension(kind: int, data: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)


def parse_header(data: bytes, *, for_check: bool = False) -> Header:
    """The header from the first cluster (or as much of it as there is, at least 72 bytes).

    Unknown incompatible features are refused by name; whether what is described fits together is
    checked as far as the header alone can tell; but not, with `for_check`, what a check of the image
    can repair. Raises ImageError.
    """
    if len(data) < V2_LENGTH:
        raise ImageError("qcow2 header is too short")
    (
        magic, version, backing_offset, backing_size, cluster_bits, size, crypt_method, l1_size, l1_offset,
        refcount_offset, refcount_clusters, snapshot_count, snapshots_offset,
    ) = _V2.unpack_from(data)  # fmt: skip
    if magic != MAGIC:
        raise ImageError("Image is not in qcow2 format")
    if version not in (2, 3):
        raise ImageError(f"Unsupported qcow2 version {version}")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise ImageError(f"Unsupported cluster size: 2^{cluster_bits}")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=l1_size,
        l1_table_offset=l1_offset,
        refcount_table_offset=refcount_offset,
        refcount_table_clusters=refcount_clusters,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
        header_length=V2_LENGTH,
    )
    if version >= 3:
        header = _parse_v3(header, data)
    extensions_end = header.cluster_size
    if backing_offset:
        if backing_offset > header.cluster_size:
            raise ImageError("Invalid backing file offset")
        extensions_end = backing_offset
    header = _parse_extensions(header, data[:extensions_end])
    _check_features(header)
    if crypt_method not in tuple(CryptMethod):
        raise ImageError(f"Unsupported encryption method {crypt_method}")
    header = replace(header, crypt_method=CryptMethod(crypt_method))
    _check(header)
    if not for_check:
        check_snapshot_table(header)
    if backing_offset:
        header = replace(header, backing_name=_backing_name(header, data, backing_offset, backing_size))
    return header


def _parse_v3(header: Header, data: bytes) -> Header:
    if len(data) < V3_LENGTH:
        raise ImageError("qcow2 header too short")
    incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(data, V2_LENGTH)
    if header_length < V3_LENGTH:
        raise ImageError("qcow2 header too short")
    if header_length > header.cluster_size:
        raise ImageError("qcow2 header exceeds cluster size")
    if header_length > len(data):
        raise ImageError("Could not read unknown header fields: the file ends inside the header")
    if refcount_order > 6:
        raise ImageError("Reference count entry width too large; may not exceed 64 bits")
    compression = data[V3_LENGTH] if header_length > V3_LENGTH else 0
    return replace(
        header,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        header_length=header_length,
        compression_type=compression,  # type: ignore[arg-type]  # checked in _check, when the features are known to be
        unknown_fields=data[V3_LENGTH + 1 : header_length],
    )


def _parse_extensions(header: Header, data: bytes) -> Header:
    """Header extensions. Of several of a known type the last one counts; what is unknown is kept."""
    at = header.header_length
    kept: list[tuple[int, bytes]] = []
    for _ in range(MAX_HEADER_EXTENSIONS):
        if at + _EXTENSION.size > len(data):
            break
        kind, length = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        if kind == ExtensionType.END:
            break
        if length > len(data) - at:
            raise ImageError("Header extension too large")
        content = data[at : at + length]
        at += length + -length % 8
        known = _known_extension(header, kind, content)
        if known is None:
            kept.append((kind, content))
        else:
            header = known
    return replace(header, extensions=tuple(kept))


def _known_extension(header: Header, kind: int, content: bytes) -> Header | None:
    if kind == ExtensionType.BACKING_FORMAT:
        if len(content) > 15:
            raise ImageError(f"ERROR: ext_backing_format: len={len(content)} too large")
        return replace(header, backing_format=content.decode(errors="surrogateescape"))
    if kind == ExtensionType.DATA_FILE:
        return replace(header, data_file_name=content.decode(errors="surrogateescape"))
    if kind == ExtensionType.FEATURE_NAMES:
        return replace(header, feature_names=tuple(_feature_names(content)))
    if kind == ExtensionType.ENCRYPTION:
        if len(content) != EncryptionHeader.FORMAT.size:
            raise ImageError(
                f"CRYPTO header extension size {len(content)}, but expected size "
                f"{EncryptionHeader.FORMAT.size}"
            )
        return replace(header, encryption=_parse_encryption(header, content))
    if kind == ExtensionType.BITMAPS:
        # Without the autoclear bit somebody wrote to the image who knows no bitmaps: they are
        # stale, and dropped with the next rewrite of the header.
        if not header.autoclear & Autoclear.BITMAPS:
            return header
        return replace(header, bitmaps=_parse_bitmaps(header, content))
    return None


def _feature_names(content: bytes) -> Iterator[tuple[int, int, str]]:
    """The rows up to the first one without a name; the last one may be cut short."""
    whole = content + bytes(-len(content) % _FEATURE_NAME.size)
    for feature, bit, name in _FEATURE_NAME.iter_unpack(whole):
        if not name[0]:
            return
        yield feature, bit, name.split(b"\0")[0].decode(errors="replace")


def _parse_encryption(header: Header, content: bytes) -> EncryptionHeader:
    offset, length = EncryptionHeader.FORMAT.unpack(content)
    if offset % header.cluster_size:
        raise ImageError(
            f"Encryption header offset '{offset}' is not a multiple of cluster size '{header.cluster_size}'"
        )
    if not 0 < offset < MAX_HOST_OFFSET or not 0 < length <= 64 << 20:
        raise ImageError("Encryption header offset or length is out of range")
    return EncryptionHeader(offset, length)


def _parse_bitmaps(header: Header, content: bytes) -> BitmapsExtension:
    if len(content) != BitmapsExtension.FORMAT.size:
        raise ImageError("bitmaps_ext: Invalid extension length")
    count, reserved, size, offset = BitmapsExtension.FORMAT.unpack(content)
    if reserved:
        raise ImageError("bitmaps_ext: Reserved field is not zero")
    if count > MAX_BITMAPS:
        raise ImageError(
            f"bitmaps_ext: image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        )
    if not count:
        raise ImageError("bitmaps_ext: found bitmaps extension with zero bitmaps")
    if offset % header.cluster_size or offset >= MAX_HOST_OFFSET:
        raise ImageError("bitmaps_ext: invalid bitmap directory offset")
    if not size or size > MAX_BITMAP_DIRECTORY_BYTES:
        raise ImageError(
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size "
            f"({MAX_BITMAP_DIRECTORY_BYTES})"
        )
    return BitmapsExtension(count, size, offset)


def _check_features(header: Header) -> None:
    unknown = header.incompatible & ~_KNOWN_INCOMPATIBLE
    if not unknown:
        return
    names: list[str] = []
    for kind, bit, name in header.feature_names:
        if kind == 0 and bit < 64 and unknown >> bit & 1:
            names.append(name)
            unknown &= ~(1 << bit)
    if unknown:
        names.append(f"Unknown incompatible feature: {unknown:x}")
    raise ImageError(f"Unsupported qcow2 feature(s): {', '.join(names)}")


def _check(header: Header) -> None:
    compression: int = header.compression_type
    if bool(header.incompatible & Incompatible.COMPRESSION) != (compression != CompressionType.ZLIB):
        raise ImageError(
            "Compression type incompatible feature bit must "
            + ("not be set" if compression == CompressionType.ZLIB else "be set")
        )
    if compression not in tuple(CompressionType):
        raise ImageError(f"qcow2: unknown compression type: {compression}")
    object.__setattr__(header, "compression_type", CompressionType(compression))
    if header.extended_l2 and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise ImageError("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")
    if header.size > (1 << 63) - 1 - (1 << 21):
        raise ImageError("Image is too big")
    if not header.refcount_table_clusters:
        raise ImageError("Image does not contain a reference count table")
    check_table(
        header, header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits,
        MAX_REFCOUNT_TABLE_BYTES, "Reference count table",
    )  # fmt: skip
    if header.l1_size > MAX_L1_BYTES // 8:
        raise ImageError("Active L1 table too large")
    if header.needed_l1_size(header.size) > MAX_L1_BYTES // 8:
        raise ImageError("Image is too big")
    if header.l1_size < header.needed_l1_size(header.size):
        raise ImageError("L1 table is too small")
    if header.l1_size:
        check_table(header, header.l1_table_offset, header.l1_size * 8, MAX_L1_BYTES, "Active L1 table")


def check_snapshot_table(header: Header) -> None:
    """Raises ImageError."""
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise ImageError("Snapshot table too large")
    if header.snapshot_count:
        check_table(
            header, header.snapshots_offset, header.snapshot_count * SNAPSHOT_ENTRY_SIZE,
            MAX_SNAPSHOT_TABLE_BYTES, "Snapshot table",
        )  # fmt: skip


def check_table(header: Header, offset: int, length: int, limit: int, name: str) -> None:
    """A table of `length` bytes at `offset` of the file is not too large and lies where one may."""
    if length > limit:
        raise ImageError(f"{name} too large")
    if offset % header.cluster_size or not 0 < offset <= MAX_HOST_OFFSET - length:
        raise ImageError(f"{name} offset invalid")


def _backing_name(header: Header, data: bytes, offset: int, size: int) -> str:
    if size > min(MAX_BACKING_NAME, header.cluster_size - offset):
        raise ImageError("Backing file name too long")
    if offset + size > len(data):
        raise ImageError("Could not read backing file name: the file ends inside it")
    return data[offset : offset + size].decode(errors="surrogateescape")
