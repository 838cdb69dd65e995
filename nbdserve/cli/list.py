"""nbdserve --list: what another server has to offer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from drivers.net.address import Address
from drivers.objects.store import ObjectStore
from drivers.wire.nbd.client_handshake import Export, ReplyMode, Wishes, describe_all
from drivers.wire.nbd.constants import TransmissionFlag
from nbdserve.settings import ListSettings

# qemu-nbd's names, in the order of the bits. HAS_FLAGS has none.
FLAG_NAMES = {
    TransmissionFlag.READ_ONLY: "readonly",
    TransmissionFlag.SEND_FLUSH: "flush",
    TransmissionFlag.SEND_FUA: "fua",
    TransmissionFlag.ROTATIONAL: "rotational",
    TransmissionFlag.SEND_TRIM: "trim",
    TransmissionFlag.SEND_WRITE_ZEROES: "zeroes",
    TransmissionFlag.SEND_DF: "df",
    TransmissionFlag.CAN_MULTI_CONN: "multi",
    TransmissionFlag.SEND_RESIZE: "resize",
    TransmissionFlag.SEND_CACHE: "cache",
    TransmissionFlag.SEND_FAST_ZERO: "fast-zero",
    TransmissionFlag.BLOCK_STATUS_PAYLOAD: "block-status-payload",
}


@dataclass(frozen=True, slots=True)
class ExportDescription:
    """One export as its server describes it. Sizes are in bytes; the three block sizes are 0 where
    the server does not tell them."""

    name: str
    description: str
    size: int
    flags: int
    min_block: int = 0
    opt_block: int = 0
    max_block: int = 0
    contexts: tuple[str, ...] = ()
    transaction_size: Literal["32-bit", "64-bit"] = "32-bit"


def list_exports(settings: ListSettings) -> int:
    """Print the exports of the server at settings.address; the exit status. Raises Error."""
    import trio

    ObjectStore.of(settings.objects)  # nothing uses one yet, but a mistake in one is told
    exports = trio.run(_ask, settings.address)
    if settings.json:
        print(as_json(exports))
    else:
        print(as_text(exports, verbose=settings.verbose), end="")
    return 0


async def _ask(address: Address) -> list[ExportDescription]:
    from drivers.net.stream import Stream
    from drivers.protocol.nbd.connection import perform

    stream = Stream(await address.connect())
    try:
        exports = await perform(stream, describe_all(Wishes()))
    finally:
        stream.close()
    return [_description(export) for export in exports]


def _description(export: Export) -> ExportDescription:
    blocks = (export.minimum_block, export.preferred_block, export.maximum_payload)
    minimum, preferred, maximum = blocks if export.advertised_blocks else (0, 0, 0)
    return ExportDescription(
        name=export.name,
        description=export.description,
        size=export.size,
        flags=int(export.flags),
        min_block=minimum,
        opt_block=preferred,
        max_block=maximum,
        contexts=tuple(export.contexts),
        transaction_size="64-bit" if export.mode is ReplyMode.EXTENDED else "32-bit",
    )


def as_text(exports: Sequence[ExportDescription], *, verbose: bool = False) -> str:
    """The list in the format of qemu-nbd 7.2; with `verbose` also the transaction size."""
    lines = [f"exports available: {len(exports)}"]
    for export in exports:
        lines.append(f" export: '{_printable(export.name)}'")
        if export.description:
            lines.append(f"  description: {_printable(export.description)}")
        if export.flags & TransmissionFlag.HAS_FLAGS:
            names = "".join(f" {name}" for name in flag_names(export.flags))
            lines.append(f"  size:  {export.size}")
            lines.append(f"  flags: 0x{export.flags:x} ({names} )")
        if export.min_block:
            lines.append(f"  min block: {export.min_block}")
            lines.append(f"  opt block: {export.opt_block}")
            lines.append(f"  max block: {export.max_block}")
        if verbose:
            lines.append(f"  transaction size: {export.transaction_size}")
        if export.contexts:
            lines.append(f"  available meta contexts: {len(export.contexts)}")
            lines += [f"   {_printable(context)}" for context in export.contexts]
    return "\n".join(lines) + "\n"


def as_json(exports: Sequence[ExportDescription]) -> str:
    """The list as a JSON object: "exports", each with the fields of ExportDescription, the flags
    both as the number and by name."""
    described = [{**asdict(export), "flag-names": flag_names(export.flags)} for export in exports]
    renamed = [{key.replace("_", "-"): value for key, value in one.items()} for one in described]
    return json.dumps({"exports": renamed}, indent=4)


def flag_names(flags: int) -> list[str]:
    return [name for flag, name in FLAG_NAMES.items() if flags & flag]


def _printable(text: str) -> str:
    """A peer's text without what could command the terminal."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)
