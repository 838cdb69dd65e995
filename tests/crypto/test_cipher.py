"""Ciphers over sectors: what they compute, where, and for how many callers at once."""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
import threading

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from drivers.crypto import cipher as module
from drivers.crypto import gcrypt
from drivers.crypto.cipher import ALGORITHMS, SectorCipher, check_cipher, in_turns, key_bytes
from drivers.crypto.gcrypt import MODES
from drivers.crypto.legacy import aes_cipher
from drivers.errors import OptionError

NOISE = random.Random(1).randbytes(64 << 10)
KEY = bytes(range(64))


def encrypted(cipher: SectorCipher, sector: int, data: bytes) -> bytes:
    buffer = bytearray(data)
    cipher.encrypt(sector, memoryview(buffer))
    return bytes(buffer)


def reference(mode: modes.Mode, key: bytes, data: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), mode).encryptor()
    return encryptor.update(data) + encryptor.finalize()


def sectors(data: bytes) -> list[bytes]:
    return [data[start : start + 512] for start in range(0, len(data), 512)]


SECTORS = pytest.mark.parametrize("first", [0, 255, (1 << 32) - 2, (1 << 54) + 3])


@SECTORS
@pytest.mark.parametrize("algorithm", ["aes-128", "aes-256"])
def test_xts_with_plain64(algorithm: str, first: int) -> None:
    key = KEY[: key_bytes(algorithm, "xts")]
    expected = [
        reference(modes.XTS(number.to_bytes(16, "little")), key, sector)
        for number, sector in enumerate(sectors(NOISE), first)
    ]
    assert encrypted(SectorCipher(algorithm, "xts", key), first, NOISE) == b"".join(expected)


@SECTORS
@pytest.mark.parametrize("mode", ["cbc", "ctr", "xts"])
def test_plain_counts_in_32_bits(mode: str, first: int) -> None:
    key = KEY[: key_bytes("aes-256", mode)]
    make = {"cbc": modes.CBC, "ctr": modes.CTR, "xts": modes.XTS}[mode]
    expected = [
        reference(make((number & 0xFFFFFFFF).to_bytes(16, "little")), key, sector)
        for number, sector in enumerate(sectors(NOISE[:4096]), first)
    ]
    cipher = SectorCipher("aes-256", mode, key, iv_generator="plain")
    assert encrypted(cipher, first, NOISE[:4096]) == b"".join(expected)


@SECTORS
def test_essiv(first: int) -> None:
    key = KEY[:16]
    hashed = hashlib.sha256(key).digest()
    expected = []
    for number, sector in enumerate(sectors(NOISE[:4096]), first):
        iv = reference(modes.ECB(), hashed, number.to_bytes(16, "little"))
        expected.append(reference(modes.CBC(iv), key, sector))
    cipher = SectorCipher("aes-128", "cbc", key, iv_generator="essiv", iv_hash="sha256")
    assert encrypted(cipher, first, NOISE[:4096]) == b"".join(expected)


def test_ecb_has_no_iv() -> None:
    cipher = SectorCipher("aes-192", "ecb", KEY[:24], iv_generator="essiv", iv_hash="md5")
    assert encrypted(cipher, 7, NOISE) == reference(modes.ECB(), KEY[:24], NOISE)


@pytest.mark.parametrize("password", [b"", b"abc", b"0123456789abcdef", b"0123456789abcdefgh"])
def test_the_key_of_old_qcow_images_is_the_beginning_of_the_password(password: bytes) -> None:
    key = (password + bytes(16))[:16]
    expected = reference(modes.CBC((77).to_bytes(16, "little")), key, NOISE[:512])
    assert encrypted(aes_cipher(password), 77, NOISE[:512]) == expected


@pytest.mark.parametrize(("algorithm", "mode"), list(itertools.product(ALGORITHMS, MODES)))
def test_decrypting_undoes_encrypting_whatever_the_pieces(algorithm: str, mode: str) -> None:
    try:
        check_cipher(algorithm, mode, iv_generator="plain64", iv_hash="sha256")
    except OptionError:
        assert algorithm == "twofish-192" or (algorithm, mode) == ("cast5-128", "xts")
        return
    cipher = SectorCipher(algorithm, mode, KEY[: key_bytes(algorithm, mode)])
    whole = bytearray(encrypted(cipher, 5, NOISE))
    assert whole != NOISE
    for start in range(0, len(whole), 1536):
        cipher.decrypt(5 + start // 512, memoryview(whole)[start : start + 1536])
    assert whole == NOISE


def test_only_the_given_bytes_are_touched() -> None:
    cipher = SectorCipher("aes-128", "xts", KEY[:32])
    buffer = bytearray(NOISE[:2048])
    cipher.encrypt(0, memoryview(buffer)[512:1024])
    assert buffer[:512] == NOISE[:512]
    assert buffer[512:1024] != NOISE[512:1024]
    assert buffer[1024:] == NOISE[1024:2048]
    cipher.encrypt(0, memoryview(bytearray()))


@pytest.mark.parametrize(("mode", "iv_generator"), [("cbc", "plain64"), ("cbc", "essiv"), ("xts", "plain64")])
def test_threads_do_not_meet(mode: str, iv_generator: str) -> None:
    cipher = SectorCipher("aes-128", mode, KEY[: key_bytes("aes-128", mode)], iv_generator=iv_generator)
    expected = [encrypted(cipher, number, NOISE) for number in range(8)]
    right: list[int] = []

    def work(number: int) -> None:
        if all(encrypted(cipher, number, NOISE) == expected[number] for _ in range(20)):
            right.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert sorted(right) == list(range(8))


async def test_turns_add_up() -> None:
    cipher = SectorCipher("aes-256", "xts", KEY)
    for turn in (512, 1536, len(NOISE), 2 * len(NOISE)):
        buffer = bytearray(NOISE)
        await in_turns(cipher.encrypt, 9, memoryview(buffer), turn=turn)
        assert buffer == encrypted(cipher, 9, NOISE)


@pytest.mark.parametrize(
    ("algorithm", "mode", "iv_generator", "iv_hash", "message"),
    [
        ("cast5-128", "xts", "plain64", "sha256", "Unsupported cipher mode xts"),
        ("aes-256", "foo", "plain64", "sha256", "Unsupported cipher mode foo"),
        ("3des", "cbc", "plain64", "sha256", "Algorithm '3des' not supported"),
        ("aes-256", "cbc", "foo", "sha256", "Unsupported IV generator 'foo'"),
        ("aes-256", "cbc", "essiv", "sha1", "No AES cipher with key size 20 available"),
        ("serpent-256", "cbc", "essiv", "sha512", "No Serpent cipher with key size 64 available"),
        ("twofish-256", "cbc", "essiv", "sha1", "No Twofish cipher with key size 20 available"),
        ("cast5-128", "cbc", "essiv", "sha256", "Cipher cast5-128 not supported with essiv"),
    ],
)
def test_what_does_not_go_together(
    algorithm: str, mode: str, iv_generator: str, iv_hash: str, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        check_cipher(algorithm, mode, iv_generator=iv_generator, iv_hash=iv_hash)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcrypt, "_SONAME", "libgcrypt-that-is-not-there.so")
    monkeypatch.setattr(module, "load", gcrypt.load.__wrapped__)
    with pytest.raises(OptionError, match="apt-get install libgcrypt20"):
        SectorCipher("aes-128", "ecb", KEY[:16])
