"""Checking and repairing damaged qcow2 images: what qemu-img says and does to the same images."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.block.image import CheckReport, Repair
from drivers.errors import ImageError
from drivers.format.qcow2.check import check
from drivers.format.qcow2.header import parse_header
from drivers.format.qcow2.inspection import MAX_MESSAGES, CheckFailed
from drivers.format.qcow2.references import References, decode, encode
from drivers.testing.memory import MemoryNode
from tests.qcow2.damage import Damage
from tests.qcow2.images import opened, qemu_check, qemu_img, qemu_io
from tests.qcow2.samples import SAMPLES, make_sample

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

# Our figures and their names in qemu-img's JSON; what is zero may be left out there.
FIGURES = {
    "corruptions": "corruptions",
    "leaks": "leaks",
    "check_errors": "check-errors",
    "total_clusters": "total-clusters",
    "allocated_clusters": "allocated-clusters",
    "fragmented_clusters": "fragmented-clusters",
    "compressed_clusters": "compressed-clusters",
    "image_end_offset": "image-end-offset",
}


async def checked(path: Path, repair: Repair = Repair.NONE) -> tuple[CheckReport | None, list[str]]:
    """The report, or None if the check failed, and what was said."""
    header = parse_header(path.read_bytes(), for_check=True)
    async with opened(path, read_only=repair is Repair.NONE) as file:
        try:
            report, after = await check(file, header, repair)
        except CheckFailed as failed:
            said = f"qemu-img: {failed.reason}".splitlines() if failed.reason else []
            return None, [*failed.messages, *said]
    assert parse_header(path.read_bytes(), for_check=True) == after
    return report, report.messages


def _lines(stderr: str) -> list[str]:
    # Apart from the report, qemu speaks of what it could not do.
    ours_too = ("qcow2: ", "qemu-img: Check failed", "qemu-img: Could not resize", "qcow2_free_clusters")
    return [line for line in stderr.splitlines() if line and not line.startswith(ours_too)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    folder = tmp_path_factory.mktemp("samples")
    made = {}
    for name in SAMPLES:
        for for_repair in (False, True):
            path = made[name, for_repair] = folder / f"{name}-{for_repair}"
            make_sample(name, path, for_repair=for_repair)
    return made


def _damaged(sample: Path, path: Path, name: str, seed: int) -> list[str]:
    shutil.copy(sample, path)
    damage = Damage(path, f"{name}{seed}")
    damage.do(damage.random.choice((1, 1, 2, 3)))
    return damage.save()


@pytest.mark.parametrize("name", SAMPLES)
async def test_clean_images(name: str, samples: dict[tuple[str, bool], Path]) -> None:
    report, _ = await checked(samples[name, False])
    theirs = qemu_check(samples[name, False])
    assert report is not None
    assert (report.corruptions, report.leaks, report.messages) == (0, 0, [])
    assert {key: getattr(report, key) for key in FIGURES} == {
        key: theirs.get(other, 0) for key, other in FIGURES.items()
    }


@pytest.mark.parametrize("name", SAMPLES)
async def test_damaged_images_are_judged_as_by_qemu_img(
    name: str, samples: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    """The same lines in the same order, and the same figures."""
    path, compared = tmp_path / "image", 0
    for seed in range(2000, 2008):
        done = _damaged(samples[name, False], path, name, seed)
        theirs = qemu_check(path)
        if "Could not open" in theirs["stderr"]:
            continue
        report, said = await checked(path)
        assert said == _lines(theirs["stderr"]), (seed, done)
        assert (report is None) == ("check-errors" not in theirs), (seed, done)
        if report is not None:
            for key, other in FIGURES.items():
                assert getattr(report, key) == theirs.get(other, 0), (key, seed, done)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("mode", [Repair.LEAKS, Repair.ALL], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
async def test_damaged_images_are_repaired(
    name: str, mode: Repair, samples: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    """What qemu-img can repair is repaired, with its words, and to its satisfaction."""
    ours, theirs, compared = tmp_path / "ours", tmp_path / "theirs", 0
    for seed in range(3000, 3006):
        done = _damaged(samples[name, True], ours, name, seed)
        shutil.copy(ours, theirs)
        wanted = qemu_check(theirs, "-r", mode.value)
        if "check-errors" not in wanted:
            continue
        report, said = await checked(ours, mode)
        assert report is not None, (seed, done)
        said = list(said)
        if report.corruptions_fixed or report.leaks_fixed:
            again, more = await checked(ours)
            assert again is not None
            assert again.corruptions == wanted.get("corruptions", 0), (seed, done)
            assert again.leaks == wanted.get("leaks", 0), (seed, done)
            said += more
        assert said == _lines(wanted["stderr"]), (seed, done)
        assert report.corruptions_fixed == wanted.get("corruptions-fixed", 0), (seed, done)
        assert report.leaks_fixed == wanted.get("leaks-fixed", 0), (seed, done)
        assert qemu_check(ours)["status"] == wanted["status"], (seed, done)
        compared += 1
    assert compared >= 2


async def test_a_repair_keeps_snapshots_that_come_with_bitmaps(
    samples: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    """qemu-img 7.2 drops them."""
    path = tmp_path / "image"
    shutil.copy(samples["plain", False], path)
    before = qemu_img("snapshot", "-l", path).stdout
    damage = Damage(path, 0)
    damage.put(damage.l2_words()[0], damage.word(damage.l2_words()[0]) ^ 1 << 63, "COPIED")
    damage.save()
    report, _ = await checked(path, Repair.ALL)
    assert report is not None
    assert (report.corruptions, report.corruptions_fixed) == (0, 1)
    assert qemu_check(path)["status"] == 0
    assert qemu_img("snapshot", "-l", path).stdout == before
    assert "second" in before


@pytest.mark.parametrize("name", SAMPLES)
async def test_a_lost_refcount_table_is_rebuilt(
    name: str, samples: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    path = tmp_path / "image"
    shutil.copy(samples[name, False], path)
    content = qemu_io(path, "read -v 0 1M")
    damage = Damage(path, 0)
    damage.put(damage.header.refcount_table_offset, 0, "refcount table")
    damage.save()
    report, said = await checked(path, Repair.ALL)
    assert report is not None
    assert "Rebuilding refcount structure" in said
    assert (report.corruptions, report.leaks) == (0, 0)
    assert report.corruptions_fixed > 10
    assert qemu_check(path)["status"] == 0
    # The last line tells the time it took.
    assert qemu_io(path, "read -v 0 1M").splitlines()[:-1] == content.splitlines()[:-1]


@pytest.mark.parametrize("bits", [0, 1])
async def test_dirty_and_corrupt_bits_are_cleared(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    damage = Damage(path, 0)
    damage.put(72, 1 << bits, "incompatible features")
    damage.save()
    await checked(path)
    assert parse_header(path.read_bytes()).incompatible == 1 << bits
    await checked(path, Repair.LEAKS)
    assert parse_header(path.read_bytes()).incompatible == 0


async def _two_snapshots(path: Path) -> Damage:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "1M")
    qemu_io(path, "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "first", path)
    qemu_img("snapshot", "-c", "second", path)
    return Damage(path, 0)


async def test_incomplete_snapshot_entries_are_completed(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    damage = await _two_snapshots(ours)
    (at, entry), _ = damage.first_snapshots
    # The first entry loses its extra data to its name.
    damage.data[at + 40 : at + 72] = b"1" + b"x" * 31
    struct.pack_into(">HH", damage.data, at + 12, 1, 5 + len(entry.extra))
    struct.pack_into(">I", damage.data, at + 36, 0)
    damage.save()
    shutil.copy(ours, theirs)
    wanted = qemu_check(theirs, "-r", "all")
    report, said = await checked(ours, Repair.ALL)
    assert report is not None
    assert said == _lines(wanted["stderr"]) == ["Repairing snapshot table entry 0 is incomplete"]
    assert report.corruptions_fixed == wanted["corruptions-fixed"] == 1
    assert qemu_check(ours)["status"] == 0
    assert (await checked(ours))[1] == []
    assert Damage(ours, 0).first_snapshots[1][1] == damage.first_snapshots[1][1]


async def test_too_much_extra_data_is_dropped(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    damage = await _two_snapshots(ours)
    at, entry = damage.first_snapshots[1]
    end = damage.header.snapshots_offset + 4096
    strings = entry.id + entry.name
    damage.data[at + 64 : end] = bytes(end - at - 64)
    struct.pack_into(">I", damage.data, at + 36, 2000)
    damage.data[at + 2040 : at + 2040 + len(strings)] = strings
    damage.save()
    shutil.copy(ours, theirs)
    wanted = qemu_check(ours)
    report, said = await checked(ours)
    assert report is None
    assert said == _lines(wanted["stderr"])
    assert len(said) == 2
    with pytest.raises(ImageError, match="Too much extra metadata"):
        Damage(ours, 0)
    wanted = qemu_check(theirs, "-r", "all")
    report, said = await checked(ours, Repair.ALL)
    assert said == _lines(wanted["stderr"])
    assert qemu_check(ours)["status"] == 0
    assert [s.name for _, s in Damage(ours, 0).first_snapshots] == [b"first", b"second"]


async def test_overhanging_snapshots(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    qemu_img("create", "-q", "-f", "qcow2", ours, "1M")
    damage = Damage(ours, 0)
    end = len(damage.data) + -len(damage.data) % damage.size
    struct.pack_into(">IQ", damage.data, 60, 65537, end)
    damage.data.extend(bytes(end - len(damage.data)))
    damage.data.extend(struct.pack(">QIHHIIQII16x", 0, 0, 0, 0, 0, 0, 0, 0, 16) * 65537)
    damage.save()
    shutil.copy(ours, theirs)
    report, said = await checked(ours)
    assert report is None
    assert said == _lines(qemu_check(ours)["stderr"])
    report, said = await checked(ours, Repair.ALL)
    wanted = qemu_check(theirs, "-r", "all")
    assert report is not None
    assert said == _lines(wanted["stderr"])
    assert report.corruptions_fixed == wanted["corruptions-fixed"]
    assert parse_header(ours.read_bytes()).snapshot_count == 65536


# --- bounds -----------------------------------------------------------------------------------------


class _Counted(MemoryNode):
    """A disk that counts what is read of it, and tells that it is larger than it is."""

    read = 0

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        self.read += len(buffer)
        part = self.content[offset : offset + len(buffer)]
        buffer[: len(part)] = part


async def test_tables_that_lie_about_each_other_are_read_once(tmp_path: Path) -> None:
    """Every L1 entry leads to the same table, full of wrong entries."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "8G")
    damage = Damage(path, 0)
    table = len(damage.data) + -len(damage.data) % 4096
    damage.data.extend(bytes(table + 4096 - len(damage.data)))
    for at in range(table, table + 4096, 8):
        struct.pack_into(">Q", damage.data, at, 0x0055555555555400)
    header = damage.header
    for index in range(header.l1_size):
        struct.pack_into(">Q", damage.data, header.l1_table_offset + index * 8, table)
    file = _Counted(damage.data)
    report, _ = await check(file, header)
    assert file.read < 4 * len(damage.data)
    assert len(report.messages) <= MAX_MESSAGES + 1
    assert report.corruptions > 2 * 512 * header.l1_size  # misplaced, and outside of the file


async def test_overlapping_tables_end_the_check(tmp_path: Path) -> None:
    """Every L1 entry leads to another table, which overlaps the one before."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "256P")
    damage = Damage(path, 0)
    header = damage.header
    for index in range(header.l1_size):
        struct.pack_into(">Q", damage.data, header.l1_table_offset + index * 8, (index + 1) * 512)
    with pytest.raises(CheckFailed) as caught:
        await check(MemoryNode(damage.data), header)
    assert "overlap" in caught.value.reason


async def test_references_all_over_a_vast_file_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivers.format.qcow2.references.MAX_BYTES", 100 << 16)
    path = tmp_path / "image"
    options = "preallocation=metadata,data_file=" + str(tmp_path / "data")
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "512M")
    damage = Damage(path, 0)
    struct.pack_into(">Q", damage.data, 72, 0)  # the data is said to lie in the image
    file = _Counted(damage.data)
    file.size = 100 << 40
    for number, at in enumerate(damage.l2_words()):
        struct.pack_into(">Q", damage.data, at, number << 32 | 1 << 63)
    with pytest.raises(OSError, match="too large to be checked"):
        await check(file, parse_header(bytes(damage.data)))


# --- refcounts in memory ----------------------------------------------------------------------------


@given(st.integers(0, 6), st.binary(min_size=8, max_size=64))
def test_refcount_blocks_survive_decoding(order: int, data: bytes) -> None:
    data = data[: len(data) // 8 * 8]
    counts = decode(data, order)
    assert len(counts) == len(data) * 8 >> order
    assert encode(counts, order) == data
    # Entry by entry, as the format's text has it.
    bits = 1 << order
    for index, count in enumerate(counts):
        if bits < 8:
            assert count == data[index * bits // 8] >> index * bits % 8 & (1 << bits) - 1
        else:
            assert count == int.from_bytes(data[index * bits // 8 :][: bits // 8], "big")


@given(
    st.integers(0, 6),
    st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 5000), st.integers(1, 3)), max_size=6),
)
def test_references_add_up(order: int, ranges: list[tuple[int, int, int]]) -> None:
    references = References(order, 9)
    model: dict[int, int] = {}
    for first, count, weight in ranges:
        overflows = dict(references.add(first, count, weight))
        for cluster in range(first, first + count):
            total = model.get(cluster, 0) + weight
            assert overflows.pop(cluster, 0) == max(0, total - references.maximum)
            model[cluster] = min(total, references.maximum)
        assert not overflows
    assert all(references.get(cluster) == model.get(cluster, 0) for cluster in range(14500))
    assert references.shared == any(weight > 1 for *_, weight in ranges) or len(ranges) > 1
    start = references.free_run(100, 17)
    assert start >= 17
    assert not any(start + at in model for at in range(100))
    used = sorted(cluster for cluster in model if 17 <= cluster < start)
    gaps = [b - a for a, b in zip([16, *used], [*used, start], strict=True)]
    assert max(gaps) <= 100
