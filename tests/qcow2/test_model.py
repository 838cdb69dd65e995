"""Whatever is done to an image, it reads as a bytearray would, and qemu-img finds it in order; and
whatever qemu-img and qemu-io did to one, we read the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from drivers.block.image import ImageNode
from drivers.block.node import OpenFlags
from drivers.testing.imagemodel import BITMAP_KINDS, SNAPSHOT_KINDS, ImageModel
from drivers.testing.model import BASIC_KINDS, Operation, contents, operations
from tests.qcow2 import qemu
from tests.qcow2.qemu import (
    SECRET,
    check,
    create,
    map_of,
    opened,
    qemu_io,
    qemu_map,
    raw_content,
    run,
    without_holes,
)

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 300 << 10
READ_ONLY = OpenFlags(read_only=True)
ENCRYPT_AES = "encrypt.format=aes,encrypt.key-secret=sec0"
ENCRYPT_LUKS = "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10"

# --- our driver against the model ---------------------------------------------------------------

OPTIONS = [
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=64k",
    "lazy_refcounts=on,cluster_size=4k",
    "refcount_bits=1,cluster_size=4k",
    "refcount_bits=2,cluster_size=4k",
    "refcount_bits=64,cluster_size=4k",
    "preallocation=metadata,cluster_size=4k",
    "preallocation=full,cluster_size=4k",
    "data_file=disk.data,cluster_size=4k",
    "data_file=disk.data,data_file_raw=on,cluster_size=4k",
    f"{ENCRYPT_AES},cluster_size=4k",
    f"{ENCRYPT_LUKS},cluster_size=4k",
]


def kinds(options: str) -> tuple[str, ...]:
    out = (*BASIC_KINDS, "reopen")
    # With refcounts of one bit there is no sharing; in a data file neither.
    if "refcount_bits=1," not in options and "data_file" not in options:
        out += SNAPSHOT_KINDS
    if "compat=0.10" not in options:
        out += BITMAP_KINDS
    return out


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backing", [None, "raw", "qcow2"])
def test_any_sequence_of_requests_agrees_with_a_bytearray(
    tmp_path_factory: pytest.TempPathFactory, options: str, backing: str | None
) -> None:
    if backing and ("data_file_raw" in options or "preallocation" in options):
        pytest.skip("these exclude each other")
    template = Template(tmp_path_factory.mktemp("model"), options, backing)

    # Smaller failing examples are worth little when each takes two processes.
    @settings(
        max_examples=6,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
    )
    @given(steps=sequences(kinds(options)))
    def sequence(steps: list[Operation]) -> None:
        trio.run(template.replay, steps)

    sequence()


def sequences(kinds: tuple[str, ...]) -> st.SearchStrategy[list[Operation]]:
    return operations(kinds, max_size=2 * SIZE)


class Template:
    """A fresh image that is laid out again and again."""

    def __init__(self, directory: Path, options: str, backing: str | None) -> None:
        self.directory = directory
        self.encrypted = "encrypt" in options
        base = make_base(directory, backing) if backing else None
        if "data_file=" in options:
            options = options.replace("disk.data", str(directory / "disk.data"))
        self.path = create(directory / "disk.qcow2", SIZE, options, backing=base)
        self.files = {path: path.read_bytes() for path in directory.iterdir()}
        self.content = raw_content(self.path, encrypted=self.encrypted)

    async def open(self) -> ImageNode:
        tree = {"driver": "qcow2", "file": {"driver": "file", "filename": str(self.path)}}
        if self.encrypted:
            tree["encrypt"] = {"key-secret": "sec0"}
        graph = qemu.graph_with_secret(SECRET if self.encrypted else None)
        node = await graph.open(tree, OpenFlags(discard=True))
        assert isinstance(node, ImageNode)
        return node

    async def replay(self, steps: list[Operation]) -> None:
        for path, content in self.files.items():
            path.write_bytes(content)
        model = ImageModel(await self.open(), bytearray(self.content), reopen=self.open)
        try:
            with trio.fail_after(60):
                await model.check()
                await model.replay(steps)
        finally:
            await model.node.aclose()
        check(self.path, encrypted=self.encrypted)
        assert raw_content(self.path, encrypted=self.encrypted) == model.content
        model.node = await self.open()
        try:
            await model.check()
        finally:
            await model.node.aclose()


def make_base(directory: Path, image_format: str, size: int = SIZE - 50 * 1024) -> tuple[Path, str]:
    """A backing file, shorter than the image, with a bit of everything."""
    path = directory / f"base.{image_format}"
    if image_format == "raw":
        path.write_bytes(random.Random(1).randbytes(100_000) + bytes(100_000))
        with path.open("r+b") as file:
            file.truncate(size)
    else:
        create(path, size, "cluster_size=8k")
        qemu_io(path, "write -P 17 0 60k", "write -P 18 100k 30k", "write -z 110k 8k", "write -P 19 249k 1k")
    return path, image_format


# --- images by qemu, pairwise -------------------------------------------------------------------

CHOICES: dict[str, tuple[str, ...]] = {
    "compat": ("1.1", "0.10"),
    "cluster_size": ("64k", "512", "4k", "2M"),
    "extended_l2": ("off", "on"),
    "refcount_bits": ("16", "1", "4", "64"),
    "lazy_refcounts": ("off", "on"),
    "compression_type": ("zlib", "zstd"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "data_file": ("", "data", "raw"),
    "encrypt": ("", "aes", "luks"),
    "backing": ("", "raw", "qcow2"),
}
Combination = dict[str, str]


def possible(choice: Combination) -> bool:
    """What qemu-img accepts. A part of a combination may be asked about."""
    get = {key: values[0] for key, values in CHOICES.items()} | choice
    if get["compat"] == "0.10":
        new = ("extended_l2", "lazy_refcounts", "data_file", "compression_type")
        if get["refcount_bits"] != "16" or any(get[key] != CHOICES[key][0] for key in new):
            return False
    if get["extended_l2"] == "on" and get["cluster_size"] in ("512", "4k"):
        return False
    if get["data_file"] and (get["encrypt"] == "aes" or (get["data_file"] == "raw" and get["backing"])):
        return False
    if get["data_file"] == "raw" and get["encrypt"]:
        return False
    return not (get["backing"] and get["preallocation"] != "off")


@cache
def pairwise() -> tuple[str, ...]:
    """Combinations in which every possible pair of two options' values appears."""
    missing = {
        ((one, first), (two, second))
        for one, two in itertools.combinations(CHOICES, 2)
        for first in CHOICES[one]
        for second in CHOICES[two]
        if possible({one: first, two: second})
    }
    chance = random.Random(1)
    out = []
    while missing:
        start = dict(min(missing))
        best = max(
            (_filled(start, chance) for _ in range(30)), key=lambda choice: len(missing & _pairs(choice))
        )
        missing -= _pairs(best)
        out.append(",".join(f"{key}={best[key]}" for key in CHOICES))
    return tuple(out)


def _filled(start: Combination, chance: random.Random) -> Combination:
    choice = dict(start)
    for key in chance.sample(list(CHOICES), len(CHOICES)):
        values = [value for value in CHOICES[key] if possible({**choice, key: value})]
        if key not in choice:
            choice[key] = chance.choice(values)
    return choice


def _pairs(choice: Combination) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations([(key, choice[key]) for key in CHOICES], 2))


def test_the_combinations_have_every_pair() -> None:
    found = set()
    for text in pairwise():
        choice = dict(pair.split("=") for pair in text.split(","))
        assert possible(choice)
        found |= {frozenset(pair) for pair in _pairs(choice)}
    assert frozenset({("cluster_size", "512"), ("backing", "qcow2")}) in found
    assert frozenset({("extended_l2", "on"), ("compression_type", "zstd")}) in found
    assert len(pairwise()) < 60


@pytest.mark.parametrize("combination", pairwise())
async def test_what_qemu_made_reads_the_same_through_us(tmp_path: Path, combination: str) -> None:
    choice = dict(pair.split("=") for pair in combination.split(","))
    path = tmp_path / "disk.qcow2"
    base = make_base(tmp_path, choice["backing"]) if choice["backing"] else None
    create(path, SIZE, create_options(choice, tmp_path), backing=base)
    encrypted = bool(choice["encrypt"])
    snapshots = []
    chance = random.Random(combination)
    for turn in range(3):
        qemu_io(path, *commands(choice, chance), encrypted=encrypted, may_fail=True)
        if not encrypted and choice["refcount_bits"] != "1" and not choice["data_file"]:
            run("qemu-img", "snapshot", "-c", f"turn {turn}", path)
            snapshots.append(f"turn {turn}")
    qemu_io(path, *commands(choice, chance), encrypted=encrypted, may_fail=True)
    secret = SECRET if encrypted else None
    async with opened(path, READ_ONLY, secret=secret) as node:
        assert await contents(node) == raw_content(path, encrypted=encrypted)
        if not encrypted:
            assert without_holes(await map_of(node)) == without_holes(qemu_map(path))
    for name in snapshots:
        async with opened(path, READ_ONLY) as node:
            assert node.snapshots is not None
            await node.snapshots.load(name)
            assert await contents(node) == raw_content(path, snapshot=name)


def create_options(choice: Combination, directory: Path) -> str:
    words = [f"{key}={choice[key]}" for key in CHOICES if key not in ("data_file", "encrypt", "backing")]
    if choice["compat"] == "0.10":
        words = [word for word in words if "refcount" not in word and "compression" not in word]
    if choice["data_file"]:
        words.append(f"data_file={directory / 'disk.data'}")
        words.append(f"data_file_raw={'on' if choice['data_file'] == 'raw' else 'off'}")
    if choice["encrypt"]:
        words.append({"aes": ENCRYPT_AES, "luks": ENCRYPT_LUKS}[choice["encrypt"]])
    return ",".join(words)


def commands(choice: Combination, chance: random.Random) -> Iterator[str]:
    """What a guest and its management may do, at places where something ends."""
    cluster = qemu.cluster_size(f"cluster_size={choice['cluster_size']}")
    for _ in range(chance.randrange(3, 9)):
        offset = chance.choice((0, cluster, SIZE // 2, chance.randrange(SIZE))) & ~511
        offset = min(offset, SIZE - 512)
        length = chance.choice((512, 1024, cluster // 2, cluster, 3 * cluster, chance.randrange(SIZE)))
        length = max(512, min(length & ~511, SIZE - offset))
        fill = chance.randrange(1, 256)
        kinds = [f"write -P {fill}"] * 3 + ["write -z", "write -z -u", "discard"]
        kind = chance.choice(kinds)
        whole = cluster <= SIZE and not choice["data_file"] and not choice["encrypt"]
        if whole and chance.random() < 0.25:
            offset = offset // cluster * cluster
            length = min(cluster, SIZE - offset)
            kind = f"write -c -P {fill}"
        yield f"{kind} {offset} {length}"
