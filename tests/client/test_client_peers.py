"""The API against other projects' servers."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import trio

import nbdclient
from drivers.errors import OptionError, ProtocolError, RequestError
from drivers.wire.nbd.client_handshake import RefusedError

MiB = 1 << 20


async def exercise(uri: str, image: Path, **options: Any) -> None:
    """Every operation that the server offers, checked against the image file."""
    content = bytearray(await trio.Path(image).read_bytes())
    async with nbdclient.connect(uri, **options) as disk:
        assert disk.size == len(content)
        assert await disk.read(0, len(content)) == content
        assert await disk.read(12_345, 54_321) == content[12_345 : 12_345 + 54_321]
        if not disk.read_only:
            await disk.write(1000, b"written" * 1000, fua=disk.can_fua)
            content[1000:8000] = b"written" * 1000
            if disk.can_zero:
                await disk.zero(70_000, 60_000, no_hole=True)
                content[70_000:130_000] = bytes(60_000)
            if disk.can_trim:
                await disk.trim(MiB - 4096, 4096)
            if disk.can_flush:
                await disk.flush()
        if disk.can_cache:
            await disk.cache(0, len(content))
        assert await disk.read(0, MiB - 4096) == content[: MiB - 4096]
        assert await disk.read(MiB, 0) == b""


@pytest.mark.peer("qemu-nbd")
@pytest.mark.parametrize(
    ("options", "protocol"),
    [({}, "structured"), ({"structured": False}, "simple"), ({"extended": False}, "structured")],
)
async def test_qemu_nbd(peers: Any, image: Path, options: dict[str, bool], protocol: str) -> None:
    uri = peers.qemu_nbd(image)
    await exercise(uri, image, **options)
    async with nbdclient.connect(uri, **options) as disk:
        assert disk.protocol == protocol
        assert disk.contexts == (("base:allocation",) if protocol == "structured" else ())


async def test_nbdserve_with_extended_headers(peers: Any, image: Path, tmp_path: Path) -> None:
    await exercise(peers.nbdserve(image), image)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(6 << 30)
    uri = peers.nbdserve(large, "-e", "4", "-A", "--discard=unmap")
    contexts = ["base:allocation", "qemu:allocation-depth"]
    async with nbdclient.connect(uri, contexts=contexts, connections=3) as disk:
        assert (disk.protocol, disk.connections) == ("extended", 3)
        assert disk.can_block_status_payload
        # One request each, beyond 32 bits.
        await disk.zero(0, disk.size)
        await disk.trim(0, disk.size)
        assert await disk.block_status(0, disk.size) == {
            "base:allocation": [(disk.size, 3)],
            "qemu:allocation-depth": [(disk.size, 1)],
        }
        only = await disk.block_status(0, disk.size, contexts=contexts[1:], one=True)
        assert only == {"qemu:allocation-depth": [(disk.size, 1)]}


@pytest.mark.peer("nbdkit")
@pytest.mark.parametrize(
    "options",
    [(), ("--no-sr",), ("--mask-handshake=0",), ("--mask-handshake=1",)],
    ids=lambda options: "".join(options) or "default",
)
async def test_nbdkit(peers: Any, image: Path, options: tuple[str, ...]) -> None:
    await exercise(peers.nbdkit(*options, "file", str(image)), image)


@pytest.mark.peer("nbdkit")
async def test_oldstyle(peers: Any, image: Path) -> None:
    # Here nbdkit 1.32 answers everything else that it offers with EINVAL; libnbd finds the same.
    async with nbdclient.connect(peers.nbdkit("--oldstyle", "file", str(image))) as disk:
        await disk.write(1000, b"written")
        content = await trio.Path(image).read_bytes()
        assert content[1000:1007] == b"written"
        assert (disk.protocol, await disk.read(0, disk.size)) == ("simple", content)


@pytest.mark.peer("nbd-server")
async def test_nbd_server(peers: Any, image: Path) -> None:
    uri = peers.nbd_server(image, "flush = true", "fua = true", "trim = true")
    await exercise(uri, image)
    assert [export.name for export in await nbdclient.list_exports(uri)] == ["disk"]


@pytest.mark.peer("nbdkit")
async def test_many_requests_share_one_connection(peers: Any) -> None:
    uri = peers.nbdkit("--filter=delay", "pattern", "64M", "delay-read=20ms")
    offsets = range(0, 64 * MiB, MiB)

    async def read(disk: nbdclient.Disk, offset: int) -> None:
        data = await disk.read(offset, 100_000)
        assert data == b"".join(at.to_bytes(8, "big") for at in range(offset, offset + 100_000, 8))

    async with nbdclient.connect(uri) as disk:
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for offset in offsets:
                nursery.start_soon(read, disk, offset)
        # One after the other they would take 1.28 seconds.
        assert trio.current_time() - started < 0.8


@pytest.mark.peer("nbdkit")
async def test_several_connections_where_the_server_allows_them(peers: Any) -> None:
    async with nbdclient.connect(peers.nbdkit("memory", "8M"), connections=4) as disk:
        assert disk.can_multi_conn and disk.connections == 4
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(disk.write, number * MiB, bytes([number]) * MiB)
        await disk.flush()
        for number in range(8):
            assert await disk.read(number * MiB, MiB) == bytes([number]) * MiB
    single = peers.nbdkit("--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable")
    async with nbdclient.connect(single, connections=4) as disk:
        assert disk.connections == 1


@pytest.mark.peer("nbdkit")
@pytest.mark.parametrize("structured", [True, False])
async def test_errors_of_the_server_fail_one_request_only(peers: Any, structured: bool) -> None:
    uri = peers.nbdkit("--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%")
    async with nbdclient.connect(uri, structured=structured) as disk:
        for _ in range(3):
            with pytest.raises(RequestError) as caught:
                await disk.read(0, 4096)
            assert caught.value.errno == errno.ENOSPC
        await disk.write(0, bytes(4096))


@pytest.mark.peer("nbdkit")
async def test_cancelled_requests_leave_the_connection_in_step(peers: Any) -> None:
    uri = peers.nbdkit("--filter=delay", "pattern", "1M", "delay-read=100ms")
    async with nbdclient.connect(uri) as disk:
        with trio.move_on_after(0.02) as scope:
            await disk.read(0, MiB)
        assert scope.cancelled_caught
        assert await disk.read(4096, 8) == (4096).to_bytes(8, "big")


@pytest.mark.peer("qemu-nbd", "qemu-img")
async def test_several_contexts_and_a_bitmap(peers: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "4M"],
        ["qemu-img", "bitmap", "--add", str(path), "b0"],
        ["qemu-io", "-c", "write -P 5 1M 1M", str(path)],
    ):
        await trio.run_process(command, capture_stdout=True)
    uri = peers.qemu_nbd(path, "-f", "qcow2", "-B", "b0", "-A")
    contexts = ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:allocation-depth"]
    async with nbdclient.connect(uri, contexts=[*contexts, "x-none:such"]) as disk:
        assert set(disk.contexts) == set(contexts)
        found = {context: [e async for e in disk.extents(context)] for context in contexts}
        assert found == {
            "base:allocation": [(0, MiB, 3), (MiB, MiB, 0), (2 * MiB, 2 * MiB, 3)],
            "qemu:dirty-bitmap:b0": [(0, MiB, 0), (MiB, MiB, 1), (2 * MiB, 2 * MiB, 0)],
            "qemu:allocation-depth": [(0, MiB, 0), (MiB, MiB, 1), (2 * MiB, 2 * MiB, 0)],
        }
        status = await disk.block_status(MiB, 2 * MiB, contexts=["qemu:dirty-bitmap:b0"], one=True)
        assert status == {"qemu:dirty-bitmap:b0": [(MiB, 1)]}
        with pytest.raises(RequestError, match="does not offer the context"):
            await disk.block_status(0, 512, contexts=["x-none:such"])


@pytest.mark.peer("nbdkit")
async def test_extents_beyond_4_gib(peers: Any) -> None:
    async with nbdclient.connect(peers.nbdkit("data", "data=@0x180000000 1", "size=8G")) as disk:
        holes = [e async for e in disk.extents()]
        assert sum(extent.length for extent in holes) == disk.size
        assert len(holes) == 3  # however many requests it took
        assert [e for e in holes if not e.status & 1] == [(0x180000000, 32768, 0)]


@pytest.mark.peer("nbdkit")
async def test_list_info_and_refusals(peers: Any, tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    for name in ("a", "b"):
        (tmp_path / "exports" / name).write_bytes(bytes(512))
    uri = peers.nbdkit("file", f"dir={tmp_path}/exports")
    assert sorted(export.name for export in await nbdclient.list_exports(uri)) == ["a", "b"]
    assert {export.name: export.size for export in await nbdclient.describe_exports(uri)} == {
        "a": 512,
        "b": 512,
    }
    export = await nbdclient.info(uri.replace("///", "///a"))
    assert (export.size, list(export.contexts)) == (512, ["base:allocation"])
    with pytest.raises(ProtocolError):
        await nbdclient.info(uri.replace("///", "///none"))


@pytest.mark.peer("qemu-nbd")
async def test_an_unknown_export_and_one_that_cannot_be_written(peers: Any, image: Path) -> None:
    uri = peers.qemu_nbd(image, "-r", "-x", "here", "-D", "a description")
    with pytest.raises(RefusedError, match="not available"):
        async with nbdclient.connect(uri):
            pass
    async with nbdclient.connect(uri.replace("///", "///here")) as disk:
        assert disk.read_only and disk.export.description == "a description"
        with pytest.raises(RequestError) as caught:
            await disk.write(0, b"x")
        assert caught.value.errno == errno.EPERM


async def test_where_no_server_is(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        async with nbdclient.connect(f"nbd+unix:///?socket={tmp_path}/none"):
            pass
    with pytest.raises(OptionError, match="TLS is not supported yet"):
        await nbdclient.info(f"nbds+unix:///?socket={tmp_path}/none")
