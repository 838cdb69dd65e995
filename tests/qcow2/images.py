"""Making and opening the files of qcow2 images in tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.format.qcow2.create import create
from drivers.options.schema import Options


class FileContext:
    """A CreateContext whose files are host files."""

    def __init__(self, graph: Graph, filename: str) -> None:
        self.graph = graph
        self.filename = filename
        self.made: list[Node] = []

    async def create_file(self, filename: str, *, size: int = 0) -> Node:
        Path(filename).write_bytes(bytes(size))
        node = await self.graph.open({"driver": "file", "filename": filename})
        self.made.append(node)
        return node

    async def open_image(self, filename: str, image_format: str | None, *, read_only: bool = True) -> Node:
        raise NotImplementedError


async def make(path: Path, **options: Any) -> None:
    """Our create() of `path`; dots in option names are written as __."""
    tree: dict[str, Any] = {}
    for key, value in options.items():
        head, _, rest = key.partition("__")
        if rest:
            tree.setdefault(head, {})[rest.replace("_", "-")] = value
        else:
            tree[head] = value
    context = FileContext(Graph(Catalog()), str(path))
    try:
        await create(context, Options(tree, owner="qcow2"))
    finally:
        for node in context.made:
            await node.aclose()


@asynccontextmanager
async def opened(path: Path, *, read_only: bool = True) -> AsyncIterator[Node]:
    """The host file `path` as a node."""
    graph = Graph(Catalog())
    node = await graph.open({"driver": "file", "filename": str(path)}, OpenFlags(read_only=read_only))
    try:
        yield node
    finally:
        await node.aclose()


def qemu_img(*arguments: object, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode in ok, (arguments, done.stdout, done.stderr)
    return done


def qemu_io(path: Path, *commands: str, options: tuple[str, ...] = ()) -> str:
    flags = [flag for command in commands for flag in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", *options, *flags, str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, (commands, done.stdout, done.stderr)
    return done.stdout


def qemu_check(path: Path, *arguments: str) -> dict[str, Any]:
    """The report of qemu-img check, with its exit status as "status"."""
    done = qemu_img("check", "--output=json", *arguments, path, ok=(0, 1, 2, 3))
    report: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
    return {**report, "status": done.returncode, "stderr": done.stderr}
