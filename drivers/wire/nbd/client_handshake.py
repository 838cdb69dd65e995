"""The client's half of the handshake: from the server's greeting to an export, or to a listing.

Generators of steps (see steps.py) without I/O. Every error is a ProtocolError; where the server
answered an option with an error reply it is a RefusedError, and option haggling may go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from struct import Struct

from drivers.errors import OptionError, ProtocolError
from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import (
    BASE_ALLOCATION,
    ERROR_BIT,
    MAX_PAYLOAD,
    MAX_STRING,
    NBD_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from drivers.wire.nbd.messages import U16, U32, bounded_text
from drivers.wire.nbd.steps import Handshake, Receive, Send

MAX_EXPORTS = 10_000  # in one listing
MAX_CONTEXTS = 1024  # in one answer
MAX_INFOS = 64  # about one export
MAX_REPLY = 64 << 10  # bytes of one option reply: two strings and change
MAX_MINIMUM_BLOCK = 64 << 10

_INFO_REQUESTS = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)

_REFUSALS = {
    OptionReply.ERR_UNSUP: "the server does not support {option}",
    OptionReply.ERR_POLICY: "the server's policy forbids {option}",
    OptionReply.ERR_INVALID: "the server finds {option} invalid",
    OptionReply.ERR_PLATFORM: "the server's platform lacks {option}",
    OptionReply.ERR_TLS_REQD: "the server requires TLS",
    OptionReply.ERR_UNKNOWN: "Requested export not available",
    OptionReply.ERR_SHUTDOWN: "the server is shutting down",
    OptionReply.ERR_BLOCK_SIZE_REQD: "the server requires the client to obey its block sizes",
    OptionReply.ERR_TOO_BIG: "the server finds {option} too large",
    OptionReply.ERR_EXT_HEADER_REQD: "the server requires extended headers",
}


class RefusedError(ProtocolError):
    """The server answered `option` with the error `reply` (an OptionReply, if it is a known one)."""

    def __init__(self, option: Option, reply: int, text: bytes) -> None:
        message = _REFUSALS.get(
            reply,  # type: ignore[call-overload]
            f"the server answered {{option}} with the unknown error {reply - ERROR_BIT}",
        ).format(option=option.name)
        if text:
            message += f" (server reported: {bounded_text(text)})"
        super().__init__(message)
        self.option = option
        self.reply = reply


class ReplyMode(Enum):
    """How the server answers requests."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the client would like; it takes what the server has. `contexts` are queries."""

    export: str = ""
    extended: bool = True
    structured: bool = True
    contexts: Sequence[str] = (BASE_ALLOCATION,)
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Export:
    """What the server says about an export. Sizes are bytes.

    `name` is the canonical one if the server sent one. The block sizes are the specification's
    defaults where it sent none (`advertised_blocks` tells). `contexts`: name to id; after a listing
    the ids mean nothing.
    """

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD
    advertised_blocks: bool = False
    contexts: dict[str, int] = field(default_factory=dict)
    mode: ReplyMode = ReplyMode.SIMPLE


@dataclass(frozen=True, slots=True)
class ListedExport:
    name: str
    description: str = ""


class ClientHandshake:
    """The option haggling of one connection. greet() comes first; go() or abort() ends it.

    After greet(), `oldstyle` holds the one export of a server that negotiates nothing, and `fixed`
    tells whether options can be used.
    """

    def __init__(self) -> None:
        self.oldstyle: Export | None = None
        self.fixed = False
        self.mode = ReplyMode.SIMPLE
        self._no_zeroes = False

    def greet(self) -> Handshake[None]:
        magic = int.from_bytes((yield Receive(8)), "big")
        if magic != NBD_MAGIC:
            raise ProtocolError("this is not an NBD server: it greets with other bytes")
        magic = int.from_bytes((yield Receive(8)), "big")
        if magic == OLDSTYLE_MAGIC:
            size, flags = messages.OLDSTYLE_REPLY.unpack((yield Receive(messages.OLDSTYLE_REPLY.size)))
            yield Receive(len(messages.EXPORT_NAME_PADDING))
            if flags >> 16:
                raise ProtocolError(f"the server sent unexpected export flags {flags:#x}")
            self.oldstyle = Export("", checked_size(size), TransmissionFlag(flags))
            return
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"the server greets with an unknown protocol, {magic:#x}")
        (flags,) = U16.unpack((yield Receive(2)))
        self.fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        answer = flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        yield Send(messages.CLIENT_FLAGS.pack(answer))

    def choose_mode(self, *, extended: bool, structured: bool) -> Handshake[None]:
        """Have the best kind of replies that is wished for and offered."""
        if extended and (yield from self._offer(Option.EXTENDED_HEADERS)):
            self.mode = ReplyMode.EXTENDED
        elif structured and (yield from self._offer(Option.STRUCTURED_REPLY)):
            self.mode = ReplyMode.STRUCTURED

    def list_exports(self) -> Handshake[list[ListedExport]]:
        if not self.fixed:
            raise ProtocolError("the server is too old to list its exports")
        yield _option(Option.LIST)
        exports: list[ListedExport] = []
        while True:
            reply, data = yield from self._reply(Option.LIST)
            if reply == OptionReply.ACK:
                return exports
            if reply != OptionReply.SERVER:
                raise _unexpected(Option.LIST, reply)
            if len(exports) == MAX_EXPORTS:
                raise ProtocolError(f"the server lists more than {MAX_EXPORTS} exports")
            length = _leading(U32, data, "an export's name")
            if length > len(data) - 4:
                raise ProtocolError("the server lists an export whose name is longer than the reply")
            name, description = data[4 : 4 + length], data[4 + length :]
            exports.append(
                ListedExport(_string(name, "an export's name"), bounded_text(_bounded(description)))
            )

    def list_contexts(self, export: str, queries: Sequence[str] = ()) -> Handshake[list[str]]:
        """The metadata contexts that match `queries`, all without queries. Needs structured or
        extended replies."""
        found = yield from self._contexts(Option.LIST_META_CONTEXT, export, queries)
        return [name for _, name in found]

    def set_contexts(self, export: str, queries: Sequence[str]) -> Handshake[dict[str, int]]:
        """Select contexts for the go() to come; the ids of those the server has, by name."""
        found = yield from self._contexts(Option.SET_META_CONTEXT, export, queries)
        ids = {name: context for context, name in found}
        if not len(set(ids.values())) == len(ids) == len(found):
            raise ProtocolError("the server selected a metadata context twice")
        return ids

    def info(self, export: str) -> Handshake[Export]:
        return (yield from self._export(Option.INFO, export))

    def go(self, export: str) -> Handshake[Export]:
        """Enter transmission; by EXPORT_NAME where the server knows nothing better."""
        if self.fixed:
            try:
                return (yield from self._export(Option.GO, export))
            except RefusedError as error:
                if error.reply != OptionReply.ERR_UNSUP:
                    raise
            if self.mode is ReplyMode.EXTENDED:
                raise ProtocolError("the server has extended headers but no NBD_OPT_GO")
        yield _option(Option.EXPORT_NAME, _name(export))
        try:
            answer = yield Receive(messages.EXPORT_NAME_REPLY.size)
        except ProtocolError as error:
            raise ProtocolError(f"the server refused the export '{export[:80]}': {error}") from None
        size, flags = messages.EXPORT_NAME_REPLY.unpack(answer)
        if not self._no_zeroes:
            yield Receive(len(messages.EXPORT_NAME_PADDING))
        return Export(export, checked_size(size), TransmissionFlag(flags), mode=self.mode)

    def abort(self) -> Handshake[None]:
        """Leave politely. The answer is not waited for: many servers just close."""
        if self.fixed:
            yield _option(Option.ABORT)

    # --- parts ------------------------------------------------------------------------------

    def _reply(self, option: Option) -> Handshake[tuple[int, bytes]]:
        """The next reply to `option` and its payload. Raises RefusedError for error replies."""
        header = yield Receive(messages.OPTION_REPLY.size)
        magic, echoed, reply, length = messages.OPTION_REPLY.unpack(header)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"the server's option reply has the wrong magic {magic:#x}")
        if echoed != option:
            raise ProtocolError(f"the server answered option {echoed} instead of {option.name}")
        if length > MAX_REPLY:
            raise ProtocolError(f"the server's reply to {option.name} is too large: {length} bytes")
        data = (yield Receive(length)) if length else b""
        if reply & ERROR_BIT:
            raise RefusedError(option, reply, data)
        if reply == OptionReply.ACK and length:
            raise ProtocolError(f"the server's acknowledgement of {option.name} carries data")
        return reply, data

    def _offer(self, option: Option) -> Handshake[bool]:
        """Ask for an option without data; whether the server agreed."""
        yield _option(option)
        try:
            reply, _ = yield from self._reply(option)
        except RefusedError as error:
            if error.reply in (OptionReply.ERR_TLS_REQD, OptionReply.ERR_SHUTDOWN):
                raise
            return False
        if reply != OptionReply.ACK:
            raise _unexpected(option, reply)
        return True

    def _contexts(
        self, option: Option, export: str, queries: Sequence[str]
    ) -> Handshake[list[tuple[int, str]]]:
        name = _name(export)
        parts = [U32.pack(len(name)), name, U32.pack(len(queries))]
        for query in queries:
            data = query.encode()
            if len(data) > MAX_STRING:
                raise OptionError(f"a metadata context's name is longer than {MAX_STRING} bytes")
            parts += [U32.pack(len(data)), data]
        yield _option(option, b"".join(parts))
        found: list[tuple[int, str]] = []
        while True:
            reply, data = yield from self._reply(option)
            if reply == OptionReply.ACK:
                return found
            if reply != OptionReply.META_CONTEXT:
                raise _unexpected(option, reply)
            if len(found) == MAX_CONTEXTS:
                raise ProtocolError(f"the server has more than {MAX_CONTEXTS} metadata contexts")
            context = _leading(U32, data, "a metadata context")
            found.append((context, _string(data[4:], "a metadata context's name")))

    def _export(self, option: Option, export: str) -> Handshake[Export]:
        name = _name(export)
        requests = b"".join(U16.pack(item) for item in _INFO_REQUESTS)
        yield _option(option, U32.pack(len(name)) + name + U16.pack(len(_INFO_REQUESTS)) + requests)
        result = Export(export, -1, TransmissionFlag(0), mode=self.mode)
        seen: set[int] = set()
        for _ in range(MAX_INFOS + 1):
            reply, data = yield from self._reply(option)
            if reply == OptionReply.ACK:
                if Info.EXPORT not in seen:
                    raise ProtocolError(f"the server's answer to {option.name} lacks the export's size")
                return result
            if reply != OptionReply.INFO:
                raise _unexpected(option, reply)
            kind = _leading(U16, data, "an export's information")
            parse = _INFO_PARSERS.get(kind)
            if parse is None:
                continue
            if kind in seen:
                raise ProtocolError(f"the server sent {Info(kind).name} twice for one export")
            seen.add(kind)
            result = parse(result, data)
        raise ProtocolError(f"the server sent more than {MAX_INFOS} pieces of information on an export")


def open_export(wishes: Wishes) -> Handshake[Export]:
    """From the first byte to transmission."""
    if wishes.tls:
        raise OptionError("TLS is not supported yet")
    haggling = ClientHandshake()
    yield from haggling.greet()
    if haggling.oldstyle is not None:
        if wishes.export:
            raise ProtocolError("the server speaks the oldstyle protocol, which has no export names")
        return haggling.oldstyle
    contexts: dict[str, int] = {}
    if haggling.fixed:
        yield from haggling.choose_mode(extended=wishes.extended, structured=wishes.structured)
        if wishes.contexts and haggling.mode is not ReplyMode.SIMPLE:
            try:
                contexts = yield from haggling.set_contexts(wishes.export, wishes.contexts)
            except RefusedError:
                contexts = {}  # what is really wrong, GO will tell
    export = yield from haggling.go(wishes.export)
    return replace(export, contexts=contexts)


def describe_export(wishes: Wishes) -> Handshake[Export]:
    """All that can be known of an export; its contexts are those on offer. A server that is too
    old for INFO tells only by entering transmission."""
    haggling = yield from _greeted(wishes)
    if haggling.oldstyle is not None:
        return haggling.oldstyle
    if haggling.fixed:
        try:
            export = yield from _described(haggling, wishes.export)
        except RefusedError as error:
            if error.reply != OptionReply.ERR_UNSUP:
                raise
        else:
            yield from haggling.abort()
            return export
    return (yield from haggling.go(wishes.export))


def list_exports(wishes: Wishes) -> Handshake[list[ListedExport]]:
    """The exports that the server cares to list."""
    haggling = yield from _greeted(wishes)
    if haggling.oldstyle is not None:
        return [ListedExport("")]
    exports = yield from haggling.list_exports()
    yield from haggling.abort()
    return exports


def describe_all(wishes: Wishes) -> Handshake[list[Export]]:
    """describe_export() for every export that the server lists, over one connection."""
    haggling = yield from _greeted(wishes)
    if haggling.oldstyle is not None:
        return [haggling.oldstyle]
    exports: list[Export] = []
    for listed in (yield from haggling.list_exports()):
        export = yield from _described(haggling, listed.name)
        exports.append(replace(export, description=export.description or listed.description))
    yield from haggling.abort()
    return exports


def _greeted(wishes: Wishes) -> Handshake[ClientHandshake]:
    if wishes.tls:
        raise OptionError("TLS is not supported yet")
    haggling = ClientHandshake()
    yield from haggling.greet()
    if haggling.oldstyle is None and haggling.fixed:
        yield from haggling.choose_mode(extended=wishes.extended, structured=wishes.structured)
    return haggling


def _described(haggling: ClientHandshake, name: str) -> Handshake[Export]:
    export = yield from haggling.info(name)
    if haggling.mode is ReplyMode.SIMPLE:
        return export
    try:
        contexts = yield from haggling.list_contexts(name)
    except RefusedError:
        return export
    return replace(export, contexts=dict.fromkeys(contexts, 0))


def _option(option: Option, data: bytes = b"") -> Send:
    return Send(messages.OPTION.pack(OPTION_MAGIC, option, len(data)) + data)


def _name(export: str) -> bytes:
    name = export.encode()
    if len(name) > MAX_STRING:
        raise OptionError(f"the export name is longer than {MAX_STRING} bytes")
    return name


def _leading(layout: Struct, data: bytes, what: str) -> int:
    if len(data) < layout.size:
        raise ProtocolError(f"the server's reply about {what} is too short")
    (number,) = layout.unpack_from(data)
    return int(number)


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_STRING:
        raise ProtocolError(f"the server sent a string of more than {MAX_STRING} bytes")
    return data


def _string(data: bytes, what: str) -> str:
    """A name that may be sent back: unlike mere text it must be exact."""
    try:
        return _bounded(data).decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"the server sent {what} that is not UTF-8") from None


def _unexpected(option: Option, reply: int) -> ProtocolError:
    return ProtocolError(f"the server sent an unexpected reply to {option.name}, of type {reply}")


def checked_size(size: int) -> int:
    if size >= 1 << 63:
        raise ProtocolError(f"the server's export has an impossible size, {size} bytes")
    return size


def _parse_size(export: Export, data: bytes) -> Export:
    if len(data) != messages.INFO_EXPORT.size:
        raise ProtocolError("the server's INFO_EXPORT has the wrong length")
    _, size, flags = messages.INFO_EXPORT.unpack(data)
    return replace(export, size=checked_size(size), flags=TransmissionFlag(flags))


def _parse_blocks(export: Export, data: bytes) -> Export:
    if len(data) != messages.INFO_BLOCK_SIZE.size:
        raise ProtocolError("the server's INFO_BLOCK_SIZE has the wrong length")
    _, minimum, preferred, maximum = messages.INFO_BLOCK_SIZE.unpack(data)
    for what, block in (("minimum", minimum), ("preferred", preferred)):
        if not block or block & (block - 1):
            raise ProtocolError(f"the server's {what} block size {block} is not a power of 2")
    if minimum > MAX_MINIMUM_BLOCK:
        raise ProtocolError(f"the server's minimum block size {minimum} is over {MAX_MINIMUM_BLOCK}")
    if not minimum <= preferred <= maximum:
        raise ProtocolError(
            f"the server's block sizes contradict each other: {minimum}, {preferred}, {maximum}"
        )
    return replace(
        export,
        minimum_block=minimum,
        preferred_block=preferred,
        maximum_payload=maximum,
        advertised_blocks=True,
    )


def _parse_name(export: Export, data: bytes) -> Export:
    return replace(export, name=_string(data[2:], "an export's name"))


def _parse_description(export: Export, data: bytes) -> Export:
    return replace(export, description=bounded_text(_bounded(data[2:])))


_INFO_PARSERS: dict[int, Callable[[Export, bytes], Export]] = {
    Info.EXPORT: _parse_size,
    Info.NAME: _parse_name,
    Info.DESCRIPTION: _parse_description,
    Info.BLOCK_SIZE: _parse_blocks,
}
