"""What a repair changes beside what was found wrong, and what it must leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivers.block.image import Repair
from drivers.block.node import OpenFlags
from tests.qcow2.qemu import check, create, opened, qemu_io, raw_content

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

FOR_CHECK = OpenFlags(for_check=True)


@pytest.mark.parametrize(("repair", "left"), [(Repair.NONE, 0x80), (Repair.LEAKS, 0), (Repair.ALL, 0)])
async def test_unknown_autoclear_bits_go_before_anything_is_changed(
    tmp_path: Path, repair: Repair, left: int
) -> None:
    path = create(tmp_path / "image", 1 << 20)
    image = bytearray(path.read_bytes())
    image[88] |= 0x80
    path.write_bytes(image)
    async with opened(path, FOR_CHECK) as node:
        await node.check(repair)
    assert path.read_bytes()[88] == left


async def test_a_misplaced_cluster_without_data_still_lets_the_backing_file_show(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"\xff" * (128 << 10))
    path = create(tmp_path / "image", 128 << 10, "extended_l2=on", backing=(base, "raw"))
    qemu_io(path, "write -P 1 4k 2k", "write -z 4k 2k")
    image = bytearray(path.read_bytes())
    image[0x40006] = 2  # the cluster of the first L2 entry begins in the middle of one
    path.write_bytes(image)
    async with opened(path, FOR_CHECK) as node:
        report = await node.check(Repair.ALL)
    # The entry, and, as its cluster is not referred to any more, a leak.
    assert report.corruptions_fixed >= 1, report.messages
    check(path)
    assert raw_content(path) == b"\xff" * 4096 + bytes(2048) + b"\xff" * (122 << 10)
