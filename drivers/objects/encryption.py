"""The options that say how an image is encrypted, for the luks format and for qcow2's `encrypt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from drivers.crypto.cipher import ALGORITHMS, IV_GENERATORS
from drivers.crypto.gcrypt import MODES
from drivers.crypto.hashes import DIGEST_BYTES
from drivers.crypto.luks.layout import SLOTS, STRIPES, Format, Header
from drivers.crypto.luks.volume import DEFAULT_ITER_TIME, Volume
from drivers.errors import OptionError
from drivers.objects.secret import password
from drivers.objects.store import ObjectStore
from drivers.options.schema import Options, Value


@dataclass(frozen=True, slots=True)
class NewEncryption:
    """How a new LUKS volume is to be. `key_secret` names the secret with its password; `iter_time`
    is in milliseconds."""

    key_secret: str | None
    format: Format = field(default_factory=Format)
    iter_time: int = DEFAULT_ITER_TIME


def password_of(key_secret: str | None, objects: ObjectStore, *, prefix: str = "") -> bytes:
    """The password that the option `key-secret` names; `prefix` is what the user writes before that.
    Raises OptionError."""
    if not key_secret:
        raise OptionError(f"Parameter '{prefix}key-secret' is required for cipher")
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


def _choice(options: Options, key: str, values: Iterable[str], default: str | None = None) -> str:
    value = options.string(key, default)
    if value is None:
        raise OptionError(f"Parameter '{key}' is missing")
    if value not in values:
        raise OptionError(f"Parameter '{key}' does not accept value '{value}'")
    return value


def describe(header: Header) -> Mapping[str, Value]:
    """What `info` tells of a LUKS volume, here or inside a qcow2 image."""
    format = header.format
    slots: list[Value] = []
    for slot in header.slots:
        found: dict[str, Value] = {"active": slot.active}
        if slot.active:
            found["iters"] = slot.iterations
        found["key-offset"] = slot.offset
        if slot.active:
            found["stripes"] = STRIPES
        slots.append(found)
    return {
        "ivgen-alg": format.iv_generator,
        "hash-alg": format.hash_name,
        "cipher-alg": format.algorithm,
        "uuid": header.uuid,
        **({"ivgen-hash-alg": format.iv_hash} if format.iv_generator == "essiv" else {}),
        "cipher-mode": format.mode,
        "slots": slots,
        "payload-offset": header.payload_offset,
        "master-key-iters": header.digest_iterations,
    }


async def amend_slots(volume: Volume, options: Options, objects: ObjectStore, *, force: bool = False) -> None:
    """Add a password to `volume`, or erase some, as `options` say: state, keyslot, new-secret,
    old-secret, iter-time. Without `force` at least one password stays. Raises OptionError."""
    state = _choice(options, "state", ("active", "inactive"))
    keyslot = options.integer("keyslot", None)
    new, old = options.string("new-secret", None), options.string("old-secret", None)
    iter_time = options.integer("iter-time", DEFAULT_ITER_TIME)
    if keyslot is not None and keyslot >= SLOTS:
        raise OptionError(f"Invalid keyslot {keyslot} specified, must be between 0 and {SLOTS - 1}")
    if state == "active":
        if new is None:
            raise OptionError("'new-secret' is required to activate a keyslot")
        if old is not None:
            raise OptionError("'old-secret' must not be given when activating keyslots")
        await _activate(volume, keyslot, password(objects, new), iter_time, force=force)
        return
    if new is not None:
        raise OptionError("'new-secret' must not be given when erasing keyslots")
    old_password = None if old is None else password(objects, old)
    if keyslot is not None:
        await _erase_slot(volume, keyslot, old_password, force=force)
    elif old_password is not None:
        await _erase_password(volume, old_password, force=force)
    else:
        raise OptionError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained "
            "in them must be given"
        )


async def _activate(
    volume: Volume, keyslot: int | None, new_password: bytes, iter_time: int, *, force: bool
) -> None:
    if keyslot is None:
        keyslot = volume.free_slot()
        if keyslot is None:
            raise OptionError("Can't add a keyslot - all keyslots are in use")
    elif volume.header.slots[keyslot].active and not force:
        raise OptionError(f"Refusing to overwrite active keyslot {keyslot} - please erase it first")
    await volume.set_slot(keyslot, new_password, iter_time)


async def _erase_slot(volume: Volume, keyslot: int, old_password: bytes | None, *, force: bool) -> None:
    if old_password is not None and keyslot not in await volume.slots_of(old_password):
        raise OptionError(
            f"Given keyslot {keyslot} doesn't contain the given old password for erase operation"
        )
    if not volume.header.slots[keyslot].active and not force:
        raise OptionError(f"Given keyslot {keyslot} is already erased (inactive) ")
    if _active(volume) == [keyslot] and not force:
        raise OptionError(
            f"Attempt to erase the only active keyslot {keyslot} which will erase all the data in the "
            "image irreversibly - refusing operation"
        )
    await volume.erase_slot(keyslot)


async def _erase_password(volume: Volume, old_password: bytes, *, force: bool) -> None:
    matching = await volume.slots_of(old_password)
    if not matching:
        raise OptionError("No keyslots match given (old) password for erase operation")
    if matching == _active(volume) and not force:
        raise OptionError(
            "All the active keyslots match the (old) password that was given and erasing them will "
            "erase all the data in the image irreversibly - refusing operation"
        )
    for index in matching:
        await volume.erase_slot(index)


def _active(volume: Volume) -> list[int]:
    return [index for index, slot in enumerate(volume.header.slots) if slot.active]
