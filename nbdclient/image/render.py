"""Output in the forms that qemu-img gives it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping

from drivers.block.image import SnapshotInfo
from drivers.options.schema import Value
from drivers.units import format_size


def as_json(value: object) -> str:
    """`value` with its keys in the order that readers of qemu-img's output know."""
    text = json.dumps(_ordered(value), indent=4, ensure_ascii=False)
    return text.replace("[]", "[\n]").replace("{}", "{\n}")


def _ordered(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _ordered(value[key]) for key in sorted(value, key=_bucket)}
    if isinstance(value, (list, tuple)):
        return [_ordered(item) for item in value]
    return value


def _bucket(key: str) -> int:
    """QEMU prints a dictionary as it lies in its hash table, of 512 buckets: not sorted, but the
    same for everybody."""
    data = key.encode()
    value = 0x238F13AF * len(data)
    for index, byte in enumerate(data):
        value += byte << (index * 5 % 24)
    return (1103515243 * (value & 0xFFFFFFFF) + 12345 & 0xFFFFFFFF) % 512


def describe(value: Value, indent: int = 1) -> Iterable[str]:
    """The lines that tell a person of nested facts; names lose their hyphens."""
    items: Iterable[tuple[str, Value]]
    if isinstance(value, Mapping):
        items = ((key.replace("-", " "), value[key]) for key in sorted(value, key=_bucket))
    elif isinstance(value, list):
        items = ((f"[{index}]", item) for index, item in enumerate(value))
    else:
        return
    for name, item in items:
        lead = " " * 4 * indent + f"{name}:"
        if isinstance(item, (Mapping, list)):
            yield lead
            yield from describe(item, indent + 1)
        else:
            yield f"{lead} {scalar(item)}"


def scalar(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


SNAPSHOT_HEAD = f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"


def snapshot_line(snapshot: SnapshotInfo) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_seconds))
    seconds, nanoseconds = divmod(snapshot.vm_clock_nanoseconds, 1_000_000_000)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{nanoseconds // 1_000_000:03}"
    icount = "" if snapshot.icount is None else str(snapshot.icount)
    size = format_size(snapshot.vm_state_size)
    return f"{snapshot.id:<9} {snapshot.name:<16} {size:>8}{date:>20}{clock:>13}{icount:>11}"
