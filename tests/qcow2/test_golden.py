"""Images made by the real qemu-img read as they did when they were made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from drivers.block.node import OpenFlags
from drivers.testing.model import check_plain, contents
from tests.golden.unpack import Golden, golden
from tests.qcow2.qemu import (
    check,
    comparable,
    map_of,
    opened,
    opened_by_name,
    qemu_map,
    raw_content,
    without_holes,
)


@pytest.fixture(autouse=True)
def _where_the_images_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a data file is seen from there


READ_ONLY = OpenFlags(read_only=True)
IMAGES = golden("qcow2")


def some(predicate: object) -> pytest.MarkDecorator:
    names = [name for name, row in IMAGES.items() if predicate(row)]  # type: ignore[operator]
    assert names
    return pytest.mark.parametrize("image", [IMAGES[name] for name in names], ids=names)


every = some(lambda row: True)
readable = some(lambda row: row.sha256)
# What the format's probing and the file name alone suffice for.
clear = some(lambda row: row.sha256 and not row.secret)


@readable
@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
async def test_the_guest_finds_what_was_written(tmp_path: Path, image: Golden, writable: bool) -> None:
    path = image.unpack(tmp_path)
    async with opened(path, OpenFlags(read_only=not writable), secret=image.secret) as node:
        assert node.size == image.size
        found = await contents(node)
        assert hashlib.sha256(found).hexdigest() == image.sha256
        for start, length, *_ in image.map:
            check_plain(node, found, start, length)


@clear
@pytest.mark.parametrize("image_format", ["qcow2", None], ids=["named", "probed"])
async def test_it_opens_by_its_name(tmp_path: Path, image: Golden, image_format: str | None) -> None:
    path = image.unpack(tmp_path)
    async with opened_by_name(path, READ_ONLY, image_format) as node:
        assert node.driver_name == "qcow2"
        assert hashlib.sha256(await contents(node)).hexdigest() == image.sha256


@every
async def test_the_map_is_that_of_qemu_img(tmp_path: Path, image: Golden) -> None:
    path = image.unpack(tmp_path)
    async with opened(path, READ_ONLY, secret=image.secret) as node:
        assert await map_of(node) == comparable(list(image.map))


@every
async def test_reading_changes_nothing(tmp_path: Path, image: Golden) -> None:
    path = image.unpack(tmp_path)
    before = {file: (tmp_path / file).read_bytes() for file in image.files}
    async with opened(path, READ_ONLY, secret=image.secret) as node:
        await node.read_into(0, bytearray(min(node.size, 1 << 20)))
        await node.block_status(0, node.size)
    assert {file: (tmp_path / file).read_bytes() for file in image.files} == before


@pytest.mark.peer("qemu-img")
@clear
async def test_what_is_written_is_found_by_qemu_img_and_nothing_else_changed(
    tmp_path: Path, image: Golden
) -> None:
    path = image.unpack(tmp_path)
    async with opened(path) as node:
        model = await contents(node)
        for place in range(0, node.size - 5000, max(5000, node.size // 7)):
            await node.write(place + 300, b"w" * 4000)
            model[place + 300 : place + 4300] = b"w" * 4000
        await node.write_zeroes(0, node.size // 3)
        model[: node.size // 3] = bytes(node.size // 3)
    check(path)
    assert raw_content(path) == model
    async with opened(path, READ_ONLY) as node:
        assert await contents(node) == model
        assert without_holes(await map_of(node)) == without_holes(qemu_map(path))


@some(lambda row: row.snapshots)
async def test_internal_snapshots_read_as_they_were(tmp_path: Path, image: Golden) -> None:
    path = image.unpack(tmp_path)
    for name, expected in image.snapshots.items():
        async with opened(path, READ_ONLY) as node:
            assert node.snapshots is not None
            assert [info.name for info in node.snapshots.list()] == list(image.snapshots)
            found = node.snapshots.find(name)
            assert found is not None
            assert found.id == expected["id"]
            await node.snapshots.load(name)
            assert node.size == found.disk_size
            # qemu-img shows a snapshot in the size that the image has now.
            content = (await contents(node))[: expected["size"]].ljust(expected["size"], b"\0")
            assert hashlib.sha256(content).hexdigest() == expected["sha256"]


@some(lambda row: row.bitmaps)
async def test_stored_bitmaps(tmp_path: Path, image: Golden) -> None:
    path = image.unpack(tmp_path)
    async with opened(path, READ_ONLY) as node:
        assert set(node.bitmaps) == set(image.bitmaps)
        for name, expected in image.bitmaps.items():
            bitmap = node.bitmaps[name]
            assert bitmap.persistent
            assert bitmap.granularity == expected["granularity"]
            assert bitmap.inconsistent == expected["inconsistent"]
            if not bitmap.inconsistent:
                assert bitmap.enabled == expected["enabled"]
                assert [list(dirty) for dirty in bitmap.dirty_ranges()] == expected["dirty"]


@pytest.mark.peer("qemu-img")
async def test_an_image_left_dirty_is_repaired_when_it_is_opened_for_writing(tmp_path: Path) -> None:
    path = IMAGES["lazy-dirty"].unpack(tmp_path)
    async with opened(path):
        pass
    check(path)


def test_the_images_are_small() -> None:
    """A LUKS header holds at least 64 KiB of key material, which nothing compresses."""
    for image in IMAGES.values():
        for packed in image.directory.glob(f"{image.name}.*.gz"):
            limit = 80 if image.name == "encrypted-luks" else 20
            assert packed.stat().st_size < limit << 10, packed.name


def test_every_packed_file_belongs_to_an_image() -> None:
    directory = next(iter(IMAGES.values())).directory
    known = {f"{image.name}.{file}.gz" for image in IMAGES.values() for file in image.files}
    assert {path.name for path in directory.glob("*.gz")} == known
