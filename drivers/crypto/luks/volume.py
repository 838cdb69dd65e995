"""An unlocked LUKS volume: opened with a password or made anew, and its key slots changed."""

from __future__ import annotations

import hmac
import secrets
import uuid
from typing import Protocol

import trio

from drivers.crypto import afsplit
from drivers.crypto.cipher import SectorCipher, in_turns
from drivers.crypto.hashes import calibrate, pbkdf2
from drivers.crypto.luks.layout import (
    DIGEST_LENGTH,
    HEADER_BYTES,
    SALT_BYTES,
    SECTOR,
    SLOTS,
    STRIPES,
    Format,
    Header,
    KeySlot,
    header_area,
    parse,
    slot_stride,
)
from drivers.errors import ImageError, OptionError

DEFAULT_ITER_TIME = 2000
# What is written over an erased slot's key material before zeroes are.
_ERASING_PASSES = 3


class Area(Protocol):
    """Where header and key slots lie: offsets are from where the header begins."""

    async def read(self, offset: int, length: int, /) -> bytes:
        """As many bytes, or fewer at the end."""
        ...

    async def write(self, offset: int, data: bytes, /) -> None: ...

    async def flush(self) -> None: ...


class Volume:
    """A LUKS volume whose key is known.

    `cipher` is for the payload, whose sectors count from 0 at `header.payload_offset` (in a qcow2
    image they are what that format says); see SectorCipher.
    """

    def __init__(self, area: Area, header: Header, key: bytes) -> None:
        self.header = header
        self.cipher = _cipher(header.format, key)
        self._area = area
        self._key = key

    @property
    def payload_offset(self) -> int:
        """Bytes."""
        return self.header.payload_offset

    # --- key slots --------------------------------------------------------------------------

    async def slots_of(self, password: bytes) -> list[int]:
        """The active slots that `password` opens."""
        return [
            index
            for index, slot in enumerate(self.header.slots)
            if slot.active and await _try_slot(self._area, self.header, slot, password) is not None
        ]

    async def set_slot(self, index: int, password: bytes, iter_time: int = DEFAULT_ITER_TIME) -> None:
        """Have `password` open the volume through slot `index`. `iter_time` in milliseconds."""
        header = self.header
        size = header.format.key_bytes
        iterations = await calibrate(header.format.hash_name, size, iter_time)
        slot = KeySlot(
            active=True,
            offset=header.slots[index].offset,
            iterations=iterations,
            salt=secrets.token_bytes(SALT_BYTES),
        )
        slot_key = await pbkdf2(header.format.hash_name, password, slot.salt, iterations, size)
        material = await trio.to_thread.run_sync(afsplit.split, self._key, STRIPES, header.format.hash_name)
        data = bytearray(material.ljust(-(-len(material) // SECTOR) * SECTOR, b"\0"))
        await in_turns(_cipher(header.format, slot_key).encrypt, 0, memoryview(data))
        # The material is there before the header says so.
        await self._area.write(slot.offset, bytes(data[: len(material)]))
        await self._area.flush()
        await self._write_header(header.with_slot(index, slot))

    async def erase_slot(self, index: int) -> None:
        """Make slot `index` inactive and its key material unrecoverable, as far as the storage
        below writes in place."""
        slot = self.header.slots[index]
        await self._write_header(self.header.with_slot(index, KeySlot(active=False, offset=slot.offset)))
        for _ in range(_ERASING_PASSES):
            await self._area.write(slot.offset, secrets.token_bytes(self.header.material_bytes))
            await self._area.flush()

    def free_slot(self) -> int | None:
        return next((index for index, slot in enumerate(self.header.slots) if not slot.active), None)

    async def _write_header(self, header: Header) -> None:
        await self._area.write(0, header.build())
        await self._area.flush()
        self.header = header


async def unlock(area: Area, password: bytes, *, area_bytes: int | None = None) -> Volume:
    """Open the volume with the first key slot that `password` fits. For `area_bytes` see
    layout.parse(). Raises ImageError where the header is malformed, OptionError for a wrong password.
    """
    header = await read_header(area, area_bytes=area_bytes)
    for slot in header.slots:
        if slot.active and (key := await _try_slot(area, header, slot, password)) is not None:
            return Volume(area, header, key)
    raise OptionError("Invalid password, cannot unlock any keyslot")


async def read_header(area: Area, *, area_bytes: int | None = None) -> Header:
    return parse(await area.read(0, HEADER_BYTES), area=area_bytes)


async def create(
    area: Area,
    format: Format,
    password: bytes,
    *,
    iter_time: int = DEFAULT_ITER_TIME,
    detached: bool = False,
) -> Volume:
    """Write a new header, header_area() bytes with its key slots, of which `password` opens the
    first. `iter_time`: the milliseconds that opening it may take. With `detached` the payload begins
    at 0, in another file. Raises OptionError."""
    format.check()
    key = secrets.token_bytes(format.key_bytes)
    salt = secrets.token_bytes(SALT_BYTES)
    # An eighth of the time is what LUKS gives to checking the key.
    iterations = await calibrate(format.hash_name, DIGEST_LENGTH, iter_time // 8)
    first = (header_area(format) - SLOTS * slot_stride(format), slot_stride(format))
    header = Header(
        format=format,
        payload_offset=0 if detached else header_area(format),
        digest=await pbkdf2(format.hash_name, key, salt, iterations, DIGEST_LENGTH),
        digest_salt=salt,
        digest_iterations=iterations,
        uuid=str(uuid.uuid4()),
        slots=tuple(KeySlot(active=False, offset=first[0] + index * first[1]) for index in range(SLOTS)),
    )
    volume = Volume(area, header, key)
    await volume.set_slot(0, password, iter_time)
    return volume


async def _try_slot(area: Area, header: Header, slot: KeySlot, password: bytes) -> bytes | None:
    """The volume's key, if `password` opens `slot`."""
    format = header.format
    slot_key = await pbkdf2(format.hash_name, password, slot.salt, slot.iterations, format.key_bytes)
    material = await area.read(slot.offset, header.material_bytes)
    if len(material) < header.material_bytes:
        raise ImageError(f"Keyslot at {slot.offset}: the key material is cut off")
    # The last sector may be a part of one. It is decrypted like the beginning of a whole one.
    data = bytearray(material.ljust(-(-len(material) // SECTOR) * SECTOR, b"\0"))
    await in_turns(_cipher(format, slot_key).decrypt, 0, memoryview(data))
    whole = bytes(data[: len(material)])
    key = await trio.to_thread.run_sync(afsplit.merge, whole, format.key_bytes, format.hash_name)
    found = await pbkdf2(format.hash_name, key, header.digest_salt, header.digest_iterations, DIGEST_LENGTH)
    return key if hmac.compare_digest(found, header.digest) else None


def _cipher(format: Format, key: bytes) -> SectorCipher:
    return SectorCipher(
        format.algorithm, format.mode, key, iv_generator=format.iv_generator, iv_hash=format.iv_hash
    )
