"""What our images tell of themselves is what qemu-img tells of them, in the same order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drivers.block.node import OpenFlags
from drivers.errors import Error, OptionError
from nbdclient.image.render import describe as render
from tests.qcow2.qemu import create, opened, qemu_io, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 1 << 20
INFO = OpenFlags(read_only=True, no_backing=True, for_info=True)
LUKS = "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10"

OPTIONS = [
    "",
    "compat=0.10",
    "compat=0.10,cluster_size=4k",
    "cluster_size=2M,lazy_refcounts=on",
    "extended_l2=on",
    "compression_type=zstd",
    "refcount_bits=1",
    "refcount_bits=64,lazy_refcounts=on,extended_l2=on,compression_type=zstd",
    "data_file=DIR/data.raw",
    "data_file=DIR/data.raw,data_file_raw=on",
    "encrypt.format=aes,encrypt.key-secret=sec0",
    "compat=0.10,encrypt.format=aes,encrypt.key-secret=sec0",
    LUKS,
    f"{LUKS},compat=0.10,cluster_size=4k",
    f"{LUKS},encrypt.cipher-alg=serpent-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
    f"{LUKS},refcount_bits=8,compression_type=zstd,lazy_refcounts=on",
]


def told(path: Path, *more: str) -> tuple[dict[str, Any], list[str]]:
    """By qemu-img: as JSON, and the lines for people about what is the format's own."""
    lines = run("qemu-img", "info", *more, path).splitlines()
    own = lines[lines.index("Format specific information:") + 1 :]
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", *more, path))
    return found, own


async def agrees(path: Path, flags: OpenFlags = INFO) -> None:
    theirs, lines = told(path)
    async with opened(path, flags) as node:
        ours = await node.info()
    # Compared as text: the order counts, too.
    assert json.dumps(ours.specific) == json.dumps(theirs["format-specific"]["data"])
    assert list(render(dict(ours.specific))) == lines
    assert ours.cluster_size == theirs["cluster-size"]
    assert ours.encrypted == theirs.get("encrypted", False)
    assert ours.dirty == theirs["dirty-flag"]
    assert ours.backing_filename == theirs.get("backing-filename")
    assert ours.backing_format == theirs.get("backing-filename-format")


@pytest.mark.parametrize("options", OPTIONS)
async def test_every_kind_of_image(tmp_path: Path, options: str) -> None:
    await agrees(create(tmp_path / "disk.qcow2", SIZE, options.replace("DIR", str(tmp_path))))


@pytest.mark.parametrize("options", ["", "compat=0.10", "extended_l2=on,lazy_refcounts=on"])
async def test_with_a_backing_file(tmp_path: Path, options: str) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    await agrees(create(tmp_path / "disk.qcow2", SIZE, options, backing=(Path("base.raw"), "raw")))


@pytest.mark.parametrize(
    "options", ["", f"{LUKS},refcount_bits=8", "data_file=DIR/data.raw,lazy_refcounts=on"]
)
async def test_with_bitmaps(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, options.replace("DIR", str(tmp_path)))
    if "encrypt" in options:
        return await with_bitmaps_and_a_key(path)
    run("qemu-img", "bitmap", "--add", "-g", "4096", path, "first")
    run("qemu-img", "bitmap", "--add", "--disable", path, "second")
    await agrees(path)
    # One in use, as a crash leaves it: the flags of the first entry of the directory.
    data = bytearray(path.read_bytes())
    at = data.index(b"first") - 24
    data[at + 15] |= 1
    path.write_bytes(data)
    await agrees(path)
    return None


async def with_bitmaps_and_a_key(path: Path) -> None:
    image = f"driver=qcow2,encrypt.key-secret=sec0,file.filename={path}"
    run(
        "qemu-img",
        "bitmap",
        "--object",
        "secret,id=sec0,data=correct horse",
        "--image-opts",
        "--add",
        image,
        "b",
    )
    await agrees(path)


async def test_a_data_file_without_a_name(tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    path = create(tmp_path / "disk.qcow2", SIZE, f"data_file={data}")
    opts = f"driver=qcow2,file.filename={path},data-file.filename={data}"
    run("qemu-img", "amend", "-o", "data_file=", "--image-opts", opts)
    found = json.loads(run("qemu-img", "info", "--output=json", "--image-opts", opts))
    async with opened(path, INFO, data_file={"driver": "file", "filename": str(data)}) as node:
        assert json.dumps((await node.info()).specific) == json.dumps(found["format-specific"]["data"])


@pytest.mark.parametrize("bit", [0, 1], ids=["dirty", "corrupt"])
async def test_what_is_not_in_order(tmp_path: Path, bit: int) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE)
    data = bytearray(path.read_bytes())
    data[79] |= 1 << bit
    path.write_bytes(data)
    await agrees(path)


# --- without the key ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["encrypt.format=aes,encrypt.key-secret=sec0", LUKS])
async def test_without_the_key_nothing_of_the_guest_s_is_read_or_written(
    tmp_path: Path, options: str
) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, options)
    qemu_io(path, "write -P 1 0 64k", encrypted=True)
    before = path.read_bytes()
    async with opened(path, OpenFlags(discard=True, for_info=True)) as node:
        assert node.plain(0, 512) is None
        assert node.plain_write(0, 512) is None
        assert not node.write_now(0, memoryview(b"x" * 512))
        with pytest.raises(OSError, match="opened without its key"):
            await node.read_into(0, bytearray(512))
        for request in (
            lambda: node.write(0, b"x" * 512),
            lambda: node.write_zeroes(0, 65536),
            lambda: node.discard(0, 65536),
            lambda: node.truncate(2 * SIZE),
            lambda: node.write_compressed(0, bytes(65536)),
        ):
            with pytest.raises((OSError, Error)):
                await request()
    assert path.read_bytes() == before


@pytest.mark.parametrize("options", ["encrypt.format=aes,encrypt.key-secret=sec0", LUKS])
async def test_a_key_is_not_even_looked_at(tmp_path: Path, options: str) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE, options)
    async with opened(path, INFO, encrypt={"key-secret": "missing"}) as node:
        assert (await node.info()).encrypted
    with pytest.raises(OptionError, match="encryption format but options specify 'foo'"):
        async with opened(path, INFO, encrypt={"format": "foo"}):
            pass


@pytest.mark.parametrize("options", ["encrypt.format=aes,encrypt.key-secret=sec0", LUKS])
async def test_a_check_goes_without_the_key(tmp_path: Path, options: str) -> None:
    """QEMU asks for it, and does not use it."""
    path = create(tmp_path / "disk.qcow2", SIZE, options)
    qemu_io(path, "write -P 1 0 64k", encrypted=True)
    async with opened(path, OpenFlags(read_only=True, for_check=True)) as node:
        report = await node.check()
    assert (report.corruptions, report.leaks, report.allocated_clusters) == (0, 0, 1)
    with pytest.raises(OptionError, match=r"'encrypt\.key-secret' is required"):
        async with opened(path):
            pass
