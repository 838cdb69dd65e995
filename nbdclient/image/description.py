"""What `nbdimg info` knows of one image, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drivers.block.image import ImageInfo, ImageNode, SnapshotInfo
from drivers.block.node import Node
from drivers.errors import OptionError
from drivers.options.backing import resolve_backing
from drivers.options.pseudo import protocol_prefix
from drivers.options.schema import Tree, Value
from drivers.units import format_size
from nbdclient.image import render
from nbdclient.image.session import guest_size

# The options that decide what an image is, by driver.
_TELLING = {"qcow2": ("encrypt.key-secret",), "raw": ("offset", "size"), "luks": ("key-secret",)}


@dataclass
class Description:
    """`filename` is the name that leads to the image, `location` that of the file it is in."""

    filename: str
    location: str
    driver_name: str
    size: int
    allocated: int | None
    info: ImageInfo
    snapshots: Sequence[SnapshotInfo]

    @property
    def full_backing_filename(self) -> str | None:
        """None where it cannot be told."""
        assert self.info.backing_filename is not None
        try:
            return resolve_backing(self.location, self.info.backing_filename)
        except OptionError:
            return None

    def lines(self) -> Iterator[str]:
        info = self.info
        yield f"image: {self.filename}"
        yield f"file format: {self.driver_name}"
        yield f"virtual size: {format_size(self.size)} ({self.size} bytes)"
        yield f"disk size: {'unavailable' if self.allocated is None else format_size(self.allocated)}"
        if info.encrypted:
            yield "encrypted: yes"
        if info.cluster_size is not None:
            yield f"cluster_size: {info.cluster_size}"
        if info.dirty:
            yield "cleanly shut down: no"
        if info.backing_filename is not None:
            full = self.full_backing_filename
            where = "" if full == info.backing_filename else f" (actual path: {full})"
            yield f"backing file: {info.backing_filename}" + (
                " (cannot determine actual path)" if full is None else where
            )
            if info.backing_format is not None:
                yield f"backing file format: {info.backing_format}"
        if self.snapshots:
            yield "Snapshot list:"
            yield render.SNAPSHOT_HEAD
            yield from map(render.snapshot_line, self.snapshots)
        if info.specific:
            yield "Format specific information:"
            yield from render.describe(dict(info.specific))

    def as_json(self) -> dict[str, Value]:
        info = self.info
        tree: dict[str, Value] = {
            "filename": self.filename,
            "format": self.driver_name,
            "virtual-size": self.size,
            "dirty-flag": info.dirty,
        }
        optional: dict[str, Value] = {
            "actual-size": self.allocated,
            "cluster-size": info.cluster_size,
            "compressed": info.compressed or None,
            "encrypted": info.encrypted or None,
            "backing-filename": info.backing_filename,
            "backing-filename-format": info.backing_format,
        }
        if info.backing_filename is not None:
            optional["full-backing-filename"] = self.full_backing_filename
        if self.snapshots:
            optional["snapshots"] = [_snapshot(snapshot) for snapshot in self.snapshots]
        if info.specific:
            optional["format-specific"] = {"type": self.driver_name, "data": dict(info.specific)}
        return tree | {key: value for key, value in optional.items() if value is not None}


def _snapshot(snapshot: SnapshotInfo) -> Value:
    seconds, nanoseconds = divmod(snapshot.vm_clock_nanoseconds, 1_000_000_000)
    tree: dict[str, Value] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if snapshot.icount is not None:
        tree["icount"] = snapshot.icount
    return tree


async def describe(node: Node, filename: str, *, options: Tree | None = None) -> Description:
    """`filename` as the user gave it. Where that was by `options` they are shown only if the name of the
    file alone would lead elsewhere."""
    location = filename
    if options is not None:
        location = display_name(node) or filename
        filename = _name_with_options(node, options) or location
    if filename.startswith("file:"):
        filename = filename.removeprefix("file:")
        if protocol_prefix(filename) is not None:
            filename = f"./{filename}"
    snapshots = node.snapshots if isinstance(node, ImageNode) else None
    return Description(
        filename=filename,
        location=location if options is not None else filename,
        driver_name=node.driver_name,
        size=guest_size(node),
        allocated=await node.allocated_size(),
        info=await node.info() if isinstance(node, ImageNode) else ImageInfo(),
        snapshots=() if snapshots is None else snapshots.list(),
    )


def _name_with_options(node: Node, options: Tree) -> str | None:
    """The name with the options without which `node` would be another one; None if there are none."""
    given = {
        name: value
        for name in _TELLING.get(node.driver_name, ())
        if (value := _find(options, name)) is not None
    }
    file = node.children.get("file")
    filename = getattr(file.child, "filename", None) if file is not None else None
    if not given or file is None or filename is None:
        return None
    below = {"driver": file.child.driver_name, "filename": str(filename)}
    return f"json:{json.dumps({**given, 'driver': node.driver_name, 'file': below})}"


def _find(tree: Tree, path: str) -> Value:
    value: Value = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def display_name(node: Node) -> str | None:
    """The name of the file at the bottom, if that alone would lead to the same node."""
    name = getattr(node, "filename", None)
    if name is not None:
        return str(name)
    file = node.children.get("file")
    return None if file is None else display_name(file.child)
