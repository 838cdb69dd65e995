"""Secrets and the store they are kept in, beside qemu-img."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import OptionError
from drivers.objects.argument import HelpWanted, parse_object
from drivers.objects.secret import MAX_FILE, Secret, password, secret
from drivers.objects.store import NOT_YET, ObjectStore, help_text

KEY = bytes(range(32))
IV = bytes(range(16))


def made(*arguments: str) -> ObjectStore:
    trees = [parse_object(argument) for argument in arguments]
    return ObjectStore.of([tree for tree in trees if not isinstance(tree, HelpWanted)])


def wrapped(clear: bytes) -> str:
    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return base64.b64encode(encryptor.update(clear) + encryptor.finalize()).decode()


def padded(clear: bytes) -> bytes:
    count = 16 - len(clear) % 16
    return clear + bytes([count]) * count


MASTER = f"secret,id=k,format=base64,data={base64.b64encode(KEY).decode()}"
WRAPPED = f"secret,id=s,keyid=k,iv={base64.b64encode(IV).decode()},format=base64"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("secret,id=s,data=abc", b"abc"),
        ("secret,id=s,data=", b""),
        ("secret,id=s,data=a,,b=c", b"a,b=c"),
        ("qom-type=secret,data=abc,id=s", b"abc"),
        ("secret,id=s,data=a,data=b", b"b"),
        ("secret,id=s,data=x,iv=AAAA", b"x"),
        ("secret,id=s,data=YWJj,format=raw", b"YWJj"),
        ("secret,id=s,data=YWJj,format=base64", b"abc"),
        ("secret,id=s,data=YWJjZA==,format=base64", b"abcd"),
        ("secret,id=s,data=YWJjZ,format=base64", b"abc"),
        ('{"qom-type": "secret", "id": "s", "data": "a,b"}', b"a,b"),
        ("{'qom-type': 'secret', 'id': 's', 'data': 'x'}", b"x"),
    ],
)
def test_a_secret_in_clear(argument: str, value: bytes) -> None:
    assert secret(made(argument), "s") == value


def test_a_secret_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"YWJj\nZGVm\n")
    assert secret(made(f"secret,id=s,file={path}"), "s") == b"YWJj\nZGVm\n"
    assert secret(made(f"secret,id=s,file={path},format=base64"), "s") == b"abcdef"
    path.write_bytes(bytes(MAX_FILE + 1))
    with pytest.raises(OptionError, match="larger than"):
        made(f"secret,id=s,file={path}")


@given(st.binary(max_size=100))
def test_a_wrapped_secret(clear: bytes) -> None:
    assert secret(made(MASTER, f"{WRAPPED},data={wrapped(padded(clear))}"), "s") == clear


def test_a_password_is_text() -> None:
    store = made("secret,id=s,format=base64,data=//4=")
    assert secret(store, "s") == b"\xff\xfe"
    with pytest.raises(OptionError, match="Data from secret s is not valid UTF-8"):
        password(store, "s")


def test_objects_are_found_by_id_and_kind() -> None:
    store = made("secret,id=s,data=abc")
    assert store.get("s", Secret) is not None
    assert store.get("s", bytes) is None
    for missing in ("t", ""):
        with pytest.raises(OptionError, match=f"No secret with id '{missing}'"):
            secret(store, missing)
    store.remove("s")
    assert store.get("s", Secret) is None
    with pytest.raises(OptionError, match="object 's' not found"):
        store.remove("s")


# What is refused, in the words of qemu-img itself.
REFUSED = [
    ["secret"],
    ["secret,id=s"],
    ["foo,id=x"],
    ["foo"],
    ["help=on"],
    ["secret,data=x"],
    ["secret,id=,data=x"],
    ["secret,id=9a,data=x"],
    ["secret,id=a b,data=x"],
    ["secret,id=s,data=a,file=b"],
    ["secret,id=s,data=x,bogus=1"],
    ["secret,id=s,data=x,foo.bar=1"],
    ["secret,id=s,data"],
    ["secret,id=s,data=x,help=1"],
    ["secret,id=s,data=a,format=hex"],
    ["secret,id=s,data=!!,format=base64"],
    ["secret,id=s,data=YW Jj,format=base64"],
    ["secret,id=s,file=zeroes,format=base64"],
    ["secret,id=s,data=a", "secret,id=s,data=b"],
    ["secret,id=s,data=a,keyid=k"],
    [MASTER, "secret,id=s,data=a,keyid=k"],
    [MASTER, "secret,id=s,data=a,keyid=k,iv=!"],
    [MASTER, "secret,id=s,data=a,keyid=k,iv=AAAA"],
    [MASTER, f"{WRAPPED},data=YWJj"],
    [MASTER, f"{WRAPPED},data={wrapped(bytes(15) + bytes([17]))}"],
    ["secret,id=k,data=short", f"{WRAPPED},data=YWJj"],
    ['{"qom-type":"secret","id":"s","data":"x"'],
    ['{"qom-type":"secret","id":"s","data":1}'],
    ['{"qom-type":"secret","id":"s","data":"x","foo":1}'],
    ['{"qom-type":"secret","id":1}'],
    ['{"qom-type":1,"id":"s"}'],
    ['{"qom-type":"secret","data":"x"}'],
    ['{"id":"s","data":"x"}'],
]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("arguments", REFUSED, ids=str)
def test_is_refused_in_qemu_img_s_words(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zeroes").write_bytes(bytes(100))
    Path("image").write_bytes(bytes(512))
    words = [word for argument in arguments for word in ("--object", argument)]
    theirs = subprocess.run(
        ["qemu-img", "info", "-f", "raw", *words, "image"], capture_output=True, text=True, check=False
    )
    assert theirs.returncode == 1
    with pytest.raises(OptionError) as caught:
        made(*arguments)
    assert f"qemu-img: {caught.value}" == theirs.stderr.rstrip("\n")


@pytest.mark.parametrize("clear", [b"abc" + bytes(12) + b"\x0d", b"x" * 15 + b"\0"])
def test_only_the_last_byte_of_padding_is_looked_at(clear: bytes) -> None:
    value = secret(made(MASTER, f"{WRAPPED},data={wrapped(clear)}"), "s")
    assert value == clear[: len(clear) - clear[-1]]


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(OptionError, match="Unable to read /nonexistent: No such file or directory"):
        made("secret,id=s,file=/nonexistent")


@pytest.mark.parametrize("type_name", NOT_YET)
def test_types_to_come_are_told_from_mistakes(type_name: str) -> None:
    with pytest.raises(OptionError, match=f"objects of type '{type_name}' are not supported yet"):
        made(f"{type_name},id=a")


def test_help_has_qemu_img_s_shape() -> None:
    assert help_text("").splitlines()[0] == "List of user creatable objects:"
    assert "  file=<string>" in help_text("secret").splitlines()


KEYS = st.sampled_from(["qom-type", "id", "data", "file", "format", "keyid", "iv", "x"])
LEAVES = st.sampled_from(["secret", "s", "base64", "raw", "", "AAAA"]) | st.integers() | st.none()
VALUES = LEAVES | st.lists(LEAVES, max_size=1) | st.dictionaries(st.just("a"), LEAVES, max_size=1)


@given(st.dictionaries(KEYS, VALUES))
def test_any_json_is_an_object_or_an_option_error(tree: dict[str, Any]) -> None:
    try:
        made(json.dumps(tree))
    except OptionError:
        return
    assert tree["qom-type"] == "secret"
