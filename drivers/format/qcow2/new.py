"""What a new qcow2 image is to be like: the options of create(), measure() and amend(), the first two
checked, and the room that its metadata takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from drivers.block.image import CreateOption
from drivers.block.node import Preallocation
from drivers.errors import OptionError
from drivers.format.qcow2.header import (
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    Header,
    Incompatible,
)
from drivers.format.qcow2.layout import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
)
from drivers.options.schema import Options, Value

CREATE_OPTIONS = (
    CreateOption(
        "encryption",
        "boolean",
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    CreateOption("encrypt.format", "string", "Encrypt the image, format choices: 'aes', 'luks'"),
    CreateOption("encrypt.key-secret", "string", "ID of secret providing qcow AES key or LUKS passphrase"),
    CreateOption("encrypt.cipher-alg", "string", "Name of encryption cipher algorithm"),
    CreateOption("encrypt.cipher-mode", "string", "Name of encryption cipher mode"),
    CreateOption("encrypt.ivgen-alg", "string", "Name of IV generator algorithm"),
    CreateOption("encrypt.ivgen-hash-alg", "string", "Name of IV generator hash algorithm"),
    CreateOption("encrypt.hash-alg", "string", "Name of encryption hash algorithm"),
    CreateOption("encrypt.iter-time", "number", "Time to spend in PBKDF in milliseconds"),
    CreateOption("cluster_size", "size", "qcow2 cluster size", "65536"),
    CreateOption("extended_l2", "boolean", "Extended L2 tables", "off"),
    CreateOption(
        "preallocation", "string", "Preallocation mode (allowed values: off, metadata, falloc, full)"
    ),
    CreateOption(
        "compression_type", "string", "Compression method used for image cluster compression", "zlib"
    ),
    CreateOption("size", "size", "Virtual disk size"),
    CreateOption("compat", "string", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    CreateOption("backing_file", "string", "File name of a base image"),
    CreateOption("backing_fmt", "string", "Image format of the base image"),
    CreateOption("data_file", "string", "File name of an external data file"),
    CreateOption("data_file_raw", "boolean", "The external data file must stay valid as a raw image"),
    CreateOption("lazy_refcounts", "boolean", "Postpone refcount updates", "off"),
    CreateOption("refcount_bits", "number", "Width of a reference count entry in bits", "16"),
)

# Of create()'s options those that can be changed later, and what changes the key slots.
_AMENDABLE = (
    "size",
    "compat",
    "backing_file",
    "backing_fmt",
    "data_file",
    "data_file_raw",
    "encrypt.iter-time",
    "lazy_refcounts",
    "refcount_bits",
)
AMEND_OPTIONS = (
    *(option._replace(default=None) for option in CREATE_OPTIONS if option.name in _AMENDABLE),
    CreateOption("encrypt.state", "string", "Select new state of affected keyslots (active/inactive)"),
    CreateOption(
        "encrypt.new-secret", "string", "New secret to set in the matching keyslots. Empty string to erase"
    ),
    CreateOption("encrypt.old-secret", "string", "Select all keyslots that match this password"),
    CreateOption("encrypt.keyslot", "number", "Select a single keyslot to modify explicitly"),
)

T = TypeVar("T")

DEFAULT_CLUSTER_SIZE = 65536
VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
# QEMU counts sizes in sectors.
_SECTOR = 512
_NEWER = "supported with compatibility level 1.1 and above (use version=v3 or greater)"


@dataclass(frozen=True, kw_only=True)
class NewImage:
    """The options of create(). `encrypt` are those that begin with "encrypt.", still to be read
    by whom they concern; `backing_format` only with a backing file."""

    size: int
    version: int
    cluster_bits: int
    refcount_order: int
    extended_l2: bool
    lazy_refcounts: bool
    preallocation: Preallocation
    compression_type: CompressionType
    backing_name: str | None
    backing_format: str | None
    data_file: str | None
    data_file_raw: bool
    crypt_method: CryptMethod
    encrypt: dict[str, Value]

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_tables(self) -> int:
        """L2 tables that map the whole image."""
        return divide_up(self.size, self.cluster_size * (self.cluster_size // self.l2_entry_size))

    def header(self) -> Header:
        """The header, but for the places of the tables."""
        incompatible = 0
        if self.data_file is not None:
            incompatible |= Incompatible.DATA_FILE
        if self.compression_type != CompressionType.ZLIB:
            incompatible |= Incompatible.COMPRESSION
        if self.extended_l2:
            incompatible |= Incompatible.EXTENDED_L2
        return Header(
            version=self.version,
            cluster_bits=self.cluster_bits,
            size=self.size,
            l1_size=0,
            l1_table_offset=0,
            refcount_table_offset=0,
            refcount_table_clusters=0,
            crypt_method=self.crypt_method,
            incompatible=incompatible,
            compatible=Compatible.LAZY_REFCOUNTS if self.lazy_refcounts else 0,
            autoclear=Autoclear.RAW_DATA_FILE if self.data_file_raw else 0,
            refcount_order=self.refcount_order,
            compression_type=self.compression_type,
            backing_name=self.backing_name,
            backing_format=self.backing_format,
            data_file_name=self.data_file,
        )


def take_options(options: Options, *, size: int | None = None) -> NewImage:
    """The options of create(), which go together. `size` stands in for the option, where that is
    missing. Raises OptionError, in the words of qemu-img."""
    image_size = options.size("size") if size is None else options.size("size", size)
    version = _choice(options, "compat", VERSIONS, "v3", name="version")
    backing_name = options.string("backing_file", None)
    backing_format = options.string("backing_fmt", None)
    if backing_format and not backing_name:
        raise OptionError("Backing format cannot be used without backing file")
    data_file = options.string("data_file", None)
    image = NewImage(
        size=divide_up(image_size, _SECTOR) * _SECTOR,
        version=version,
        cluster_bits=power_of_two(
            options.size("cluster_size", DEFAULT_CLUSTER_SIZE), MIN_CLUSTER_BITS, MAX_CLUSTER_BITS,
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        refcount_order=power_of_two(
            options.integer("refcount_bits", 16), 0, 6,
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        extended_l2=options.boolean("extended_l2", False),
        lazy_refcounts=options.boolean("lazy_refcounts", False),
        preallocation=_choice(
            options, "preallocation", {mode.value: mode for mode in Preallocation}, "off"
        ),
        compression_type=_choice(
            options, "compression_type", {kind.name.lower(): kind for kind in CompressionType}, "zlib",
            name="compression-type",
        ),
        backing_name=backing_name or None,
        backing_format=backing_format or None,
        data_file=data_file,
        data_file_raw=options.boolean("data_file_raw", False),
        crypt_method=CryptMethod.NONE,
        encrypt={},
    )  # fmt: skip
    _check(image)
    return _with_encryption(image, options)


def _choice(
    options: Options, key: str, values: Mapping[str, T], default: str, *, name: str | None = None
) -> T:
    value = options.string(key, default)
    if value not in values:
        raise OptionError(f"Parameter '{name or key}' does not accept value '{value}'")
    return values[value]


def power_of_two(value: int, low: int, high: int, message: str) -> int:
    """log2 of `value`, which must lie from `low` to `high`."""
    bits = value.bit_length() - 1
    if not low <= bits <= high or value != 1 << bits:
        raise OptionError(message)
    return bits


def _check(image: NewImage) -> None:
    """What does not go together."""
    if image.version < 3:
        for used, what in (
            (image.lazy_refcounts, f"Lazy refcounts only {_NEWER}"),
            (image.extended_l2, f"Extended L2 entries are only {_NEWER}"),
            (image.compression_type != CompressionType.ZLIB, f"Non-zlib compression type is only {_NEWER}"),
            (image.data_file is not None, f"External data files are only {_NEWER}"),
            (
                image.refcount_order != 4,
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use version=v3 or greater)",
            ),
        ):
            if used:
                raise OptionError(what)
    if image.extended_l2 and image.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise OptionError("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")
    if image.preallocation != Preallocation.OFF and image.backing_name and not image.extended_l2:
        raise OptionError(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )
    if image.data_file_raw and image.data_file is None:
        raise OptionError("data-file-raw requires data-file")
    if image.data_file_raw and image.backing_name:
        raise OptionError("Backing file and data-file-raw cannot be used at the same time")


def _with_encryption(image: NewImage, options: Options) -> NewImage:
    encrypt = options.subtree("encrypt")
    legacy = options.boolean("encryption", None)
    method = encrypt.pop("format", None)
    if legacy is not None and method is not None:
        raise OptionError("'encrypt.format' and its alias 'encryption' can't be used at the same time")
    if legacy:
        method = "aes"
    if method is None:
        if encrypt:
            raise OptionError("Parameter 'encrypt.format' is missing")
        return image
    if method not in ("aes", "luks"):
        raise OptionError(f"Parameter 'format' does not accept value '{method}'")
    crypt_method = CryptMethod.AES if method == "aes" else CryptMethod.LUKS
    return replace(image, crypt_method=crypt_method, encrypt=encrypt)


def check_size(image: NewImage, message: str) -> None:
    """Refuse an image that is too large for its clusters' size, with `message`."""
    if image.l2_tables * 8 > MAX_L1_BYTES:
        raise OptionError(f"{message} (try using a larger cluster size)")


def refcount_clusters(clusters: int, cluster_bits: int, refcount_order: int) -> tuple[int, int]:
    """(clusters of the refcount table, refcount blocks) that count `clusters` and themselves."""
    cluster_size = 1 << cluster_bits
    per_block = cluster_size * 8 >> refcount_order
    table = blocks = 0
    while True:
        needed_blocks = divide_up(clusters + table + blocks, per_block)
        needed_table = divide_up(needed_blocks * 8, cluster_size)
        if (needed_table, needed_blocks) == (table, blocks):
            return table, blocks
        table, blocks = needed_table, needed_blocks


def divide_up(value: int, divisor: int) -> int:
    return -(-value // divisor)
