"""Making images: what the user asked for, checked and completed, and the work itself."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import trio

from drivers.block.edge import Edge, attach
from drivers.block.graph import Graph
from drivers.block.image import CreateOption, ImageNode, StorageDriver
from drivers.block.node import Node, OpenFlags, Preallocation
from drivers.block.opening import image_tree, open_image
from drivers.block.permission import ALL, Permission
from drivers.errors import Error, OptionError, RequestError
from drivers.options.backing import resolve_backing
from drivers.options.flat import refuse_size
from drivers.options.nest import nest
from drivers.options.schema import Options, Tree, Value
from drivers.units import TooLargeError, parse_number, parse_size

_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")
_WRITING = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


# --- who makes it -------------------------------------------------------------------------------


def find_format(graph: Graph, image_format: str) -> type[ImageNode]:
    """The driver of a format that makes images. Raises OptionError."""
    try:
        driver = graph.catalog.driver(image_format)
    except OptionError:
        raise OptionError(f"Unknown file format '{image_format}'") from None
    return cast("type[ImageNode]", driver)


def _storage_tree(graph: Graph, filename: str) -> Tree:
    """The options to open what holds the image `filename`."""
    tree = image_tree(graph, filename, None)
    file = tree.get("file")
    return file if isinstance(file, dict) else tree


def _storage_driver(graph: Graph, tree: Tree) -> StorageDriver | None:
    """The driver of `tree`, if it makes files."""
    driver = graph.catalog.driver(str(tree.get("driver")))
    return cast(StorageDriver, driver) if getattr(driver, "create_options", ()) else None


def check_makes_images(driver: type[ImageNode], image_format: str) -> None:
    if not getattr(driver, "create_options", ()):
        raise OptionError(f"Format driver '{image_format}' does not support image creation")


# --- what was asked for -------------------------------------------------------------------------


@dataclass
class NewImage:
    """An image that make_image() can make. `given` are the options as text, in no order."""

    graph: Graph
    filename: str
    image_format: str
    driver: type[ImageNode]
    options: tuple[CreateOption, ...]
    given: dict[str, str] = field(default_factory=dict)

    @classmethod
    def plan(cls, graph: Graph, filename: str | None, image_format: str) -> NewImage:
        """An image with the options' defaults; without a `filename` it is only imagined. Raises
        OptionError where there can be none."""
        driver = find_format(graph, image_format)
        storage = None if filename is None else _storage_driver(graph, _storage_tree(graph, filename))
        check_makes_images(driver, image_format)
        known = list(driver.create_options)
        names = {option.name for option in known}
        if storage is not None:
            known += [option for option in storage.create_options if option.name not in names]
        return cls(graph, filename or "", image_format, driver, tuple(known))

    def set(self, name: str, value: str) -> None:
        """Raises OptionError on what the format does not know or cannot understand."""
        option = self._option(name)
        if option is None:
            raise OptionError(f"Invalid parameter '{name}'")
        typed(option, value)
        self.given[name] = value

    def set_all(self, pairs: Iterable[tuple[str, str]]) -> None:
        for name, value in pairs:
            self.set(name, value)

    def _option(self, name: str) -> CreateOption | None:
        return next((option for option in self.options if option.name == name), None)

    @property
    def size(self) -> int | None:
        text = self.given.get("size")
        return None if text is None else parse_size(text)

    def set_backing(self, filename: str | None, image_format: str | None) -> None:
        """A backing file that was named beside the options."""
        for name, value, what in (
            ("backing_file", filename, "Backing file"),
            ("backing_fmt", image_format, "Backing file format"),
        ):
            if value is None:
                continue
            if self._option(name) is None:
                raise OptionError(f"{what} not supported for file format '{self.image_format}'")
            self.set(name, value)

    def describe(self) -> str:
        """What is about to be made, in one line without its end."""
        words = [f"Formatting '{self.filename}', fmt={self.image_format}"]
        for option in self.options:
            value = self.given.get(option.name, option.default)
            if value is None:
                continue
            if option.name in self.given and option.kind in ("size", "number"):
                value = str(typed(option, value))
            words.append(f"{option.name}={value.replace(',', ',,') if option.kind == 'string' else value}")
        return " ".join(words)

    def split(self) -> tuple[Tree, Tree]:
        """The options, typed: the format's, nested, and those that only the storage knows."""
        own = {option.name for option in self.driver.create_options}
        # A format without a preallocation of its own (raw) passes the word on.
        own.add("preallocation")
        values = {
            name: typed(cast(CreateOption, self._option(name)), text) for name, text in self.given.items()
        }
        storage = {name: value for name, value in values.items() if name not in own}
        return nest((tuple(name.split(".")), value) for name, value in values.items() if name in own), storage


def typed(option: CreateOption, value: str) -> Value:
    """`value` as an option of its kind. Raises OptionError."""
    match option.kind:
        case "size":
            try:
                return parse_size(value)
            except TooLargeError:
                raise OptionError(f"Value '{value}' is out of range for parameter '{option.name}'") from None
            except OptionError:
                raise refuse_size(option.name) from None
        case "number":
            number = parse_number(value, high=(1 << 64) - 1)
            if number is None:
                raise OptionError(f"Parameter '{option.name}' expects a number")
            return number
        case "boolean":
            if value not in (*_TRUE, *_FALSE):
                raise OptionError(f"Parameter '{option.name}' expects 'on' or 'off'")
            return value in _TRUE
    return value


async def complete_backing(
    image: NewImage, *, unchecked: bool = False, warn: Callable[[str], object]
) -> None:
    """Check the backing file of `image`, unless `unchecked` or there is none, and take the size from
    it where none was given. Raises OptionError."""
    backing, backing_format = image.given.get("backing_file"), image.given.get("backing_fmt")
    if backing == image.filename:
        raise OptionError("Error: Trying to create an image with the same filename as the backing file")
    if backing == "":
        raise OptionError("Expected backing file name, got empty string")
    if backing is not None and not unchecked:
        path = resolve_backing(image.filename, backing)
        try:
            # Its size is all that matters: the key of an encrypted one is not asked for.
            flags = OpenFlags(read_only=True, for_info=True)
            node = await open_image(image.graph, path, backing_format, flags, warn=warn)
        except Error as error:
            raise OptionError(f"{error}\nCould not open backing image.") from None
        try:
            if backing_format is None:
                raise OptionError(
                    f"Backing file specified without backing format\nDetected format of {node.driver_name}."
                )
            if image.size is None:
                image.set("size", str(node.size))
        finally:
            await node.aclose()
    elif backing is not None and backing_format is None:
        raise OptionError("Backing file specified without backing format")
    if image.size is None:
        raise OptionError("Image creation needs a size parameter")


# --- the work -----------------------------------------------------------------------------------


async def make_image(image: NewImage, *, warn: Callable[[str], object]) -> bool:
    """Make it; whether it certainly reads as zeroes (or as its backing file). Raises OptionError."""
    tree, storage = image.split()
    options = Options(tree, owner=image.image_format)
    context = _Creation(image.graph, image.filename, storage, warn)
    try:
        await image.driver.create(context, options)
        options.finish()
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise OptionError(f"The image size is too large for file format '{image.image_format}'") from None
        raise OptionError(str(error) if isinstance(error, Error) else error.strerror or "") from None
    finally:
        with trio.CancelScope(shield=True):
            await context.aclose()
    # The data of an image with preallocated clusters lies where something else may have been.
    unallocated = image.image_format != "raw" and image.given.get("preallocation", "off") == "off"
    return unallocated or (not context.reused and not any(name.startswith("encrypt") for name in image.given))


class _Creation:
    """The CreateContext of one image."""

    def __init__(
        self, graph: Graph, filename: str, storage_options: Mapping[str, Value], warn: Callable[[str], object]
    ) -> None:
        self.graph = graph
        self.filename = filename
        self._storage_options = storage_options
        self._warn = warn
        self._edges: list[Edge] = []
        # Something that was there before holds the image now.
        self.reused = False

    async def create_file(
        self, filename: str, *, size: int = 0, preallocation: Preallocation = Preallocation.OFF
    ) -> Node:
        tree = _storage_tree(self.graph, filename)
        driver = _storage_driver(self.graph, tree)
        if driver is None:
            return await self._reuse(tree, size)
        path = str(tree.get("filename"))
        await driver.create(path, Options(self._storage_options, owner=f"Block driver '{driver}'"))
        node = await self._hold(await self.graph.open(tree, OpenFlags()), _WRITING)
        await node.truncate(0)
        await node.truncate(size, preallocation=preallocation)
        return node

    async def _reuse(self, tree: Tree, size: int) -> Node:
        """What cannot be made can still be there: a block device, a server's export."""
        self.reused = True
        name = tree.get("driver")
        try:
            node = await self._hold(await self.graph.open(tree, OpenFlags()), _WRITING)
        except Error as error:
            raise OptionError(
                f"Protocol driver '{name}' does not support image creation, and opening the image failed: "
                f"{error}"
            ) from None
        if node.size < size:
            await node.truncate(size)
        # Whatever was there before is not found by probing.
        await node.write_zeroes(0, min(512, node.size))
        return node

    async def open_image(self, filename: str, image_format: str | None, *, read_only: bool = True) -> Node:
        flags = OpenFlags(read_only=read_only)
        node = await open_image(self.graph, filename, image_format, flags, warn=self._warn)
        return await self._hold(node, Permission.CONSISTENT_READ if read_only else _WRITING)

    async def _hold(self, node: Node, needed: Permission) -> Node:
        """`node`, in use until the creation ends."""
        shared = ALL if Permission.RESIZE not in needed else ALL & ~Permission.RESIZE
        try:
            self._edges.append(await attach("create", node, user="", needed=needed, shared=shared))
        except RequestError as error:
            await node.aclose()
            raise OptionError(str(error)) from None
        except BaseException:
            await node.aclose()
            raise
        return node

    async def aclose(self) -> None:
        for edge in reversed(self._edges):
            await edge.detach()
