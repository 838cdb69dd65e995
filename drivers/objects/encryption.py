"""The options that say how an image is encrypted, for the luks format and for qcow2's `encrypt`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from drivers.crypto.cipher import ALGORITHMS, IV_GENERATORS
from drivers.crypto.gcrypt import MODES
from drivers.crypto.hashes import DIGEST_BYTES
from drivers.crypto.luks.layout import Format
from drivers.crypto.luks.volume import DEFAULT_ITER_TIME
from drivers.errors import OptionError
from drivers.objects.secret import password
from drivers.objects.store import ObjectStore
from drivers.options.schema import Options


@dataclass(frozen=True, slots=True)
class NewEncryption:
    """How a new LUKS volume is to be. `key_secret` names the secret with its password; `iter_time`
    is in milliseconds."""

    format: Format
    key_secret: str | None
    iter_time: int


def take_password(options: Options, objects: ObjectStore) -> bytes:
    """The password that the option `key-secret` names. Raises OptionError."""
    return required_password(options.string("key-secret", None), objects)


def required_password(key_secret: str | None, objects: ObjectStore) -> bytes:
    if not key_secret:
        raise OptionError("Parameter 'key-secret' is required for cipher")
    return password(objects, key_secret)


def take_encryption(options: Options) -> NewEncryption:
    """The options that LUKS's create() takes. Raises OptionError."""
    defaults = Format()
    format = Format(
        algorithm=_choice(options, "cipher-alg", (*ALGORITHMS, "des", "3des"), defaults.algorithm),
        mode=_choice(options, "cipher-mode", MODES, defaults.mode),
        iv_generator=_choice(options, "ivgen-alg", IV_GENERATORS, defaults.iv_generator),
        iv_hash=_choice(options, "ivgen-hash-alg", DIGEST_BYTES, defaults.iv_hash),
        hash_name=_choice(options, "hash-alg", DIGEST_BYTES, defaults.hash_name),
    )
    format.check()
    return NewEncryption(
        format=format,
        key_secret=options.string("key-secret", None),
        iter_time=options.integer("iter-time", DEFAULT_ITER_TIME),
    )


def _choice(options: Options, key: str, values: Iterable[str], default: str) -> str:
    value = options.string(key, default)
    if value not in values:
        raise OptionError(f"Parameter '{key}' does not accept value '{value}'")
    return value
