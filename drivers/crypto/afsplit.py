"""LUKS's anti-forensic splitter: a key blown up so that losing any part of it loses all of it.

See the LUKS1 on-disk format, "AF splitter".
"""

from __future__ import annotations

import secrets

from drivers.crypto.hashes import DIGEST_BYTES, digest


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """`stripes` times as many bytes as `key` has."""
    whole = bytearray(secrets.token_bytes(len(key) * (stripes - 1)))
    whole += _xor(_folded(whole, len(key), hash_name), key)
    return bytes(whole)


def merge(material: bytes, key_bytes: int, hash_name: str) -> bytes:
    """The key of which split() made `material`."""
    last = len(material) - key_bytes
    return _xor(_folded(material[:last], key_bytes, hash_name), material[last:])


def _folded(stripes: bytes | bytearray, key_bytes: int, hash_name: str) -> bytes:
    state = bytes(key_bytes)
    for start in range(0, len(stripes), key_bytes):
        state = _diffused(_xor(state, stripes[start : start + key_bytes]), hash_name)
    return state


def _diffused(data: bytes, hash_name: str) -> bytes:
    """Each piece of the hash's size becomes the hash of its number and itself."""
    step = DIGEST_BYTES[hash_name]
    pieces = (
        digest(hash_name, number.to_bytes(4, "big") + data[number * step : (number + 1) * step])
        for number in range(-(-len(data) // step))
    )
    return b"".join(pieces)[: len(data)]


def _xor(first: bytes, second: bytes | bytearray) -> bytes:
    return (int.from_bytes(first) ^ int.from_bytes(second)).to_bytes(len(first))
