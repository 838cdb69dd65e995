"""Images amended by us are what qemu-img would have made of them, and what is refused is refused in its
words."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from drivers.block.image import ImageNode
from drivers.block.node import OpenFlags
from drivers.errors import Error, OptionError
from drivers.format.qcow2.new import AMEND_OPTIONS
from drivers.objects.store import ObjectStore
from drivers.options.keyval import parse_keyval
from drivers.options.schema import Options
from drivers.testing.faulty import FaultyNode
from drivers.testing.memory import MemoryNode
from drivers.testing.model import contents
from drivers.testing.powercut import PowerCutNode
from tests.qcow2.qemu import attempt, check, create, opened, opened_over, qemu_io, raw_content, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 1 << 20


async def amend(node: ImageNode, text: str, **more: Any) -> None:
    options = Options(parse_keyval(text), owner="qcow2")
    await node.amend(options, **more)
    options.finish()


def specific(path: Path) -> dict[str, Any]:
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    found: dict[str, Any] = info["format-specific"]["data"]
    return found


def filled(path: Path, options: str, *, backing: bool = False, compressed: bool = True) -> Path:
    """Data, zero clusters of each kind, two snapshots that share them, and `compressed` clusters."""
    base = None
    if backing:
        base = (path.with_name("base.raw"), "raw")
        base[0].write_bytes(bytes(range(1, 129)) * (SIZE * 3 // 4 // 128))
    create(path, SIZE, options, backing=base)
    v3 = "compat=0.10" not in options
    zero = ("write -z 128k 100k", "write -P 5 300k 100k", "write -z 300k 64k", "write -z 900k 60k")
    qemu_io(path, "write -P 1 0 200k", *(zero if v3 else ()))
    if "data_file" not in options:
        run("qemu-img", "snapshot", "-c", "first", path)
        qemu_io(path, "write -P 2 64k 10k", "write -z 330k 10k")
        if compressed:
            qemu_io(path, "write -c -P 9 512k 128k")
        run("qemu-img", "snapshot", "-c", "second", path)
        qemu_io(path, "write -z 64k 64k", "write -P 3 700k 7k")
    return path


def states(path: Path) -> list[bytes]:
    """The disk and its snapshots."""
    snapshots = run("qemu-img", "snapshot", "-l", path)
    names = [name for name in ("first", "second") if name in snapshots]
    return [raw_content(path), *(raw_content(path, snapshot=name) for name in names)]


# --- compat -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize(
    "options",
    ["cluster_size=4k", "cluster_size=64k", "cluster_size=512", "lazy_refcounts=on", "cluster_size=128k"],
)
async def test_down_to_version_2_and_up_again(tmp_path: Path, options: str, backing: bool) -> None:
    path = filled(tmp_path / "disk.qcow2", options, backing=backing)
    before = states(path)
    told: list[float] = []
    async with opened(path) as node:
        await amend(node, "compat=0.10", progress=told.append)
        assert await contents(node) == before[0]
        await node.write(200 << 10, b"version 2")
        await node.discard(0, 64 << 10)
        await node.write(0, before[0][: 64 << 10])
        await node.write(200 << 10, before[0][200 << 10 :][:9])
    assert specific(path)["compat"] == "0.10"
    check(path)
    assert states(path) == before
    assert told == sorted(told)
    assert told[-1] == 1.0
    async with opened(path) as node:
        await amend(node, "compat=v3,lazy_refcounts=on")
        await node.write_zeroes(0, SIZE)
        assert await contents(node) == bytes(SIZE)
    found = specific(path)
    assert (found["compat"], found["lazy-refcounts"]) == ("1.1", True)
    check(path)
    assert states(path) == [bytes(SIZE), *before[1:]]


async def test_a_preallocated_zero_cluster_that_is_data_in_a_snapshot_stays_data_there(
    tmp_path: Path,
) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, "write -P 1 0 128k")
    run("qemu-img", "snapshot", "-c", "first", path)
    qemu_io(path, "write -z 0 64k")
    before = states(path)
    assert before[0] != before[1]
    async with opened(path) as node:
        await amend(node, "compat=0.10")
    check(path)
    assert states(path) == before


async def test_what_only_the_image_has_afterwards_is_its_own_to_write(tmp_path: Path) -> None:
    """A cluster is data in the disk, zeroes in a snapshot; the snapshot lets go of it."""
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, "write -P 1 0 128k")
    run("qemu-img", "snapshot", "-c", "other", path)
    qemu_io(path, "write -z 0 64k")
    run("qemu-img", "snapshot", "-c", "second", path)
    run("qemu-img", "snapshot", "-a", "other", path)
    run("qemu-img", "snapshot", "-d", "other", path)
    before = states(path)
    assert before[0] != before[1]
    async with opened(path) as node:
        await amend(node, "compat=0.10")
    check(path)
    assert states(path) == before


async def test_zero_clusters_without_a_backing_file_take_no_storage(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, "write -z 0 1M")
    async with opened(path) as node:
        await amend(node, "compat=0.10")
    check(path)
    assert not any(row["present"] for row in json.loads(run("qemu-img", "map", "--output=json", path)))


async def test_bitmaps_go_with_version_3_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE)
    run("qemu-img", "bitmap", "--add", path, "b")
    qemu_io(path, "write 0 64k")
    async with opened(path) as node:
        await amend(node, "compat=0.10")
        assert not node.bitmaps
    check(path)
    assert specific(path) == {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
    assert "bitmap" not in attempt("qemu-img", "info", path).stderr


async def test_encrypted_zeroes_are_written_encrypted(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, "encrypt.format=aes,encrypt.key-secret=sec0")
    qemu_io(path, "write -P 1 0 128k", "write -z 0 64k", encrypted=True)
    before = raw_content(path, encrypted=True)
    async with opened(path, secret="correct horse") as node:
        await amend(node, "compat=0.10")
        assert await contents(node) == before
    assert raw_content(path, encrypted=True) == before


async def test_old_snapshots_get_what_version_3_asks_for(tmp_path: Path) -> None:
    """Version 2 need not tell how large the disk was: the extra data are taken out here by hand."""
    path = filled(tmp_path / "disk.qcow2", "compat=0.10")
    before = states(path)
    data = bytearray(path.read_bytes())
    at = int.from_bytes(data[64:72], "big")
    for _ in range(2):
        id_size, name_size = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (12, 14))
        extra = int.from_bytes(data[at + 36 : at + 40], "big")
        data[at + 36 : at + 40] = bytes(4)
        text = data[at + 40 + extra :][: id_size + name_size]
        length = -(-(40 + extra + len(text)) // 8) * 8
        rest = data[at + length : at + 4096]
        shorter = data[at : at + 40] + text + bytes(-len(text) % 8)
        data[at : at + 4096] = (shorter + rest).ljust(4096, b"\0")
        at += len(shorter)
    path.write_bytes(data)
    async with opened(path) as node:
        await amend(node, "compat=1.1")
    check(path)
    assert states(path) == before


# --- refcount_bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
async def test_references_are_counted_in_every_width(tmp_path: Path, cluster: str) -> None:
    path = filled(tmp_path / "disk.qcow2", f"cluster_size={cluster}", compressed=False)
    before = states(path)
    for bits in (64, 2, 32, 4, 8, 16):
        told: list[float] = []
        async with opened(path) as node:
            await amend(node, f"refcount_bits={bits}", progress=told.append)
            await node.write(0, before[0][:4096])
            await node.truncate(SIZE + (16 << 20))
            await node.write(SIZE + (8 << 20), b"x" * 200_000)
            await node.truncate(SIZE)
        assert told == sorted(told)
        assert specific(path)["refcount-bits"] == bits
        check(path)
        assert states(path) == before


async def test_one_bit_is_refused_where_clusters_are_shared_in_qemu_s_words(tmp_path: Path) -> None:
    path = filled(tmp_path / "disk.qcow2", "")
    theirs = attempt("qemu-img", "amend", "-o", "refcount_bits=1", path).stderr
    async with opened(path) as node:
        with pytest.raises(OptionError) as caught:
            await amend(node, "refcount_bits=1")
        await node.write(0, b"x")
    assert theirs == f"qemu-img: {caught.value}\n"
    check(path)
    assert specific(path)["refcount-bits"] == 16
    run("qemu-img", "snapshot", "-d", "first", path)
    run("qemu-img", "snapshot", "-d", "second", path)
    qemu_io(path, "write 512k 128k")  # no compressed clusters that share one
    async with opened(path) as node:
        await amend(node, "refcount_bits=1")
        await node.write(0, b"y" * SIZE)
    check(path)


async def test_a_large_sparse_image_is_counted_anew_without_reading_all_of_it(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", 1 << 50, "cluster_size=2M")
    qemu_io(path, "write -P 1 100T 4M")
    async with opened(path) as node:
        for bits in (64, 1):
            await amend(node, f"refcount_bits={bits}")
    check(path)
    assert path.stat().st_blocks * 512 < 64 << 20


# --- the others ---------------------------------------------------------------------------------


async def test_lazy_refcounts_on_and_off(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE)
    async with opened(path) as node:
        await node.write(0, b"a" * 70_000)
        await amend(node, "lazy_refcounts=on")
        await node.write(200_000, b"b" * 70_000)
        await node.flush()
        assert json.loads(run("qemu-img", "info", "-U", "--output=json", path))["dirty-flag"] is True
        await amend(node, "lazy_refcounts=off")
        run("qemu-img", "check", "-U", path)
        await node.write(400_000, b"c" * 70_000)
    assert specific(path)["lazy-refcounts"] is False
    check(path)


async def test_the_size(tmp_path: Path) -> None:
    path = filled(tmp_path / "disk.qcow2", "")
    before = states(path)
    async with opened(path) as node:
        await amend(node, "size=2M")
        assert node.size == 2 * SIZE
        with pytest.raises(OptionError, match="Internal snapshots prevent downgrade of image"):
            await amend(node, "compat=0.10")
        await amend(node, "size=1M,compat=0.10,refcount_bits=16")
        await amend(node, "size=0")  # as by qemu-img, no size at all
    assert states(path) == before
    check(path)


@pytest.mark.parametrize("raw", [False, True])
async def test_the_data_file(tmp_path: Path, raw: bool) -> None:
    options = f"data_file={tmp_path}/a.raw" + (",data_file_raw=on" if raw else "")
    path = filled(tmp_path / "disk.qcow2", options)
    before = raw_content(path)
    shutil.copy(tmp_path / "a.raw", tmp_path / "b.raw")
    async with opened(path) as node:
        await amend(node, f"data_file={tmp_path}/b.raw,data_file_raw=off")
    (tmp_path / "a.raw").unlink()
    found = specific(path)
    assert (found["data-file"], found["data-file-raw"]) == (f"{tmp_path}/b.raw", False)
    assert raw_content(path) == before
    async with opened(path) as node:
        await amend(node, "data_file=")
    assert "data-file" not in json.loads(
        run("qemu-img", "info", "--output=json", "--image-opts",
            f"driver=qcow2,file.filename={path},data-file.filename={tmp_path}/b.raw")
    )["format-specific"]["data"]  # fmt: skip


REFUSED = [
    ("", "compat=0.42"),
    ("", "compat=0.10,lazy_refcounts=on"),
    ("", "compat=0.10,refcount_bits=8"),
    ("", "refcount_bits=3"),
    ("", "refcount_bits=0"),
    ("", "refcount_bits=128"),
    ("", "data_file=x"),
    ("", "data_file_raw=on"),
    ("", "encrypt.state=active"),
    ("", "encrypt.new-secret=sec0"),
    ("", "size=1000000"),
    ("", "backing_file=x"),
    ("", "backing_fmt=raw"),
    ("compat=0.10", "lazy_refcounts=on"),
    ("compat=0.10", "refcount_bits=8"),
    ("refcount_bits=8", "compat=0.10"),
    ("extended_l2=on", "compat=0.10"),
    ("data_file=DIR/x.raw", "compat=0.10"),
    ("data_file=DIR/x.raw", "data_file_raw=on"),
    ("compression_type=zstd", "compat=0.10"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
async def test_what_is_refused_is_refused_in_qemu_img_s_words(
    tmp_path: Path, options: str, text: str
) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, options.replace("DIR", str(tmp_path)))
    if "zstd" in options:
        qemu_io(path, "write -c 0 64k")
    theirs = attempt("qemu-img", "amend", "-o", text, path)
    assert theirs.returncode == 1
    before = path.read_bytes()
    async with opened(path) as node:
        with pytest.raises(Error) as caught:
            await amend(node, text)
    # The hint that follows is about a command of the program.
    first = theirs.stderr.partition("\nYou can use")[0].rstrip("\n")
    assert first == f"qemu-img: {caught.value}"
    assert path.read_bytes() == before


async def test_zstd_without_compressed_clusters_goes_down(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, "compression_type=zstd")
    async with opened(path) as node:
        await amend(node, "compat=0.10")
        await node.write_compressed(0, b"z" * 65536)
    assert specific(path)["compression-type"] == "zlib"
    assert raw_content(path)[:65536] == b"z" * 65536


def test_the_options_are_qemu_img_s() -> None:
    theirs = run("qemu-img", "amend", "-f", "qcow2", "-o", "help").splitlines()[1:]
    kinds = {"string": "str", "boolean": "bool (on/off)", "number": "num", "size": "size"}
    ours = [(f"{name}=<{kinds[kind]}>", help) for name, kind, help, _ in sorted(AMEND_OPTIONS)]
    assert ours == [tuple(part.strip() for part in line.split(" - ", 1)) for line in theirs]


# --- encryption ---------------------------------------------------------------------------------


async def with_secrets(path: Path) -> ImageNode:
    from drivers.block.graph import Graph
    from drivers.catalog import Catalog

    secrets = [
        {"qom-type": "secret", "id": f"sec{n}", "data": data} for n, data in enumerate(("correct horse", "b"))
    ]
    graph = Graph(Catalog(), ObjectStore.of(secrets))
    tree = {
        "driver": "qcow2",
        "encrypt": {"key-secret": "sec0"},
        "file": {"driver": "file", "filename": str(path)},
    }
    node = await graph.open(tree, OpenFlags())
    assert isinstance(node, ImageNode)
    return node


async def test_passwords_are_added_and_erased(tmp_path: Path) -> None:
    form = "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10"
    path = create(tmp_path / "disk.qcow2", SIZE, form)
    node = await with_secrets(path)
    with pytest.raises(OptionError, match="'new-secret' is required to activate a keyslot"):
        await amend(node, "encrypt.state=active")
    await amend(node, "encrypt.state=active,encrypt.new-secret=sec1,encrypt.keyslot=3,encrypt.iter-time=10")
    await amend(node, "encrypt.state=inactive,encrypt.old-secret=sec0")
    with pytest.raises(OptionError, match="only active keyslot"):
        await amend(node, "encrypt.state=inactive,encrypt.keyslot=3")
    await node.write(0, b"alive")
    await node.aclose()
    found = [slot["active"] for slot in specific(path)["encrypt"]["slots"]]
    assert found == [index == 3 for index in range(8)]
    other = ("--object", "secret,id=sec0,data=b", "--image-opts")
    run("qemu-img", "check", *other, f"driver=qcow2,encrypt.key-secret=sec0,file.filename={path}")


async def test_the_last_password_is_erased_by_force_only(tmp_path: Path) -> None:
    form = "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10"
    path = create(tmp_path / "disk.qcow2", SIZE, form)
    node = await with_secrets(path)
    await amend(node, "encrypt.state=inactive,encrypt.keyslot=0", force=True)
    await node.aclose()
    assert not any(slot["active"] for slot in specific(path)["encrypt"]["slots"])


async def test_legacy_encryption_has_no_slots(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, "encrypt.format=aes,encrypt.key-secret=sec0")
    node = await with_secrets(path)
    with pytest.raises(OptionError, match="Only LUKS encryption options can be amended"):
        await amend(node, "encrypt.state=active,encrypt.new-secret=sec1")
    await node.aclose()


# --- when something goes wrong ------------------------------------------------------------------

CHANGES = ["compat=0.10", "refcount_bits=64", "refcount_bits=2", "lazy_refcounts=on", "compat=0.10,size=512k"]


def small(tmp_path: Path, change: str) -> bytes:
    """An image on which the change has much to do; snapshots of another size would forbid some."""
    path = tmp_path / "small.qcow2"
    if "size" not in change:
        return filled(path, "cluster_size=4k", compressed=False).read_bytes()
    create(path, SIZE, "cluster_size=4k")
    qemu_io(path, "write -P 1 0 200k", "write -z 128k 100k", "write -P 4 700k 9k")
    return path.read_bytes()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("change", CHANGES)
async def test_every_io_fails_once(tmp_path: Path, change: str, number: int) -> None:
    image = small(tmp_path, change)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    kept = states(path)
    if "size" in change:  # what is behind the new end goes bit by bit
        kept = [kept[0][: SIZE // 2]]
    calls = 0
    index = -1
    while index < calls:
        below = MemoryNode(bytearray(image))
        disk = FaultyNode(below, name="disk")
        await disk.use("file", below)
        errors: list[Exception] = []
        try:
            async with opened_over(disk) as node:
                first = len(disk.calls)
                if index >= 0:
                    disk.fail_call = {first + index: number}
                try:
                    await amend(node, change)
                except (OSError, Error) as error:
                    errors.append(error)
                await node.flush()
        except (OSError, Error) as error:
            errors.append(error)
        if index < 0:
            assert not errors
            calls = len(disk.calls) - first
        elif disk.calls[first + index][0] not in ("discard", "write_zeroes", "close", "block_status"):
            assert errors, disk.calls[first + index]
        path.write_bytes(below.content)
        check(path, leaks=True)
        found = states(path)
        if "size" in change:
            found = [found[0][: SIZE // 2]]
        assert found == kept
        # Every call once, but of those in a long row only some.
        index += 1 if index < 40 or calls - index < 30 else 7


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
async def test_the_power_fails(tmp_path: Path, change: str, seed: int) -> None:
    image = small(tmp_path, change)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    kept = states(path)
    if "size" in change:
        kept = [kept[0][: SIZE // 2]]
    disk = PowerCutNode(image)
    async with opened_over(disk) as node:
        await amend(node, change)
    chance = random.Random(seed)
    positions = set(chance.sample(range(disk.position + 1), min(20, disk.position + 1)))
    for position, cuts in disk.cuts(seed=seed, limit=4):
        if position not in positions:
            continue
        for state in list(cuts)[:3]:
            path.write_bytes(state)
            check(path, leaks=True)
            found = states(path)
            if "size" in change:
                found = [found[0][: SIZE // 2]]
            assert found == kept
