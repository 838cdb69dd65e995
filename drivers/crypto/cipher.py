"""Ciphers over disk sectors.

The interface that image formats use is SectorCipher's: encrypt() and decrypt(), in place, and
in_turns() around either for buffers of any size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import trio

from drivers.crypto.gcrypt import MODES, Handle, load
from drivers.crypto.hashes import DIGEST_BYTES, digest
from drivers.errors import OptionError

SECTOR = 512
# in_turns() lets others run after so many bytes: a tenth of a millisecond of AES.
TURN_BYTES = 128 << 10


class Algorithm(NamedTuple):
    """`number` is libgcrypt's, None for what it does not have."""

    family: str
    key_bytes: int
    block_bytes: int
    number: int | None


ALGORITHMS = {
    "aes-128": Algorithm("aes", 16, 16, 7),
    "aes-192": Algorithm("aes", 24, 16, 8),
    "aes-256": Algorithm("aes", 32, 16, 9),
    "cast5-128": Algorithm("cast5", 16, 8, 3),
    "serpent-128": Algorithm("serpent", 16, 16, 304),
    "serpent-192": Algorithm("serpent", 24, 16, 305),
    "serpent-256": Algorithm("serpent", 32, 16, 306),
    "twofish-128": Algorithm("twofish", 16, 16, 303),
    "twofish-192": Algorithm("twofish", 24, 16, None),
    "twofish-256": Algorithm("twofish", 32, 16, 10),
}
IV_GENERATORS = ("plain", "plain64", "essiv")

_FAMILY_NAMES = {"aes": "AES", "serpent": "Serpent", "twofish": "Twofish"}


def key_bytes(algorithm: str, mode: str) -> int:
    """The length of a key; XTS takes two."""
    return ALGORITHMS[algorithm].key_bytes * (2 if mode == "xts" else 1)


class SectorCipher:
    """A cipher with its key; every sector of 512 bytes has an IV made of its number.

    `algorithm` is of ALGORITHMS, `mode` of gcrypt.MODES, `iv_generator` of IV_GENERATORS;
    `iv_hash` is essiv's. The key has key_bytes() bytes.

    encrypt() and decrypt() work in place on whole sectors, may be called from any number of
    threads at once, and hold the interpreter's lock: AES takes about 0.8 microseconds for each
    KiB, so up to TURN_BYTES are best done where one is, without a thread.
    """

    sector_size = SECTOR

    def __init__(
        self, algorithm: str, mode: str, key: bytes, *, iv_generator: str = "plain64", iv_hash: str = "sha256"
    ) -> None:
        self._library = load()
        self._algorithm = _supported(algorithm, mode)
        self._mode = mode
        self._key = key
        assert len(key) == key_bytes(algorithm, mode)
        self._encrypt = self._library.gcry_cipher_encrypt
        self._decrypt = self._library.gcry_cipher_decrypt
        self._set_iv = self._library.gcry_cipher_setctr if mode == "ctr" else self._library.gcry_cipher_setiv
        # In XTS mode libgcrypt adds 1 to the IV after each call: what plain64 asks for.
        self._counts = mode == "xts" and iv_generator == "plain64"
        self._essiv = (
            _essiv(self._library, algorithm, key, iv_hash)
            if iv_generator == "essiv" and mode != "ecb"
            else None
        )
        self._wraps = iv_generator == "plain"
        # A handle holds one thread's IV. Those that are not in use wait here.
        self._handles = [self._open()]

    def encrypt(self, sector: int, data: memoryview) -> None:
        """Encrypt `data`, whole sectors from number `sector` on."""
        self._run(self._encrypt, sector, data)

    def decrypt(self, sector: int, data: memoryview) -> None:
        """Decrypt `data`, whole sectors from number `sector` on."""
        self._run(self._decrypt, sector, data)

    def _run(self, function: Any, sector: int, data: memoryview) -> None:
        if not data:
            return
        assert not len(data) % SECTOR
        try:
            handle = self._handles.pop()
        except IndexError:
            handle = self._open()
        first = ctypes.c_char.from_buffer(data)
        start = ctypes.addressof(first)
        addresses = range(start, start + len(data), SECTOR)
        raw = handle.raw
        if self._mode == "ecb":
            failed = function(raw, start, len(data), None, 0)
        elif self._counts:
            self._set_iv(raw, sector.to_bytes(16, "little"), 16)
            failed = any(map(function, repeat(raw), addresses, repeat(SECTOR), repeat(None), repeat(0)))
        else:
            failed = 0
            set_iv, iv_bytes = self._set_iv, self._algorithm.block_bytes
            for address, iv in zip(addresses, self._ivs(sector, len(addresses)), strict=True):
                failed |= set_iv(raw, iv, iv_bytes) | function(raw, address, SECTOR, None, 0)
        assert not failed
        self._handles.append(handle)

    def _ivs(self, sector: int, count: int) -> Sequence[bytes]:
        size = self._algorithm.block_bytes
        mask = 0xFFFF_FFFF if self._wraps else 0xFFFF_FFFF_FFFF_FFFF
        ivs = [(number & mask).to_bytes(size, "little") for number in range(sector, sector + count)]
        if self._essiv is None:
            return ivs
        joined = bytearray().join(ivs)
        first = ctypes.c_char.from_buffer(joined)
        failed = self._encrypt(self._essiv.raw, ctypes.addressof(first), len(joined), None, 0)
        assert not failed
        return [bytes(joined[start : start + size]) for start in range(0, len(joined), size)]

    def _open(self) -> Handle:
        assert self._algorithm.number is not None
        return Handle(self._library, self._algorithm.number, MODES[self._mode], self._key)


async def in_turns(
    operation: Callable[[int, memoryview], None], sector: int, data: memoryview, *, turn: int = TURN_BYTES
) -> None:
    """`operation`, encrypt() or decrypt() of a SectorCipher, over `data` of any length; others have
    their turn in between."""
    operation(sector, data[:turn])
    for start in range(turn, len(data), turn):
        await trio.lowlevel.checkpoint()
        operation(sector + start // SECTOR, data[start : start + turn])


def _supported(algorithm: str, mode: str) -> Algorithm:
    found = ALGORITHMS.get(algorithm)
    if found is None:
        raise OptionError(f"Algorithm '{algorithm}' not supported")
    if found.number is None:
        raise OptionError(f"Algorithm '{algorithm}' not supported: libgcrypt does not have it")
    if mode not in MODES or (mode == "xts" and found.block_bytes != 16):
        raise OptionError(f"Unsupported cipher mode {mode}")
    return found


def check_cipher(algorithm: str, mode: str, *, iv_generator: str, iv_hash: str) -> None:
    """Raise OptionError for what cannot be used together."""
    _supported(algorithm, mode)
    if iv_generator not in IV_GENERATORS:
        raise OptionError(f"Unsupported IV generator '{iv_generator}'")
    if iv_generator == "essiv" and mode != "ecb":
        _essiv_algorithm(algorithm, iv_hash)


def _essiv(library: ctypes.PyDLL, algorithm: str, key: bytes, hash_name: str) -> Handle:
    number = _essiv_algorithm(algorithm, hash_name)
    return Handle(library, number, MODES["ecb"], digest(hash_name, key))


def _essiv_algorithm(algorithm: str, hash_name: str) -> int:
    """Libgcrypt's number for the sibling of `algorithm` whose key is as long as the hash."""
    family = ALGORITHMS[algorithm].family
    for sibling in ALGORITHMS.values():
        if sibling.family == family and sibling.key_bytes == DIGEST_BYTES[hash_name] and sibling.number:
            return sibling.number
    if family in _FAMILY_NAMES:
        raise OptionError(
            f"No {_FAMILY_NAMES[family]} cipher with key size {DIGEST_BYTES[hash_name]} available"
        )
    raise OptionError(f"Cipher {algorithm} not supported with essiv")
