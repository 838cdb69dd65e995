"""The images that one command works with: opened as the command line says, closed at its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

import trio

from drivers.block.edge import Edge, attach
from drivers.block.graph import Graph
from drivers.block.image import ImageInfo, ImageNode
from drivers.block.node import Node, OpenFlags
from drivers.block.opening import image_tree, open_options
from drivers.block.permission import ALL, Permission
from drivers.catalog import Catalog
from drivers.errors import Error, OptionError, in_words
from drivers.objects.store import ObjectStore
from drivers.options.backing import resolve_backing
from drivers.options.flat import parse_flat
from drivers.options.image import complete_options, set_file_default
from drivers.options.nest import nest
from drivers.options.schema import Tree
from nbdclient.image.__main__ import complain

T = TypeVar("T")

SECTOR = 512

READING = Permission.CONSISTENT_READ
WRITING = Permission.CONSISTENT_READ | Permission.WRITE
RESIZING = WRITING | Permission.RESIZE
# What the source of a copy lets others do meanwhile.
UNCHANGING = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED

_CACHE_MODES = {
    "none": OpenFlags(direct=True),
    "off": OpenFlags(direct=True),
    "directsync": OpenFlags(direct=True),
    "writeback": OpenFlags(),
    "unsafe": OpenFlags(no_flush=True),
    "writethrough": OpenFlags(),
}


def cache_flags(mode: str, *, source: bool = False) -> OpenFlags:
    if mode not in _CACHE_MODES:
        raise OptionError(f"Invalid {'source ' if source else ''}cache option: {mode}")
    return _CACHE_MODES[mode]


def warn(message: str) -> None:
    """A line that a person must see."""
    print(message, file=sys.stderr)


def run(
    command: Callable[[Images], Awaitable[T]], objects: Sequence[str] = (), *, untrusted: bool = False
) -> T:
    """Run `command` with its images; `untrusted`: of the files that they name none is opened."""

    async def body() -> T:
        async with Images(objects, untrusted=untrusted) as images:
            return await command(images)

    return trio.run(body)


def _store(objects: Sequence[str]) -> ObjectStore | None:
    if not objects:
        return None
    from drivers.objects.argument import HelpWanted, parse_object
    from drivers.objects.store import help_text

    trees: list[Tree] = []
    for text in objects:
        tree = parse_object(text)
        if isinstance(tree, HelpWanted):
            print(help_text(tree.type_name))
            sys.exit(0)
        trees.append(tree)
    return ObjectStore.of(trees)


class Images:
    """Opens images; what is open at the end of the `async with` is closed."""

    def __init__(self, objects: Sequence[str] = (), *, untrusted: bool = False) -> None:
        self.graph = Graph(Catalog(), _store(objects), untrusted=untrusted)
        self._edges: list[Edge] = []

    async def __aenter__(self) -> Images:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            while self._edges:
                await self._edges.pop().detach()

    async def open(
        self,
        filename: str,
        image_format: str | None = None,
        *,
        image_opts: bool = False,
        force_share: bool = False,
        flags: OpenFlags | None = None,
        needed: Permission = READING,
        shared: Permission = ALL,
        options: Tree | None = None,
        aio: str | None = None,
    ) -> Node:
        """The image, writable if `needed` says so. `options` go before its own; None takes one away.
        Raises OptionError with its name in it."""
        if image_opts and image_format is not None:
            raise OptionError("--image-opts and --format are mutually exclusive")
        writing = bool(needed & Permission.WRITE)
        flags = replace(flags or OpenFlags(), read_only=not writing, force_share=force_share)
        try:
            tree = {**self.tree(filename, image_format, image_opts, force_share), **(options or {})}
            for key in [key for key, value in (options or {}).items() if value is None]:
                del tree[key]
            if aio is not None:
                set_file_default(tree, "aio", aio)
            node = await open_options(self.graph, tree, flags, warn=warn)
        except (Error, OSError) as error:
            if isinstance(error, ConflictError):
                raise
            raise OptionError(f"Could not open '{filename}': {in_words(error)}") from None
        await self._use(node, filename, needed, shared)
        return node

    async def open_over(
        self,
        filename: str,
        image_format: str | None,
        below: Node | None,
        *,
        image_opts: bool = False,
        flags: OpenFlags | None = None,
        needed: Permission = READING,
        options: Tree | None = None,
    ) -> Node:
        """As open(), with the open node `below`, or nothing, for a backing file."""
        flags = replace(flags or OpenFlags(), no_backing=below is None)
        whole: Tree = {**(options or {}), "backing": None if below is None else below.name}
        return await self.open(
            filename, image_format, image_opts=image_opts, flags=flags, needed=needed, options=whole
        )

    async def _use(self, node: Node, filename: str, needed: Permission, shared: Permission) -> None:
        try:
            self._edges.append(await attach("root", node, user="", needed=needed, shared=shared))
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await node.aclose()
            if isinstance(error, (Error, OSError)):
                raise OptionError(f"Could not open '{filename}': {in_words(error)}") from None
            raise

    def tree(
        self, filename: str, image_format: str | None, image_opts: bool, force_share: bool = False
    ) -> Tree:
        """The options that a command line names an image by. Raises OptionError."""
        if not image_opts:
            return image_tree(self.graph, filename, image_format)
        pairs = parse_flat(filename, implied_name="file", warn=lambda text: complain(f"warning: {text}"))
        tree = nest((tuple(name.split(".")), value) for name, value in pairs)
        if force_share and tree.pop("force-share", "on") != "on":
            raise ConflictError("--force-share/-U conflicts with image options")
        return complete_options(tree, self.graph.catalog.prefixes())

    async def close(self, node: Node) -> None:
        """Close what open() returned, before the end."""
        for edge in self._edges:
            if edge.child is node:
                self._edges.remove(edge)
                await edge.detach()
                return

    async def use(self, node: Node, needed: Permission, shared: Permission = ALL) -> None:
        """Change what open() asked for. Raises OptionError."""
        for edge in self._edges:
            if edge.child is node:
                await edge.set_permissions(needed, shared)


class ConflictError(OptionError):
    """The command line contradicts the image options: no file has to do with it."""


def guest_size(node: Node) -> int:
    """`node`'s size as image tools tell it: in whole sectors."""
    return -(-node.size // SECTOR) * SECTOR


def backing_of(node: Node) -> Node | None:
    return node.backing if isinstance(node, ImageNode) else None


def chain(node: Node) -> list[Node]:
    """`node` and its backing files, from the top down."""
    nodes = [node]
    while (below := backing_of(nodes[-1])) is not None:
        nodes.append(below)
    return nodes


async def find_below(node: Node, filename: str, path: str) -> Node | None:
    """The layer below `node`, the image `filename`, whose file is `path`."""
    above, name = node, filename
    for layer in chain(node)[1:]:
        info = await above.info() if isinstance(above, ImageNode) else ImageInfo()
        if info.backing_filename is None:
            return None
        name = resolve_backing(name, info.backing_filename)
        if path in (name, info.backing_filename) or _same_file(path, name):
            return layer
        above = layer
    return None


def _same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
