"""The object type `secret`: a password or a key, given in clear or wrapped in another secret."""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from typing import ClassVar

from drivers.errors import OptionError
from drivers.objects.store import ObjectStore
from drivers.options.schema import Options

# No password is so long; a file of more is another file than was meant.
MAX_FILE = 1 << 20

_KEY_BYTES = 32
_BLOCK_BYTES = 16
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/=\n]")


class Secret:
    """`value` in clear."""

    properties: ClassVar[Mapping[str, str]] = {
        "data": "string",
        "file": "string",
        "format": "QCryptoSecretFormat",
        "iv": "string",
        "keyid": "string",
    }

    def __init__(self, value: bytes) -> None:
        self.value = value

    @classmethod
    def create(cls, store: ObjectStore, options: Options, /) -> Secret:
        data, path = _text(options, "data"), _text(options, "file")
        format = _text(options, "format") or "raw"
        key_name, iv = _text(options, "keyid"), _text(options, "iv")
        if format not in ("raw", "base64"):
            raise OptionError(f"Parameter 'format' does not accept value '{format}'")
        if data is not None and path is not None:
            raise OptionError("'file' and 'data' are mutually exclusive")
        if data is None and path is None:
            raise OptionError("Either 'file' or 'data' must be provided")
        value = _read(path) if path is not None else (data or "").encode(errors="surrogateescape")
        if key_name is not None:
            key = secret(store, key_name)
            return cls(_unwrapped(value if format == "raw" else _base64(value), key, iv))
        return cls(value if format == "raw" else _base64(value))


def secret(store: ObjectStore, name: str) -> bytes:
    """The content of the secret `name`. Raises OptionError."""
    found = store.get(name, Secret)
    if found is None:
        raise OptionError(f"No secret with id '{name}'")
    return found.value


def password(store: ObjectStore, name: str) -> bytes:
    """The content of the secret `name`, which must be text. Raises OptionError."""
    value = secret(store, name)
    try:
        value.decode()
    except UnicodeDecodeError:
        raise OptionError(f"Data from secret {name} is not valid UTF-8") from None
    return value


def _text(options: Options, key: str) -> str | None:
    if key not in options:
        return None
    try:
        return options.string(key)
    except OptionError:
        raise OptionError(f"Invalid parameter type for '{key}', expected: string") from None


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"Unable to read {path}: {reason}") from None
    if len(content) > MAX_FILE:
        raise OptionError(f"Unable to read {path}: it is larger than {MAX_FILE} bytes")
    return content


def _base64(data: bytes) -> bytes:
    if b"\0" in data:
        raise OptionError("Base64 data contains embedded NUL characters")
    if _NOT_BASE64.search(data):
        raise OptionError("Base64 data contains invalid characters")
    digits = data.replace(b"\n", b"")
    # What is left over behind the last whole group of four means nothing.
    try:
        return binascii.a2b_base64(digits[: len(digits) // 4 * 4])
    except binascii.Error:
        raise OptionError("Base64 data contains invalid characters") from None


def _unwrapped(data: bytes, key: bytes, iv: str | None) -> bytes:
    """`data` decrypted by AES-256-CBC, its PKCS#7 padding taken off."""
    if iv is None:
        raise OptionError("IV is required to decrypt secret")
    raw_iv = _base64(iv.encode(errors="surrogateescape"))
    if len(raw_iv) != _BLOCK_BYTES:
        raise OptionError(f"IV should be {_BLOCK_BYTES} bytes in length not {len(raw_iv)}")
    if len(key) != _KEY_BYTES:
        raise OptionError(f"Key should be {_KEY_BYTES} bytes in length")
    if len(data) % _BLOCK_BYTES:
        raise OptionError(f"Length {len(data)} must be a multiple of block size {_BLOCK_BYTES}")
    if not data:
        return b""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes  # not needed for most

    decryptor = Cipher(algorithms.AES(key), modes.CBC(raw_iv)).decryptor()
    clear = decryptor.update(data) + decryptor.finalize()
    padding = clear[-1]
    if padding > _BLOCK_BYTES:
        raise OptionError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return clear[: len(clear) - padding]
