"""`nbdclient list` and `nbdclient info`."""

from __future__ import annotations

import json
from argparse import Namespace

import trio

from drivers.errors import ProtocolError
from drivers.options.nbd_uri import NbdUri
from drivers.units import format_size
from drivers.wire.nbd.client_handshake import Export, ListedExport, RefusedError
from drivers.wire.nbd.constants import TransmissionFlag
from nbdclient import client

# The keys are nbdinfo's, so that scripts can read either.
_FLAG_KEYS = {
    "is_read_only": TransmissionFlag.READ_ONLY,
    "is_rotational": TransmissionFlag.ROTATIONAL,
    "can_block_status_payload": TransmissionFlag.BLOCK_STATUS_PAYLOAD,
    "can_cache": TransmissionFlag.SEND_CACHE,
    "can_df": TransmissionFlag.SEND_DF,
    "can_fast_zero": TransmissionFlag.SEND_FAST_ZERO,
    "can_flush": TransmissionFlag.SEND_FLUSH,
    "can_fua": TransmissionFlag.SEND_FUA,
    "can_multi_conn": TransmissionFlag.CAN_MULTI_CONN,
    "can_trim": TransmissionFlag.SEND_TRIM,
    "can_zero": TransmissionFlag.SEND_WRITE_ZEROES,
}


def run(arguments: Namespace) -> None:
    uri = client.parse(arguments.uri)
    if arguments.command == "info":
        export = trio.run(client.info, uri)
        if arguments.json:
            print(json.dumps(_as_json(export), indent=2))
        else:
            _print_export(export)
        return
    exports = trio.run(_exports, uri)
    if arguments.json:
        print(json.dumps({"exports": [_as_json(export) for export in exports]}, indent=2))
        return
    for listed in exports:
        size = f"\t{format_size(listed.size)}" if isinstance(listed, Export) else ""
        description = f"\t{_shown(listed.description)}" if listed.description else ""
        print(f"{_quoted(listed.name)}{size}{description}")


async def _exports(uri: NbdUri) -> list[Export] | list[ListedExport]:
    """Details where the server gives them; many old ones only list."""
    try:
        return await client.describe_exports(uri)
    except RefusedError as error:
        if error.option.name != "INFO":
            raise
    except ProtocolError:
        pass  # so broken by INFO that they hang up; LIST alone may still work
    return await client.list_exports(uri)


def _as_json(export: Export | ListedExport) -> dict[str, object]:
    found: dict[str, object] = {"export-name": export.name, "description": export.description}
    if isinstance(export, Export):
        found["export-size"] = export.size
        found["export-size-str"] = format_size(export.size)
        found["protocol"] = export.mode.value
        for key, flag in _FLAG_KEYS.items():
            found[key] = bool(export.flags & flag)
        found["block_size_advertised"] = export.advertised_blocks
        found["block_size_minimum"] = export.minimum_block
        found["block_size_preferred"] = export.preferred_block
        found["block_size_maximum"] = export.maximum_payload
        found["contexts"] = list(export.contexts)
    return found


def _print_export(export: Export) -> None:
    can = [key.partition("_")[2].replace("_", "-") for key, flag in _FLAG_KEYS.items() if export.flags & flag]
    blocks = f"minimum {export.minimum_block}, preferred {export.preferred_block}"
    defaults = "" if export.advertised_blocks else " (defaults: the server names none)"
    rows = [
        ("export", _quoted(export.name)),
        ("description", _shown(export.description)),
        ("size", f"{export.size} bytes ({format_size(export.size)})"),
        ("replies", export.mode.value),
        ("flags", ", ".join(can)),
        ("block sizes", f"{blocks}, maximum payload {export.maximum_payload}{defaults}"),
        ("contexts", ", ".join(_shown(name) for name in export.contexts)),
    ]
    for label, text in rows:
        if text:
            print(f"{label + ':':<13}{text}")


def _shown(text: str) -> str:
    """A server's text, without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _quoted(name: str) -> str:
    return f'"{_shown(name)}"'
