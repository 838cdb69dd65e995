"""Encrypted qcow2 images: QEMU's in our hands, ours in its, and the words of what is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from drivers.block.graph import Graph
from drivers.block.image import ImageNode
from drivers.block.node import OpenFlags
from drivers.catalog import Catalog
from drivers.crypto.luks.layout import header_area
from drivers.errors import OptionError
from drivers.format.qcow2.create import create
from drivers.format.qcow2.measure import measure
from drivers.objects.encryption import take_encryption
from drivers.objects.store import ObjectStore
from drivers.options.keyval import parse_keyval
from drivers.options.schema import Options
from drivers.testing.model import contents
from tests.qcow2.images import FileContext, qemu_img

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SECRET = ("--object", "secret,id=s,data=abc")
SIZE = 1 << 20

FORMATS = [
    "encrypt.format=aes",
    "encrypt.format=luks,encrypt.iter-time=10",
    "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=serpent-256,encrypt.cipher-mode=cbc,"
    "encrypt.ivgen-alg=essiv,cluster_size=4k",
    "encrypt.format=luks,encrypt.iter-time=10,cluster_size=512,compat=0.10",
    "encrypt.format=luks,encrypt.iter-time=10,cluster_size=2M",
]


def graph() -> Graph:
    return Graph(Catalog(), ObjectStore.of([{"qom-type": "secret", "id": "s", "data": "abc"}]))


def words(path: Path, *more: str) -> list[str]:
    """How QEMU's programs are told to open it."""
    text = ",".join(["driver=qcow2", f"file.filename={path}", "encrypt.key-secret=s", *more])
    return [*SECRET, "--image-opts", text]


async def make(path: Path, text: str) -> None:
    context = FileContext(graph(), str(path))
    try:
        await create(context, Options({**parse_keyval(text), "size": SIZE}, owner="qcow2"))
    finally:
        for node in context.made:
            await node.aclose()


async def opened(path: Path, text: str = "encrypt.key-secret=s", **flags: Any) -> ImageNode:
    file = {"driver": "file", "filename": str(path)}
    node = await graph().open({"driver": "qcow2", "file": file, **parse_keyval(text)}, OpenFlags(**flags))
    assert isinstance(node, ImageNode)
    return node


def qemu_create(path: Path, text: str) -> None:
    """See tests/interop/test_luks.py: at times qemu-img cannot tell how fast it is."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *SECRET, "-o", text, str(path), str(SIZE)]
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def qemu_io(path: Path, text: str, script: str = "read 0 512") -> str:
    """What qemu-io complains of when it opens the image with the options `text`."""
    image = f"driver=qcow2,file.filename={path},{text}".rstrip(",")
    command = ["qemu-io", *SECRET, "--image-opts", image, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


async def work(path: Path) -> None:
    """Writes by both sides in turns, after each of which both must read the same."""
    model = bytearray(SIZE)
    plain = path.with_suffix(".raw")
    for step in range(3):
        node = await opened(path)
        assert await contents(node) == model
        for offset, length in ((700 + 5000 * step, 4000), (200_000 * step, 150_000)):
            data = os.urandom(length)
            await node.write(offset, data)
            model[offset : offset + length] = data
        await node.write_zeroes(300_000, 70_000)
        model[300_000:370_000] = bytes(70_000)
        assert await contents(node) == model
        await node.aclose()
        where = 600_000 + 77 * step
        assert not qemu_io(path, "encrypt.key-secret=s", f"write -P {step + 1} {where} 90000")
        model[where : where + 90_000] = bytes([step + 1]) * 90_000
        qemu_img("convert", *words(path), "-O", "raw", plain)
        assert plain.read_bytes() == model
    qemu_img("check", *words(path))


@pytest.mark.parametrize("text", FORMATS[:3])
async def test_qemu_s_images_are_read_and_written(tmp_path: Path, text: str) -> None:
    qemu_create(tmp_path / "disk.qcow2", f"{text},encrypt.key-secret=s")
    await work(tmp_path / "disk.qcow2")


@pytest.mark.parametrize("text", FORMATS)
async def test_our_images_are_read_and_written_by_qemu(tmp_path: Path, text: str) -> None:
    await make(tmp_path / "disk.qcow2", f"{text},encrypt.key-secret=s")
    await work(tmp_path / "disk.qcow2")


async def test_nothing_of_the_guest_s_is_found_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    for text in FORMATS[:2]:
        await make(path, f"{text},encrypt.key-secret=s")
        node = await opened(path)
        await node.write(0, b"plaintext" * 1000)
        assert node.plain(0, 512) is None
        await node.aclose()
        assert b"plaintext" not in path.read_bytes()


@pytest.mark.parametrize("form", FORMATS[:2])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "encrypt.key-secret=missing",
        "encrypt.format=luks",
        "encrypt.format=aes",
        "encrypt.format=foo,encrypt.key-secret=s",
        "encrypt.key-secret=s,encrypt.foo=1",
    ],
)
async def test_opening_is_refused_in_qemu_io_s_words(tmp_path: Path, text: str, form: str) -> None:
    path = tmp_path / "disk.qcow2"
    await make(path, f"{form},encrypt.key-secret=s")
    theirs = qemu_io(path, text)
    assert theirs
    with pytest.raises(OptionError) as caught:
        await opened(path, text)
    assert theirs == f"qemu-io: can't open: {caught.value}\n"


@pytest.mark.parametrize(
    "text",
    [
        "encrypt.format=luks",
        "encrypt.format=aes",
        "encrypt.format=luks,encrypt.key-secret=missing",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=foo",
        "encrypt.format=aes,encrypt.key-secret=s,encrypt.iter-time=3",
    ],
)
async def test_creation_is_refused_in_qemu_img_s_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "disk.qcow2"
    theirs = qemu_img("create", "-q", "-f", "qcow2", *SECRET, "-o", text, path, "1M", ok=(1,))
    with pytest.raises(OptionError) as caught:
        await make(path, text)
    assert theirs.stderr == f"qemu-img: {path}: {caught.value}\n"


async def test_an_image_that_is_not_encrypted_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    await make(path, "cluster_size=64k")
    text = "encrypt.format=luks,encrypt.key-secret=s"
    with pytest.raises(OptionError) as caught:
        await opened(path, text)
    assert qemu_io(path, text) == f"qemu-io: can't open: {caught.value}\n"
    assert qemu_io(path, "encrypt.key-secret=s") == ""
    await (await opened(path, "encrypt.key-secret=s")).aclose()
    with pytest.raises(OptionError, match=r"does not support the option 'encrypt\.foo'"):
        await opened(path, "encrypt.foo=1")


async def test_a_wrong_password_opens_no_luks(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    await make(path, f"{FORMATS[1]},encrypt.key-secret=s")
    other = Graph(Catalog(), ObjectStore.of([{"qom-type": "secret", "id": "s", "data": "abd"}]))
    tree = {
        "driver": "qcow2",
        "encrypt": {"key-secret": "s"},
        "file": {"driver": "file", "filename": str(path)},
    }
    with pytest.raises(OptionError, match="Invalid password, cannot unlock any keyslot"):
        await other.open(tree)


async def test_the_header_counts_when_measuring() -> None:
    plain = await measure(Options({"size": SIZE}, owner=""), None)
    text = "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-mode=cbc"
    found = await measure(Options({**parse_keyval(text), "size": SIZE}, owner=""), None)
    area = header_area(take_encryption(Options({"cipher-mode": "cbc"}, owner="")).format)
    assert found.required - plain.required == -(-area // 65536) * 65536
