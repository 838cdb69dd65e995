"""LUKS images that qemu-img, qemu-io and cryptsetup made, and ours in their hands."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.crypto.luks.layout import HEADER_BYTES, header_area, parse
from drivers.errors import Error, ImageError, OptionError
from drivers.format.luks import LuksNode
from drivers.objects.encryption import take_encryption
from drivers.objects.store import ObjectStore
from drivers.options.keyval import parse_keyval
from drivers.options.schema import Options, Tree
from drivers.testing.model import contents
from tests.interop.programs import MiB, Servers, attempt, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 256 << 10
SECRETS = ("--object", "secret,id=s,data=abc", "--object", "secret,id=n,data=new")

# QEMU dies of an assertion on keys of 24 bytes: their split material fills no whole sectors.
DIES = [(f"{family}-192", mode) for family in ("aes", "serpent") for mode in ("cbc", "ctr", "ecb")]
CIPHERS = [
    f"cipher-alg={algorithm},cipher-mode={mode}"
    for algorithm in (
        *("aes-128", "aes-192", "aes-256", "serpent-128", "serpent-192", "serpent-256"),
        *("twofish-128", "twofish-256", "cast5-128"),
    )
    for mode in ("xts", "cbc", "ctr", "ecb")
    if (algorithm, mode) not in [("cast5-128", "xts"), *DIES]
]
HASHES = ("md5", "sha1", "sha224", "sha384", "sha512", "ripemd160")
IV_GENERATORS = [
    "ivgen-alg=plain",
    "cipher-mode=cbc,ivgen-alg=plain",
    "cipher-mode=cbc,ivgen-alg=essiv",
    "cipher-mode=xts,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cipher-mode=ecb,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-alg=aes-256,cipher-mode=ctr,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    "cipher-alg=serpent-256,cipher-mode=cbc,ivgen-alg=essiv",
    "cipher-alg=twofish-256,cipher-mode=cbc,ivgen-alg=essiv",
    "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
    "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=plain",
]
# Fewer, as each takes qemu-img more than two seconds.
QEMU_S = [
    "cipher-alg=aes-128",
    "cipher-alg=aes-192,hash-alg=sha1",
    "cipher-alg=serpent-256,cipher-mode=cbc,hash-alg=sha512",
    "cipher-alg=twofish-128,cipher-mode=ctr,hash-alg=sha224",
    "cipher-alg=cast5-128,cipher-mode=ecb,hash-alg=ripemd160",
    "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=plain,hash-alg=md5",
    "cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha384",
    "cipher-alg=aes-128,cipher-mode=xts,ivgen-alg=essiv,ivgen-hash-alg=md5",
]


def objects() -> ObjectStore:
    secrets: list[Tree] = [
        {"qom-type": "secret", "id": "s", "data": "abc"},
        {"qom-type": "secret", "id": "n", "data": "new"},
        {"qom-type": "secret", "id": "bytes", "data": "//4=", "format": "base64"},
    ]
    return ObjectStore.of(secrets)


class Creation:
    """What create() works with, over files."""

    def __init__(self) -> None:
        self.graph = Graph(Catalog(), objects())
        self.filename = ""

    async def create_file(self, filename: str, *, size: int = 0) -> Node:
        Path(filename).write_bytes(bytes(size))
        return await self.graph.open({"driver": "file", "filename": filename})

    async def open_image(self, filename: str, image_format: str | None, *, read_only: bool = True) -> Node:
        raise AssertionError("luks has no backing files")


async def create(path: Path, text: str, size: int = SIZE) -> None:
    context = Creation()
    context.filename = str(path)
    options = Options({**parse_keyval(text), "size": size}, owner="luks")
    await LuksNode.create(context, options)
    options.finish()
    for node in list(context.graph.nodes.values()):
        await node.aclose()


async def opened(path: Path, secret: str = "s", **flags: Any) -> LuksNode:
    tree: Tree = {"driver": "luks", "key-secret": secret, "file": {"driver": "file", "filename": str(path)}}
    node = await Graph(Catalog(), objects()).open(tree, OpenFlags(**flags))
    assert isinstance(node, LuksNode)
    return node


def image(path: Path, secret: str = "s") -> list[str]:
    """The words that have QEMU's programs open it."""
    return [*SECRETS, "--image-opts", f"driver=luks,key-secret={secret},file.filename={path}"]


def qemu_create(path: Path, text: str, size: int = SIZE) -> None:
    """qemu-img measures its own speed by a clock that stands still at times, and then gives up."""
    command = ("qemu-img", "create", "-q", "-f", "luks", *SECRETS, "-o", f"key-secret=s,{text}", path, size)
    for _ in range(20):
        done = attempt(*command)
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", QEMU_S)
async def test_qemu_s_images_are_read_and_written(tmp_path: Path, text: str) -> None:
    path, plain = tmp_path / "disk.luks", tmp_path / "plain"
    qemu_create(path, f"iter-time=20,{text}")
    header = parse(path.read_bytes()[:HEADER_BYTES])
    wanted = take_encryption(Options(parse_keyval(text), owner=""))
    assert header.format == wanted.format
    assert header.payload_offset == header_area(wanted.format)
    content = bytearray(os.urandom(SIZE))
    plain.write_bytes(content)
    run("qemu-img", "convert", "-n", "-f", "raw", *SECRETS, "--target-image-opts", plain, image(path)[-1])
    node = await opened(path)
    assert await contents(node) == content
    for offset, length in ((0, 512), (700, 5000), (SIZE - 4097, 4097)):
        data = os.urandom(length)
        await node.write(offset, data)
        content[offset : offset + length] = data
    await node.write_zeroes(65536, 4096)
    content[65536 : 65536 + 4096] = bytes(4096)
    await node.aclose()
    run("qemu-img", "convert", "-O", "raw", *image(path), plain)
    assert plain.read_bytes() == content


@pytest.mark.parametrize("text", [*CIPHERS, *(f"hash-alg={name}" for name in HASHES), *IV_GENERATORS])
async def test_our_images_are_read_by_qemu_and_described_like_its_own(tmp_path: Path, text: str) -> None:
    path, plain = tmp_path / "disk.luks", tmp_path / "plain"
    await create(path, f"key-secret=s,iter-time=10,{text}")
    content = os.urandom(SIZE)
    node = await opened(path)
    await node.write(0, content)
    info = await node.info()
    await node.aclose()
    run("qemu-img", "convert", "-O", "raw", *image(path), plain)
    assert plain.read_bytes() == content
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", "luks", path))
    assert (info.encrypted, info.specific) == (True, told["format-specific"]["data"])


# --- what is refused, in whose words ------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "key-secret=missing",
        "key-secret=s,cipher-alg=foo",
        "key-secret=s,cipher-alg=cast5-128",
        "key-secret=s,cipher-alg=3des",
        "key-secret=s,cipher-alg=des",
        "key-secret=s,cipher-mode=foo",
        "key-secret=s,hash-alg=foo",
        "key-secret=s,ivgen-alg=foo",
        "key-secret=s,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1",
        "key-secret=s,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=foo",
        "key-secret=s,cipher-alg=serpent-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1",
        "key-secret=s,cipher-alg=twofish-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1",
        "key-secret=s,cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        "hash-alg=sha256",
    ],
)
async def test_creation_is_refused_in_qemu_img_s_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "disk.luks"
    theirs = attempt("qemu-img", "create", "-q", "-f", "luks", *SECRETS, "-o", text, path, "1M")
    assert theirs.returncode == 1
    with pytest.raises(OptionError) as caught:
        await create(path, text)
    assert theirs.stderr == f"qemu-img: {path}: {caught.value}\n"


@pytest.mark.parametrize("secret", ["missing", "n"])
async def test_opening_is_refused_in_qemu_io_s_words(tmp_path: Path, secret: str) -> None:
    path = tmp_path / "disk.luks"
    await create(path, "key-secret=s,iter-time=10")
    theirs = attempt("qemu-io", *image(path, secret), "-c", "read 0 1")
    with pytest.raises(Error) as caught:
        await opened(path, secret)
    assert theirs.stderr == f"qemu-io: can't open: {caught.value}\n"


async def test_what_is_no_luks_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    for content in (b"", b"abc", bytes(4 * MiB)):
        path.write_bytes(content)
        with pytest.raises(ImageError, match="Volume is not in LUKS format"):
            await opened(path)
    await create(path, "key-secret=s,iter-time=10")
    whole = path.read_bytes()
    for length, message in ((100, "LUKS header is cut off"), (5000, "the key material is cut off")):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=message):
            await opened(path)
    path.write_bytes(whole[: header_area(take_encryption(Options({}, owner="")).format) - 1])
    with pytest.raises(OptionError, match="ends before its LUKS payload begins"):
        await opened(path)
    with pytest.raises(OptionError, match="Data from secret bytes is not valid UTF-8"):
        await opened(path, "bytes")


@pytest.mark.parametrize("text", ["cipher-alg=aes-128", "cipher-mode=cbc,preallocation=falloc"])
@pytest.mark.parametrize("size", [1000, MiB])
async def test_what_is_measured_is_what_is_made(tmp_path: Path, text: str, size: int) -> None:
    path = tmp_path / "disk.luks"
    text = f"key-secret=s,iter-time=10,{text}"
    found = await LuksNode.measure(Options({**parse_keyval(text), "size": size}, owner=""), None)
    await create(path, text, size)
    assert found == (path.stat().st_size, path.stat().st_size, None)


async def test_qemu_img_measures_the_same() -> None:
    found = await LuksNode.measure(Options({"key-secret": "s", "size": "5G"}, owner=""), None)
    command = ("qemu-img", "measure", "-O", "luks", *SECRETS, "--output=json", "-o", "key-secret=s")
    for _ in range(20):
        told = attempt(*command, "--size", "5G")
        if told.returncode == 0:
            break
    assert json.loads(told.stdout) == {"required": found.required, "fully-allocated": found.fully_allocated}


async def test_an_image_that_ends_within_a_sector(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    qemu_create(path, "iter-time=10", 1000)
    run("qemu-img", "convert", "-O", "raw", *image(path), tmp_path / "plain")
    node = await opened(path)
    assert node.size == 1024
    assert await contents(node) == (tmp_path / "plain").read_bytes()
    await node.write(600, b"x" * 300, fua=True)
    await node.aclose()
    run("qemu-io", *image(path), "-c", "read -P 120 600 300")
    await create(path, "key-secret=s,iter-time=10", 1000)
    run("qemu-io", *image(path), "-c", "write -P 7 512 488")
    node = await opened(path, read_only=True)
    assert (await contents(node))[512:1000] == b"\7" * 488
    await node.aclose()


# --- passwords ----------------------------------------------------------------------------------

AMENDMENTS = [
    "new-secret=n",
    "state=foo",
    "state=active",
    "state=active,new-secret=n,iter-time=10",
    "state=active,new-secret=n,keyslot=8",
    "state=active,new-secret=n,keyslot=0",
    "state=active,new-secret=n,keyslot=5,iter-time=10",
    "state=active,new-secret=missing",
    "state=active,new-secret=n,old-secret=s",
    "state=inactive",
    "state=inactive,keyslot=7",
    "state=inactive,keyslot=9",
    "state=inactive,old-secret=missing",
    "state=inactive,old-secret=s,keyslot=5",
    "state=inactive,old-secret=n,keyslot=5",
    "state=inactive,old-secret=n,new-secret=s",
    "state=inactive,old-secret=n",
    "state=inactive,old-secret=n",
    "state=inactive,keyslot=0",
    "state=inactive,old-secret=s",
]


async def test_passwords_are_amended_step_by_step_like_qemu_img_does(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.luks", tmp_path / "theirs.luks"
    await create(ours, "key-secret=s,iter-time=10")
    theirs.write_bytes(ours.read_bytes())
    for text in AMENDMENTS:
        for _ in range(20):
            done = attempt("qemu-img", "amend", *image(theirs), "-o", text)
            if "accurate CPU usage" not in done.stderr:
                break
        node = await opened(ours)
        message = ""
        try:
            await node.amend(Options(parse_keyval(text), owner="luks"))
        except OptionError as error:
            message = f"qemu-img: {error}\n"
        finally:
            await node.aclose()
        assert message == done.stderr, text
        mine, other = (parse(file.read_bytes()[:HEADER_BYTES]) for file in (ours, theirs))
        assert [slot.active for slot in mine.slots] == [slot.active for slot in other.slots], text


async def test_a_new_password_opens_the_image_for_qemu_and_an_erased_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    await create(path, "key-secret=s,iter-time=10")
    node = await opened(path)
    await node.amend(Options(parse_keyval("state=active,new-secret=n,iter-time=10"), owner="luks"))
    run("qemu-io", "-r", *image(path, "n"), "-c", "read 0 512")
    await node.amend(Options(parse_keyval("state=inactive,old-secret=s"), owner="luks"))
    await node.amend(Options({"state": "inactive", "keyslot": 1, "force": True}, owner="luks"))
    await node.aclose()
    for secret in ("s", "n"):
        assert "Invalid password" in attempt("qemu-io", *image(path, secret), "-c", "read 0 1").stderr


# --- cryptsetup ---------------------------------------------------------------------------------


@pytest.mark.peer("cryptsetup")
async def test_cryptsetup_makes_what_we_read_and_checks_what_we_make(tmp_path: Path) -> None:
    path, key_file = tmp_path / "disk.luks", tmp_path / "key"
    key_file.write_text("abc")
    with path.open("wb") as file:
        file.truncate(4 * MiB)
    unlock = ("--key-file", key_file, "--batch-mode")
    quick = ("--pbkdf-force-iterations", "1000")
    run("cryptsetup", "luksFormat", "--type", "luks1", *unlock, *quick, "-c", "aes-cbc-essiv:sha256", path)
    node = await opened(path)
    await node.write(0, b"payload")
    assert (await contents(node))[:7] == b"payload"
    await node.aclose()
    await create(path, "key-secret=s,iter-time=10,hash-alg=sha512")
    dump = run("cryptsetup", "luksDump", "--dump-master-key", *unlock, path)
    assert "xts-plain64" in dump and "MK dump" in dump
    await create(path, "key-secret=s,iter-time=10,cipher-alg=aes-192,cipher-mode=cbc")
    dump = run("cryptsetup", "luksDump", "--dump-master-key", *unlock, path)
    assert dump.count("MK bits:       \t192") == 1
    key_file.write_text("wrong")
    assert attempt("cryptsetup", "luksDump", "--dump-master-key", *unlock, path).returncode == 2


# --- served -------------------------------------------------------------------------------------


async def test_nbdserve_serves_an_encrypted_image(servers: Servers, tmp_path: Path) -> None:
    path, key_file = tmp_path / "disk.luks", tmp_path / "key"
    await create(path, "key-secret=s,iter-time=10", 4 * MiB)
    key_file.write_text("abc")
    text = f"driver=luks,key-secret=k,file.filename={path}"
    server = servers.nbdserve("--object", f"secret,id=k,file={key_file}", "--image-opts", text)
    script = ("-c", "write -P 9 1000 2M", "-c", "read -P 9 1000 2M", "-c", "flush")
    run("qemu-io", "-f", "raw", *script, server.uri)
    server.stop()
    run("qemu-io", *image(path), "-c", "read -P 9 1000 2M")
