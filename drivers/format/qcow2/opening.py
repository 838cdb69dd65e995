"""From a file to an open image: its tables, its data file, its backing file."""

from __future__ import annotations

import os
from array import array
from dataclasses import replace

from drivers.block.graph import OpenContext, inherited_flags
from drivers.block.node import Node, OpenFlags
from drivers.block.opening import image_tree, open_options
from drivers.errors import Error, ImageError, OptionError
from drivers.format.qcow2.header import Header, parse_header
from drivers.format.qcow2.imagefile import ImageFile
from drivers.format.qcow2.layout import MAX_CLUSTER_BITS, OFFSET_MASK
from drivers.format.qcow2.refcounts import unpack_table
from drivers.options.schema import Options, Tree


async def read_header(node: Node, *, for_check: bool = False) -> Header:
    """The header of the image in `node`; see parse_header(). Raises ImageError."""
    first = await _read(node, 0, min(node.size, 4096))
    try:
        return parse_header(first, for_check=for_check)
    except ImageError:
        # Most headers fit into what was read; those of large clusters may not.
        whole = await _read(node, 0, min(node.size, 1 << MAX_CLUSTER_BITS))
        return parse_header(whole, for_check=for_check)


async def _read(node: Node, offset: int, length: int) -> bytes:
    data = bytearray(length)
    await node.read_into(offset, data)
    return bytes(data)


async def read_tables(file: ImageFile) -> tuple[array[int], array[int]]:
    """(L1 table, refcount table)."""
    header = file.header
    table_bytes = header.refcount_table_clusters << header.cluster_bits
    tables: list[array[int]] = []
    for offset, length, name in (
        (header.l1_table_offset, header.l1_size * 8, "L1 table"),
        (header.refcount_table_offset, table_bytes, "refcount table"),
    ):
        if offset + length > file.node.size + header.cluster_size:
            raise ImageError(f"Could not read {name}: it lies behind the end of the file")
        tables.append(unpack_table(await file.read(offset, length)))
    return without_empty(tables[0]), tables[1]


def without_empty(l1: array[int]) -> array[int]:
    """An L1 table whose entries are 0 where they lead nowhere, whatever flags they had."""
    return array("Q", [entry if entry & OFFSET_MASK else 0 for entry in l1])


async def open_data_file(context: OpenContext, options: Options, header: Header) -> Node | None:
    """The external data file, opened; None if the image has none."""
    reference = options.reference("data-file")
    if reference is not None and not header.has_data_file:
        raise OptionError("'data-file' can only be set for images with an external data file")
    if not header.has_data_file:
        return None
    if reference is not None:
        return await context.child(Options({"data-file": reference}, owner=options.owner), "data-file")
    if header.data_file_name is None:
        raise OptionError("'data-file' is required for this image")
    _refuse_untrusted(context, "data file", header.data_file_name)
    tree = image_tree(context.graph, header.data_file_name, None)
    node = await context.graph.open(_only_file(tree), inherited_flags(context.flags), depth=context.depth + 1)
    context.adopt(node)
    return node


def _only_file(tree: Tree) -> Tree:
    """A data file is never probed: it is the bare protocol."""
    file = tree.get("file")
    return file if "driver" not in tree and isinstance(file, dict) else tree


async def open_backing(context: OpenContext, options: Options, header: Header) -> Node | None:
    """The backing file, opened read-only; None if there is none, or the user wants none."""
    if context.flags.no_backing and "backing" not in options:
        return None
    if "backing" in options:
        reference = options.reference("backing")
        if not reference:
            return None
        if isinstance(reference, str):
            try:
                return await context.child(Options({"backing": reference}, owner=options.owner), "backing")
            except OptionError as error:
                raise OptionError(f"Could not open backing file: {error}") from None
        tree = dict(reference)
        if "file" not in tree and "filename" not in tree and header.backing_name:
            tree = {**_backing_tree(context, header), **tree}
    elif header.backing_name:
        tree = _backing_tree(context, header)
    else:
        return None
    flags = backing_flags(context.flags)
    try:
        node = await open_options(context.graph, tree, flags, warn=lambda line: None, depth=context.depth + 1)
    except (Error, OSError) as error:
        reason = error if isinstance(error, Error) else error.strerror
        raise OptionError(f"Could not open backing file: {reason}") from None
    context.adopt(node)
    return node


def _backing_tree(context: OpenContext, header: Header) -> Tree:
    assert header.backing_name is not None
    _refuse_untrusted(context, "backing file", header.backing_name)
    return image_tree(context.graph, beside(context, header.backing_name), header.backing_format or None)


def backing_flags(flags: OpenFlags) -> OpenFlags:
    return replace(inherited_flags(flags), read_only=True, auto_read_only=False)


def _refuse_untrusted(context: OpenContext, what: str, name: str) -> None:
    if context.graph.untrusted:
        raise OptionError(f"the image is not trusted, and names a {what}: '{name}'")


def beside(context: OpenContext, name: str) -> str:
    """A name that an image gives, seen from where the image lies."""
    base = next((child.filename for child in context.children if hasattr(child, "filename")), "")
    return relative_to(base, name)


def relative_to(base: str, name: str) -> str:
    """`name` as written in an image called `base`: a relative path is beside that image."""
    protocol, colon, _ = name.partition(":")
    if (colon and "/" not in protocol) or os.path.isabs(name):
        return name
    return os.path.join(os.path.dirname(base), name)
