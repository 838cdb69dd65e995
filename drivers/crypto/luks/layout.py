"""The LUKS1 header: parsed and bounded, and built. See the LUKS1 on-disk format, "The partition
header". Integers are big-endian; offsets are in sectors of 512 bytes from where the header begins.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from drivers.crypto.cipher import ALGORITHMS, check_cipher, key_bytes
from drivers.crypto.hashes import MAX_ITERATIONS, check_hash
from drivers.errors import ImageError, OptionError

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
SECTOR = 512
SLOTS = 8
STRIPES = 4000
SALT_BYTES = 32
DIGEST_LENGTH = 20
# Key material begins and ends at multiples of this.
ALIGNMENT = 4096
# Far behind any real one, which are at 1 to 2 MiB.
MAX_PAYLOAD_OFFSET = 1 << 30

_ACTIVE = 0x00AC71F3
_INACTIVE = 0x0000DEAD

_FIXED = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
HEADER_BYTES = _FIXED.size + SLOTS * _SLOT.size


@dataclass(frozen=True, kw_only=True)
class Format:
    """How an image is encrypted, in QEMU's words. `iv_hash` is used by essiv alone."""

    algorithm: str = "aes-256"
    mode: str = "xts"
    iv_generator: str = "plain64"
    iv_hash: str = "sha256"
    hash_name: str = "sha256"

    @property
    def key_bytes(self) -> int:
        return key_bytes(self.algorithm, self.mode)

    def check(self) -> None:
        """Raise OptionError for what is unknown, or cannot be used together."""
        check_hash(self.hash_name)
        if self.iv_generator == "essiv":
            check_hash(self.iv_hash)
        check_cipher(self.algorithm, self.mode, iv_generator=self.iv_generator, iv_hash=self.iv_hash)


@dataclass(frozen=True, kw_only=True)
class KeySlot:
    """`offset` is in bytes; `iterations` is 0 and `salt` zeroes where the slot is not active."""

    active: bool
    offset: int
    iterations: int = 0
    salt: bytes = bytes(SALT_BYTES)


@dataclass(frozen=True, kw_only=True)
class Header:
    """`payload_offset` is in bytes; 0 where the header lies apart from the data."""

    format: Format
    payload_offset: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def material_bytes(self) -> int:
        """The size of a slot's key material."""
        return self.format.key_bytes * STRIPES

    def with_slot(self, index: int, slot: KeySlot) -> Header:
        return replace(self, slots=(*self.slots[:index], slot, *self.slots[index + 1 :]))

    def build(self) -> bytes:
        """HEADER_BYTES of them."""
        algorithm = ALGORITHMS[self.format.algorithm]
        mode = f"{self.format.mode}-{self.format.iv_generator}"
        if self.format.iv_generator == "essiv":
            mode += f":{self.format.iv_hash}"
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            algorithm.family.encode(),
            mode.encode(),
            self.format.hash_name.encode(),
            self.payload_offset // SECTOR,
            self.format.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode(),
        )
        slots = (
            _SLOT.pack(
                _ACTIVE if slot.active else _INACTIVE,
                slot.iterations,
                slot.salt,
                slot.offset // SECTOR,
                STRIPES,
            )
            for slot in self.slots
        )
        return fixed + b"".join(slots)


def slot_stride(format: Format) -> int:
    """Bytes from one slot's key material to the next one's, where they lie as QEMU lays them."""
    return -(-format.key_bytes * STRIPES // ALIGNMENT) * ALIGNMENT


def header_area(format: Format) -> int:
    """Bytes that a new header takes with its key slots; the payload begins there."""
    return ALIGNMENT + SLOTS * slot_stride(format)


def parse(data: bytes, *, area: int | None = None) -> Header:
    """The header in `data`, at least HEADER_BYTES unless the image is shorter. `area` is how many
    bytes there are for header and key slots where they do not end at the payload: in another
    format's image, or in a file of their own. Raises ImageError.
    """
    if not data.startswith(MAGIC):
        raise ImageError("Volume is not in LUKS format")
    if len(data) < HEADER_BYTES:
        raise ImageError("LUKS header is cut off")
    (
        _, version, family, mode, hash_name, payload_sector, length, digest, salt, iterations, uuid,
    ) = _FIXED.unpack_from(data)  # fmt: skip
    if version != VERSION:
        raise ImageError(f"LUKS version {version} is not supported")
    format = _parse_format(
        _text(family, "cipher name"), _text(mode, "cipher mode"), _text(hash_name, "hash spec"), length
    )
    _check_iterations(iterations, "LUKS key digest")
    payload_offset = payload_sector * SECTOR
    if payload_offset > MAX_PAYLOAD_OFFSET or (area is None and payload_offset < HEADER_BYTES):
        raise ImageError(f"LUKS payload offset {payload_offset} is out of range")
    slots = tuple(
        _parse_slot(index, *_SLOT.unpack_from(data, _FIXED.size + index * _SLOT.size))
        for index in range(SLOTS)
    )
    header = Header(
        format=format,
        payload_offset=payload_offset,
        digest=digest,
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=_text(uuid, "UUID"),
        slots=slots,
    )
    _check_slots_apart(header, payload_offset if area is None else area)
    return header


def _text(raw: bytes, field: str) -> str:
    text, end, _ = raw.partition(b"\0")
    if not end:
        raise ImageError(f"LUKS header {field} is not NUL terminated")
    if not text.isascii():
        raise ImageError(f"LUKS header {field} is not ASCII")
    return text.decode()


def _parse_format(family: str, mode_text: str, hash_name: str, length: int) -> Format:
    mode, dash, generator = mode_text.partition("-")
    if not dash:
        raise ImageError(f"LUKS header cipher mode '{mode_text}' is malformed")
    generator, _, iv_hash = generator.partition(":")
    if generator == "essiv" and not iv_hash:
        raise ImageError("LUKS header cipher mode has no hash for essiv")
    try:
        for name, algorithm in ALGORITHMS.items():
            if algorithm.family == family and key_bytes(name, mode) == length:
                break
        else:
            raise ImageError(f"LUKS header cipher name '{family}' has no key of {length} bytes")
        format = Format(
            algorithm=name,
            mode=mode,
            iv_generator=generator,
            iv_hash=iv_hash or "sha256",
            hash_name=hash_name,
        )
        format.check()
    except OptionError as error:
        raise ImageError(f"LUKS header: {error}") from None
    return format


def _parse_slot(index: int, state: int, iterations: int, salt: bytes, sector: int, stripes: int) -> KeySlot:
    if state not in (_ACTIVE, _INACTIVE):
        raise ImageError(f"Keyslot {index} state (active/disable) is corrupted")
    if stripes != STRIPES:
        raise ImageError(f"Keyslot {index} is corrupted (stripes {stripes} != {STRIPES})")
    if state == _ACTIVE:
        _check_iterations(iterations, f"Keyslot {index}")
    offset = sector * SECTOR
    if offset < HEADER_BYTES:
        raise ImageError(f"Keyslot {index} is overlapping with the LUKS header")
    return KeySlot(active=state == _ACTIVE, offset=offset, iterations=iterations, salt=salt)


def _check_iterations(iterations: int, owner: str) -> None:
    if not 0 < iterations <= MAX_ITERATIONS:
        raise ImageError(f"{owner} iteration count {iterations} is out of range")


def _check_slots_apart(header: Header, end: int) -> None:
    for index, slot in enumerate(header.slots):
        if slot.offset + header.material_bytes > end:
            raise ImageError(f"Keyslot {index} is overlapping with the encrypted payload")
        for other in range(index):
            if abs(slot.offset - header.slots[other].offset) < header.material_bytes:
                raise ImageError(f"Keyslots {other} and {index} are overlapping in the header")
