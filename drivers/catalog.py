"""Every driver by name, each imported when it is first used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from drivers.block.graph import Driver
from drivers.errors import OptionError


@dataclass(frozen=True, slots=True)
class Row:
    """`target` is "module:Class". `prefix` is what begins a file name that this driver takes
    ("nbd" for nbd:..., nbd://... and, with its variants, nbd+unix://...)."""

    target: str
    prefixes: tuple[str, ...] = ()


ROWS = {
    "file": Row("drivers.protocol.file.driver:FileNode", ("file",)),
    "host_device": Row("drivers.protocol.file.device:HostDeviceNode", ("host_device",)),
    "luks": Row("drivers.format.luks:LuksNode"),
    "memory": Row("drivers.testing.memory:MemoryNode"),
    "nbd": Row("drivers.protocol.nbd.driver:NbdNode", ("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+unix")),
    "null-co": Row("drivers.protocol.null:NullNode", ("null-co",)),
    "null-aio": Row("drivers.protocol.null:NullNode", ("null-aio",)),
    "qcow2": Row("drivers.format.qcow2.driver:Qcow2Node"),
    "raw": Row("drivers.format.raw:RawNode"),
}


class Catalog:
    """The drivers of this installation, as the graph wants them."""

    def __init__(self, rows: dict[str, Row] | None = None) -> None:
        self.rows = ROWS if rows is None else rows

    def prefixes(self) -> dict[str, str]:
        return {prefix: name for name, row in self.rows.items() for prefix in row.prefixes}

    def driver(self, name: str) -> Driver:
        row = self.rows.get(name)
        if row is None:
            raise OptionError(f"Unknown driver '{name}'")
        module, _, attribute = row.target.partition(":")
        return cast(Driver, getattr(importlib.import_module(module), attribute))
