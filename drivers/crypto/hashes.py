"""Hashes by the names of LUKS headers, and keys made of passwords with them (PBKDF2)."""

from __future__ import annotations

import hashlib
import time

import trio

from drivers.errors import OptionError

DIGEST_BYTES = {
    "md5": 16,
    "sha1": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "ripemd160": 20,
}

# No choice of iterations is below what LUKS recommends at the least.
MIN_ITERATIONS = 1000
# About two minutes of a fast machine. What an image asks beyond that is an attack, not a password.
MAX_ITERATIONS = 1 << 29


def digest(name: str, data: bytes) -> bytes:
    return hashlib.new(name, data).digest()


async def pbkdf2(name: str, password: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """`length` bytes of key, made in a worker thread."""
    return await trio.to_thread.run_sync(
        hashlib.pbkdf2_hmac, name, password, salt, iterations, length, abandon_on_cancel=True
    )


async def calibrate(name: str, length: int, milliseconds: int) -> int:
    """How many iterations a key of `length` bytes may take to be made in about that time."""
    per_second = await trio.to_thread.run_sync(_iterations_per_second, name, length)
    return min(max(per_second * milliseconds // 1000, MIN_ITERATIONS), MAX_ITERATIONS)


def _iterations_per_second(name: str, length: int) -> int:
    iterations = 1 << 13
    while True:
        start = time.perf_counter()
        hashlib.pbkdf2_hmac(name, b"password", b"salt", iterations, length)
        elapsed = time.perf_counter() - start
        # So long that neither the clock's steps nor the call itself matter.
        if elapsed > 0.02:
            return int(iterations / elapsed)
        iterations *= 2


def check_hash(name: str) -> None:
    """Raise OptionError for what this installation cannot compute."""
    if name not in DIGEST_BYTES or name not in hashlib.algorithms_available:
        raise OptionError(f"Hash algorithm '{name[:32]}' is not supported")
