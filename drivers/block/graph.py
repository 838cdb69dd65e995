"""Opening nodes from an option tree, and finding open ones by name."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from drivers.block.node import Node, OpenFlags
from drivers.errors import OptionError
from drivers.objects.store import ObjectStore
from drivers.options.schema import Options, Tree, Value


class Driver(Protocol):
    """What the catalog's rows lead to; a Node class with open() is one."""

    driver_name: str

    async def open(self, context: OpenContext, options: Options, /) -> Node:
        """Open a node from its own options; leave none behind that it knows."""
        ...


class DriverCatalog(Protocol):
    def driver(self, name: str) -> Driver:
        """The driver of that name, imported now. Raises OptionError."""
        ...

    def prefixes(self) -> Mapping[str, str]:
        """What file names may begin with ("nbd+unix"), and the driver each leads to."""
        ...


# Nested children deeper than this are an attack or a mistake.
MAX_DEPTH = 200


def inherited_flags(flags: OpenFlags) -> OpenFlags:
    """What a node's `flags` mean for its children: what they are sent has been filtered already."""
    return replace(flags, detect_zeroes="off", discard=True, no_backing=False, for_check=False)


@dataclass
class OpenContext:
    """What a driver's open() may need: its generic flags, its name, and a way to its children."""

    graph: Graph
    flags: OpenFlags
    name: str
    # The format was found by probing, not named by the user (raw protects its first sector then).
    probed: bool = False
    depth: int = 0
    children: list[Node] = field(default_factory=list)
    # Those of the children that were opened for this node.
    opened: list[Node] = field(default_factory=list)

    async def child(self, options: Options, role: str = "file") -> Node:
        """The node that the option `role` describes or names; to be attached with Node.use()."""
        reference = options.reference(role)
        if reference is None:
            raise OptionError(f'A block device must be specified for "{role}"')
        if isinstance(reference, str):
            node = self.graph.node(reference)
        else:
            node = await self.graph.open(reference, inherited_flags(self.flags), depth=self.depth + 1)
            self.opened.append(node)
        self.children.append(node)
        return node

    def adopt(self, node: Node) -> None:
        """`node` was opened for this one: it goes if the opening fails."""
        self.opened.append(node)
        self.children.append(node)

    async def abandon(self, node: Node | None) -> None:
        """Undo what an open() that failed has done; `node` is what it made, if it came so far."""
        if node is not None:
            await node.aclose()
        for child in self.children:
            for edge in list(child.parents):
                # A parent that the graph does not know is what failed to open.
                if edge.parent is not None and self.graph.nodes.get(edge.parent.name) is not edge.parent:
                    await edge.detach()
        for child in self.opened:
            if not child.parents:
                await child.aclose()


class Graph:
    """The open nodes of one program, by name, and the objects that they may refer to. Nothing is
    shared between two graphs.

    `untrusted`: what an image itself names (a backing file, a data file) is not opened; only what
    the user named is. `tell` is given the lines about damaged images that a person must see.
    """

    def __init__(
        self,
        catalog: DriverCatalog,
        objects: ObjectStore | None = None,
        *,
        untrusted: bool = False,
        tell: Callable[[str], object] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        self.catalog = catalog
        self.objects = ObjectStore() if objects is None else objects
        self.untrusted = untrusted
        self.tell = tell
        self.nodes: dict[str, Node] = {}
        self._numbers = itertools.count()

    def node(self, name: str) -> Node:
        try:
            return self.nodes[name]
        except KeyError:
            raise OptionError(f"Cannot find device='{name}' nor node-name='{name}'") from None

    async def open(
        self,
        tree: Mapping[str, Value],
        flags: OpenFlags | None = None,
        *,
        probed: bool = False,
        depth: int = 0,
    ) -> Node:
        """Open the node that `tree` describes, children first. `flags` are what it inherits;
        options of its own go before them. On failure nothing stays open."""
        if depth > MAX_DEPTH:
            raise OptionError("too many nested block nodes")
        tree = dict(tree)
        name, flags = self._generic(tree, flags or OpenFlags())
        driver_name = tree.pop("driver", None)
        if not isinstance(driver_name, str):
            raise OptionError("the option 'driver' is missing")
        driver = self.catalog.driver(driver_name)
        context = OpenContext(self, flags, name, probed=probed, depth=depth)
        options = Options(tree, owner=f"Block driver '{driver_name}'")
        node: Node | None = None
        try:
            node = await driver.open(context, options)
            if left := options.left():
                # Protocols are the drivers without children.
                refuses = "format '{}' does not" if context.children else "protocol '{}' doesn't"
                raise OptionError(f"Block {refuses.format(driver_name)} support the option '{left}'")
            return self.add(node)
        except BaseException:
            with trio.CancelScope(shield=True):
                await context.abandon(node)
            raise

    def add(self, node: Node) -> Node:
        """Take in an open node, which can be referred to by its name until it is closed."""
        if node.name in self.nodes:
            raise OptionError(f"Duplicate nodes with node-name='{node.name}'")
        self.nodes[node.name] = node
        node.on_close(lambda: self.nodes.pop(node.name, None))
        return node

    def _generic(self, tree: Tree, inherited: OpenFlags) -> tuple[str, OpenFlags]:
        """Take the options that every node has out of `tree`."""
        common = Options({key: tree.pop(key) for key in _GENERIC if key in tree}, owner="Block node")
        name = common.string("node-name", "")
        if name in self.nodes:
            raise OptionError(f"Duplicate nodes with node-name='{name}'")
        cache = Options(common.subtree("cache"), owner="Block node")
        flags = replace(
            inherited,
            read_only=common.boolean("read-only", inherited.read_only),
            auto_read_only=common.boolean("auto-read-only", inherited.auto_read_only),
            force_share=common.boolean("force-share", inherited.force_share),
            direct=cache.boolean("direct", inherited.direct),
            no_flush=cache.boolean("no-flush", inherited.no_flush),
            discard=common.choice("discard", _DISCARD, _DISCARD[inherited.discard]) in ("unmap", "on"),
            detect_zeroes=common.choice("detect-zeroes", ("off", "on", "unmap"), inherited.detect_zeroes),  # type: ignore[arg-type]
        )
        cache.finish()
        if flags.detect_zeroes == "unmap" and not flags.discard:
            raise OptionError(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
            )
        if flags.force_share and not flags.read_only:
            raise OptionError("force-share=on can only be used with read-only images")
        return name or f"#block{next(self._numbers):03d}", flags


_GENERIC = ("node-name", "read-only", "auto-read-only", "force-share", "cache", "discard", "detect-zeroes")
_DISCARD = ("ignore", "unmap", "off", "on")
