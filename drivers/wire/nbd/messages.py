"""The fixed layouts of the protocol, shared by both sides. All integers are big-endian."""

from __future__ import annotations

from struct import Struct

# Handshake.
GREETING = Struct(">QQH")  # NBD_MAGIC, OPTION_MAGIC, handshake flags
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")  # OPTION_MAGIC, option, length
OPTION_REPLY = Struct(">QIII")  # OPTION_REPLY_MAGIC, option, reply type, length
EXPORT_NAME_REPLY = Struct(">QH")  # size, flags; then 124 zeroes unless NO_ZEROES
OLDSTYLE_REPLY = Struct(">QI")  # size, flags (the upper half unused); then 124 zeroes
INFO_EXPORT = Struct(">HQH")  # Info.EXPORT, size, flags
INFO_BLOCK_SIZE = Struct(">HIII")  # Info.BLOCK_SIZE, minimum, preferred, maximum payload
U16 = Struct(">H")
U32 = Struct(">I")
EXPORT_NAME_PADDING = bytes(124)

# Transmission.
REQUEST = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
EXTENDED_REQUEST = Struct(">IHHQQQ")
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY = Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_REPLY = Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
OFFSET = Struct(">Q")
HOLE = Struct(">QI")  # offset, length
ERROR = Struct(">IH")  # error, length of the message
EXTENT = Struct(">II")  # length, status
EXTENDED_EXTENT = Struct(">QQ")
STATUS_HEADER = Struct(">I")  # context id
EXTENDED_STATUS_HEADER = Struct(">II")  # context id, count of extents


def bounded_text(data: bytes, limit: int = 4096) -> str:
    """A string of a peer for showing to people: cut to `limit` bytes, bad UTF-8 replaced."""
    return data[:limit].decode("utf-8", "replace")
