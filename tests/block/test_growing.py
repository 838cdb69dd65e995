"""A file that grows while it is flushed."""

import contextlib
import os
from pathlib import Path

import pytest
import trio

from drivers.block.graph import Graph
from drivers.catalog import Catalog
from drivers.protocol.file import driver


async def test_what_is_written_behind_the_end_survives_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush gives the file its length; what is written in that very moment is not cut off."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    node = await Graph(Catalog()).open({"driver": "file", "filename": str(path)})
    assert node.grow(4096)

    def write_in_the_middle() -> None:
        # A format allocates and writes, on the event loop, while the flush is in its thread.
        assert node.grow(12288)
        [(fd, position, length)] = node.plain_write(8192, 4096) or []
        assert os.pwrite(fd, b"x" * length, position) == length

    for name in ("ftruncate", "fallocate"):
        module = os if name == "ftruncate" else driver.syscalls
        genuine = getattr(module, name)

        def interrupted(*arguments: int, genuine=genuine) -> None:  # type: ignore[no-untyped-def]
            with contextlib.suppress(RuntimeError):  # on the event loop nothing comes between
                trio.from_thread.run_sync(write_in_the_middle)
            genuine(*arguments)

        monkeypatch.setattr(module, name, interrupted)
    await node.flush()
    found = bytearray(4096)
    if node.size < 12288:
        write_in_the_middle()
    await node.read_into(8192, found)
    assert found == b"x" * 4096
    await node.aclose()
    assert path.stat().st_size == 12288
