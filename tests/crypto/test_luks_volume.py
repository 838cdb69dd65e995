"""LUKS headers and volumes: what is parsed is what was built, and nothing malformed gets further."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers.crypto import afsplit
from drivers.crypto.hashes import DIGEST_BYTES, MAX_ITERATIONS, MIN_ITERATIONS, calibrate, check_hash
from drivers.crypto.luks.layout import (
    HEADER_BYTES,
    Format,
    Header,
    KeySlot,
    header_area,
    parse,
    slot_stride,
)
from drivers.crypto.luks.volume import Volume, create, unlock
from drivers.errors import ImageError, OptionError


class Memory:
    """An area in memory that remembers the order of what was done to it."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.log: list[str] = []

    async def read(self, offset: int, length: int, /) -> bytes:
        return bytes(self.content[offset : offset + length])

    async def write(self, offset: int, data: bytes, /) -> None:
        assert offset + len(data) <= len(self.content)
        self.content[offset : offset + len(data)] = data
        self.log.append("header" if offset == 0 else "material")

    async def flush(self) -> None:
        self.log.append("flush")


def header(format: Format | None = None, **changes: Any) -> Header:
    format = format or Format()
    stride = slot_stride(format)
    values: dict[str, Any] = {
        "format": format,
        "payload_offset": header_area(format),
        "digest": b"D" * 20,
        "digest_salt": b"S" * 32,
        "digest_iterations": 1000,
        "uuid": "a7708438-00bd-434b-84cd-d4e7b25e9ade",
        "slots": tuple(KeySlot(active=False, offset=4096 + index * stride) for index in range(8)),
    }
    return Header(**{**values, **changes})


FORMATS = [
    Format(),
    Format(algorithm="aes-192"),
    Format(algorithm="cast5-128", mode="cbc", hash_name="sha1"),
    Format(
        algorithm="serpent-256", mode="cbc", iv_generator="essiv", iv_hash="sha256", hash_name="ripemd160"
    ),
    Format(algorithm="twofish-128", mode="ecb", iv_generator="plain", hash_name="sha512"),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_is_built_is_parsed(format: Format) -> None:
    made = header(format).with_slot(
        3, KeySlot(active=True, offset=4096 + 3 * slot_stride(format), iterations=5)
    )
    assert len(made.build()) == HEADER_BYTES
    assert parse(made.build()) == made


def test_the_first_slots_and_the_payload_lie_where_qemu_has_them() -> None:
    assert (slot_stride(Format()), header_area(Format())) == (258048, 2068480)
    assert header_area(Format(mode="cbc")) == 1052672


# Field, its format and offset, a value, and how the refusal begins.
MALFORMED = [
    ("magic", ">6s", 0, b"LUKS\0\0", "Volume is not in LUKS format"),
    ("version", ">H", 6, 2, "LUKS version 2 is not supported"),
    ("cipher name", ">32s", 8, b"x" * 32, "LUKS header cipher name is not NUL terminated"),
    ("cipher name", ">32s", 8, b"\xff", "LUKS header cipher name is not ASCII"),
    ("cipher name", ">32s", 8, b"des", "LUKS header cipher name 'des' has no key of 64 bytes"),
    ("cipher mode", ">32s", 40, b"x" * 32, "LUKS header cipher mode is not NUL terminated"),
    ("cipher mode", ">32s", 40, b"xts", "LUKS header cipher mode 'xts' is malformed"),
    ("cipher mode", ">32s", 40, b"xts-foo", "LUKS header: Unsupported IV generator 'foo'"),
    ("cipher mode", ">32s", 40, b"foo-plain64", "LUKS header cipher name 'aes' has no key of 64 bytes"),
    ("cipher mode", ">32s", 40, b"xts-essiv", "LUKS header cipher mode has no hash for essiv"),
    ("cipher mode", ">32s", 40, b"xts-essiv:foo", "LUKS header: Hash algorithm 'foo' is not supported"),
    ("cipher mode", ">32s", 40, b"xts-essiv:sha1", "LUKS header: No AES cipher with key size 20"),
    ("hash spec", ">32s", 72, b"x" * 32, "LUKS header hash spec is not NUL terminated"),
    ("hash spec", ">32s", 72, b"foo", "LUKS header: Hash algorithm 'foo' is not supported"),
    ("payload offset", ">I", 104, 0, "LUKS payload offset 0 is out of range"),
    ("payload offset", ">I", 104, 8, "Keyslot 0 is overlapping with the encrypted payload"),
    ("payload offset", ">I", 104, 0xFFFFFFFF, "LUKS payload offset 2199023255040 is out of range"),
    ("key bytes", ">I", 108, 0, "LUKS header cipher name 'aes' has no key of 0 bytes"),
    ("key bytes", ">I", 108, 1 << 31, "LUKS header cipher name 'aes' has no key of 2147483648 bytes"),
    ("iterations", ">I", 164, 0, "LUKS key digest iteration count 0 is out of range"),
    ("iterations", ">I", 164, 0xFFFFFFFF, "LUKS key digest iteration count 4294967295 is out of range"),
    ("uuid", ">40s", 168, b"x" * 40, "LUKS header UUID is not NUL terminated"),
    ("slot 0 state", ">I", 208, 1, r"Keyslot 0 state \(active/disable\) is corrupted"),
    ("slot 0 iterations", ">II", 208, (0xAC71F3, 0), "Keyslot 0 iteration count 0 is out of range"),
    ("slot 0 offset", ">I", 248, 0, "Keyslot 0 is overlapping with the LUKS header"),
    ("slot 0 offset", ">I", 248, 0xFFFFFFFF, "Keyslot 0 is overlapping with the encrypted payload"),
    ("slot 1 offset", ">I", 296, 8, "Keyslots 0 and 1 are overlapping in the header"),
    ("slot 0 stripes", ">I", 252, 4001, r"Keyslot 0 is corrupted \(stripes 4001 != 4000\)"),
]


@pytest.mark.parametrize(("field", "kind", "offset", "value", "message"), MALFORMED)
def test_a_malformed_field_is_named(field: str, kind: str, offset: int, value: Any, message: str) -> None:
    data = bytearray(header().build())
    struct.pack_into(kind, data, offset, *(value if isinstance(value, tuple) else (value,)))
    with pytest.raises(ImageError, match=f"^{message}"):
        parse(bytes(data))


def test_the_area_in_another_format_is_bounded_too() -> None:
    data = header(payload_offset=0).build()
    assert parse(data, area=header_area(Format())).payload_offset == 0
    with pytest.raises(ImageError, match="Keyslot 7 is overlapping"):
        parse(data, area=header_area(Format()) - 4096)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, 600),
)
def test_any_header_is_parsed_or_refused(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(header().with_slot(0, KeySlot(active=True, offset=4096, iterations=9)).build())
    for offset, value in changes:
        data[offset] = value
    try:
        found = parse(bytes(data[:length]) if length < 100 else bytes(data))
    except ImageError:
        return
    for slot in found.slots:
        assert slot.offset + found.material_bytes <= found.payload_offset
        assert slot.iterations <= MAX_ITERATIONS or not slot.active


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIGEST_BYTES)
@pytest.mark.parametrize("length", [16, 24, 64])
def test_merging_undoes_splitting(name: str, length: int) -> None:
    key = random.Random(2).randbytes(length)
    material = afsplit.split(key, 50, name)
    assert len(material) == 50 * length
    assert afsplit.merge(material, length, name) == key
    damaged = bytearray(material)
    damaged[0] ^= 1
    assert afsplit.merge(bytes(damaged), length, name) != key


async def test_calibrated_iterations_follow_the_time_and_have_bounds() -> None:
    assert await calibrate("sha256", 32, 0) == MIN_ITERATIONS
    assert await calibrate("sha256", 32, 1 << 40) == MAX_ITERATIONS
    assert MIN_ITERATIONS < await calibrate("sha256", 32, 100) < await calibrate("sha256", 32, 10_000)


def test_hashes_that_nobody_has() -> None:
    with pytest.raises(OptionError, match="Hash algorithm 'foo' is not supported"):
        check_hash("foo")


async def volume(format: Format | None = None) -> tuple[Memory, Volume]:
    area = Memory(header_area(format or Format()))
    return area, await create(area, format or Format(), b"first", iter_time=0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
async def test_a_new_volume_opens_with_its_password_alone(format: Format) -> None:
    area, made = await volume(format)
    found = await unlock(area, b"first")
    assert found.header == made.header
    data = bytearray(1024)
    made.cipher.encrypt(3, memoryview(data))
    found.cipher.decrypt(3, memoryview(data))
    assert data == bytes(1024)
    for wrong in (b"", b"First", b"first "):
        with pytest.raises(OptionError, match="Invalid password, cannot unlock any keyslot"):
            await unlock(area, wrong)


async def test_every_slot_opens_and_is_erased() -> None:
    area, made = await volume()
    for index in range(1, 8):
        assert made.free_slot() == index
        await made.set_slot(index, b"second", 0)
    assert made.free_slot() is None
    assert await made.slots_of(b"second") == list(range(1, 8))
    material = bytes(area.content[made.header.slots[0].offset :][: made.header.material_bytes])
    await made.erase_slot(0)
    assert material not in area.content
    with pytest.raises(OptionError, match="Invalid password"):
        await unlock(area, b"first")
    assert (await unlock(area, b"second")).header == made.header


async def test_a_password_is_stored_before_the_header_tells_of_it_and_forgotten_in_reverse() -> None:
    area, made = await volume()
    area.log.clear()
    await made.set_slot(1, b"second", 0)
    assert area.log == ["material", "flush", "header", "flush"]
    area.log.clear()
    await made.erase_slot(1)
    assert area.log[:3] == ["header", "flush", "material"]


async def test_key_material_that_is_cut_off_is_an_image_error() -> None:
    area, _ = await volume()
    del area.content[10000:]
    with pytest.raises(ImageError, match="the key material is cut off"):
        await unlock(area, b"first")
