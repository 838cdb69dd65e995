"""The golden images of a format: real ones, made by the format's own tools, and what they hold."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Golden:
    """A row of manifest.json. `sha256` None: too large to be read whole. A row of `map` is (start,
    length, depth, present, zero, data, offset), as qemu-img map tells."""

    name: str
    directory: Path
    commands: list[str]
    files: list[str]
    size: int
    map: list[tuple[int, int, int, bool, bool, bool, int | None]]
    sha256: str | None = None
    secret: str | None = None
    snapshots: dict[str, dict[str, Any]] = field(default_factory=dict)
    bitmaps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def unpack(self, where: Path) -> Path:
        """Lay the files into the directory `where`; the path of the image itself."""
        for file in self.files:
            packed = (self.directory / f"{self.name}.{file}.gz").read_bytes()
            data = gzip.decompress(packed)
            if file.endswith((".raw", ".data")) or any("preallocation=metadata" in c for c in self.commands):
                _write_sparsely(where / file, data)
            else:
                (where / file).write_bytes(data)
        [image] = [file for file in self.files if file.startswith("disk.") and not file.endswith(".data")]
        return where / image


def _write_sparsely(path: Path, data: bytes) -> None:
    """Where there were holes are holes again: a map tells them."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for start in range(0, len(data), 4096):
            block = data[start : start + 4096]
            if any(block):
                file.seek(start)
                file.write(block)


@cache
def golden(image_format: str) -> dict[str, Golden]:
    directory = HERE / image_format
    manifest = json.loads((directory / "manifest.json").read_text())
    return {
        name: Golden(
            name, directory, **{**row, "map": [tuple(entry) for entry in row["map"]]}
        )
        for name, row in manifest.items()
    }  # fmt: skip
