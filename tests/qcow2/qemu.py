"""What the tests of qcow2 images share: making them with qemu-img, opening them with our driver, and
asking qemu-img what it thinks of them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from drivers.block.extents import Extent, ExtentFlags, merged
from drivers.block.graph import Graph
from drivers.block.image import ImageNode
from drivers.block.node import Node, OpenFlags
from drivers.block.opening import open_image
from drivers.catalog import Catalog
from drivers.options.schema import Value

SECRET = "correct horse"
ENCRYPTED = ("--object", f"secret,id=sec0,data={SECRET}")

# A row of a map: (start, length, depth, present, zero, data, offset); depth None where nobody has it.
Row = tuple[int, int, int | None, bool, bool, bool, int | None]


def run(*command: object) -> str:
    """Run a command that has to succeed; its output."""
    done = attempt(*command)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def attempt(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    # QEMU takes the name of a data file from where it runs, unlike that of a backing file.
    where = next((Path(word).parent for word in reversed(words) if word.startswith("/")), None)
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, cwd=where)


def create(path: Path, size: int, options: str = "", *, backing: tuple[Path, str] | None = None) -> Path:
    """An image by qemu-img. `options` as after -o; `backing`: file and format."""
    words = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if "encrypt" in options:
        words += ENCRYPTED
    if options:
        words += ["-o", options]
    if backing is not None:
        words += ["-b", str(backing[0]), "-F", backing[1]]
    for _ in range(200):
        done = attempt(*words, path, size)
        # LUKS: some machines are too fast for qemu-img to measure them.
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, f"{words}\n{done.stderr}"
    return path


def qemu_io(path: Path, *commands: str, encrypted: bool = False, may_fail: bool = False) -> None:
    """`may_fail`: compressed data cannot be laid over what is there, for example."""
    words = [word for command in commands for word in ("-c", command)]
    done = attempt("qemu-io", *words, *_image(path, encrypted))
    assert may_fail or done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"


def _image(path: Path, encrypted: bool) -> list[str]:
    if not encrypted:
        return ["-f", "qcow2", str(path)]
    return [*ENCRYPTED, "--image-opts", f"driver=qcow2,encrypt.key-secret=sec0,file.filename={path}"]


def check(path: Path, *, leaks: bool = False, encrypted: bool = False) -> None:
    """qemu-img check finds nothing wrong, or (where that is allowed) leaks alone."""
    done = attempt("qemu-img", "check", *_image(path, encrypted))
    assert done.returncode == 0 or (leaks and done.returncode == 3), f"{done.stdout}{done.stderr}"


def raw_content(path: Path, *, encrypted: bool = False, snapshot: str | None = None) -> bytes:
    """What qemu-img reads from the image."""
    raw = path.with_name(f"{path.name}.as-raw")
    words = ["-l", f"snapshot.name={snapshot}"] if snapshot is not None else []
    run("qemu-img", "convert", *words, "-O", "raw", *_image(path, encrypted), raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def qemu_map(path: Path) -> list[Row]:
    found = json.loads(run("qemu-img", "map", "--output=json", *_image(path, False)))
    rows = (
        (e["start"], e["length"], e["depth"], e["present"], e["zero"], e["data"], e.get("offset"))
        for e in found
    )
    return comparable(rows)


def comparable(rows: Iterator[Row] | list[Row]) -> list[Row]:
    """A map without what does not matter: how deep it was looked where nobody has anything, where
    bytes would lie that are not there, and what was not joined."""
    out: list[Row] = []
    for start, length, depth, present, zero, data, offset in rows:
        if not length:
            continue
        row = (start, length, depth if present else None, present, zero, data, offset if present else None)
        if out and _continues(out[-1], row):
            out[-1] = (out[-1][0], out[-1][1] + length, *out[-1][2:])
        else:
            out.append(row)
    return out


def without_holes(rows: list[Row]) -> list[Row]:
    """A map without what depends on how the host file was written: qemu looks for its holes, and
    calls them zeroes, where it finds fewer bytes there than are in use."""
    return comparable(
        [
            (start, length, depth, present, zero and not data, data, offset if data else None)
            for start, length, depth, present, zero, data, offset in rows
        ]
    )


def _continues(first: Row, second: Row) -> bool:
    if first[2:6] != second[2:6]:
        return False
    if first[6] is None or second[6] is None:
        return first[6] is second[6]
    return first[6] + first[1] == second[6]


async def map_of(node: Node) -> list[Row]:
    """What our node tells, in the terms of qemu-img map."""
    extents: list[Extent] = []
    offset = 0
    while offset < node.size:
        found = await node.block_status(offset, node.size - offset)
        assert found
        extents += found
        offset += sum(extent.length for extent in found)
    rows: list[Row] = []
    start = 0
    for extent in merged(extents):
        flags, depth = extent.flags, extent.depth
        zero, data = bool(flags & ExtentFlags.ZERO), bool(flags & ExtentFlags.DATA)
        rows.append((start, extent.length, depth - 1, depth > 0, zero, data, extent.host_offset))
        start += extent.length
    return comparable(rows)


def graph_with_secret(secret: str | None = None) -> Graph:
    graph = Graph(Catalog())
    if secret is not None:
        graph.objects.add({"qom-type": "secret", "id": "sec0", "data": secret})
    return graph


@asynccontextmanager
async def opened(
    path: Path, flags: OpenFlags | None = None, *, secret: str | None = None, **options: Value
) -> AsyncIterator[ImageNode]:
    """The image by our driver, from a file. With underscores for the dashes of options' names."""
    tree: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    if secret is not None:
        tree["encrypt"] = {"key-secret": "sec0"}
    tree |= {key.replace("_", "-"): value for key, value in options.items()}
    async with _closing(await graph_with_secret(secret).open(tree, flags or OpenFlags(discard=True))) as node:
        yield node


@asynccontextmanager
async def opened_over(
    child: Node, flags: OpenFlags | None = None, options: Mapping[str, Value] | None = None
) -> AsyncIterator[ImageNode]:
    """The image that `child` holds."""
    graph = Graph(Catalog())
    child.name = child.name or "below"
    graph.add(child)
    tree = {"driver": "qcow2", "file": child.name, **(options or {})}
    async with _closing(await graph.open(tree, flags or OpenFlags(discard=True))) as node:
        yield node


@asynccontextmanager
async def opened_by_name(path: Path, flags: OpenFlags, image_format: str | None) -> AsyncIterator[ImageNode]:
    """As a user does it. Nothing may be worth a warning."""
    warnings: list[str] = []
    node = await open_image(Graph(Catalog()), str(path), image_format, flags, warn=warnings.append)
    async with _closing(node) as image:
        assert not warnings
        yield image


@asynccontextmanager
async def _closing(node: Node) -> AsyncIterator[ImageNode]:
    try:
        assert isinstance(node, ImageNode)
        yield node
    finally:
        await node.aclose()


def cluster_size(options: str, default: int = 65536) -> int:
    """The cluster size that create options ask for."""
    found = re.search(r"cluster_size=(\d+)([kM]?)", options)
    if found is None:
        return default
    return int(found[1]) << {"": 0, "k": 10, "M": 20}[found[2]]
