"""Numbers of the NBD protocol, under the specification's names (doc/proto.md of the NBD project)."""

from __future__ import annotations

from enum import IntEnum, IntFlag

DEFAULT_PORT = 10809

# --- handshake ------------------------------------------------------------------------------

NBD_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9


class HandshakeFlag(IntFlag):
    """Global flags of the server; the client answers with the same bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4  # withdrawn
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


ERROR_BIT = 1 << 31


class OptionReply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = ERROR_BIT + 1
    ERR_POLICY = ERROR_BIT + 2
    ERR_INVALID = ERROR_BIT + 3
    ERR_PLATFORM = ERROR_BIT + 4
    ERR_TLS_REQD = ERROR_BIT + 5
    ERR_UNKNOWN = ERROR_BIT + 6
    ERR_SHUTDOWN = ERROR_BIT + 7
    ERR_BLOCK_SIZE_REQD = ERROR_BIT + 8
    ERR_TOO_BIG = ERROR_BIT + 9
    ERR_EXT_HEADER_REQD = ERROR_BIT + 10


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


# --- transmission ---------------------------------------------------------------------------

REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C


class TransmissionFlag(IntFlag):
    """What an export can do, sent with its size."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8  # experimental; nobody implements it


class CommandFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


REPLY_FLAG_DONE = 1 << 0


class ReplyType(IntEnum):
    """Chunk types of structured and extended replies."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class WireError(IntEnum):
    """Error numbers on the wire: Linux's values, whatever the host is."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# --- metadata contexts ----------------------------------------------------------------------

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
DIRTY_BITMAP_PREFIX = "qemu:dirty-bitmap:"
# What a listing may ask for to get all below it. Names of bitmaps may have colons, too.
NAMESPACES = ("base:", "qemu:", DIRTY_BITMAP_PREFIX)


class AllocationState(IntFlag):
    """Status bits of base:allocation."""

    HOLE = 1 << 0
    ZERO = 1 << 1


# The status bit of a dirty bitmap's context.
DIRTY = 1 << 0


# --- limits ---------------------------------------------------------------------------------

MAX_STRING = 4096  # names, descriptions, error texts, context names
MAX_PAYLOAD = 32 << 20  # what every server must take without prior agreement
MAX_OPTION_PAYLOAD = 32 << 20  # far above any sensible option; more ends the connection
MAX_EXTENTS = 131072  # descriptors of one context in a reply: 1 MiB of them
