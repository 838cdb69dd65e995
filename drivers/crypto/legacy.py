"""The AES of the qcow format and of qcow2's first encryption method.

See QEMU's docs/interop/qcow2.txt, "Encryption". It is weak; it is here so that old images can be read.
"""

from __future__ import annotations

from drivers.crypto.cipher import SectorCipher

KEY_BYTES = 16


def aes_cipher(password: bytes) -> SectorCipher:
    """The first 16 bytes of the password are the key, padded with zeroes; a sector's IV is its
    number in the guest's disk. There is no way to tell a wrong password."""
    return SectorCipher("aes-128", "cbc", password[:KEY_BYTES].ljust(KEY_BYTES, b"\0"))
