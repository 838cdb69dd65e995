"""The server's side of the newstyle handshake (proto.md, "Fixed newstyle negotiation").

Whatever the client sends, the machine answers, or raises ProtocolError: the stream cannot be kept
in step, or the client asked for what ends a session.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from drivers.errors import ProtocolError
from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import (
    BASE_ALLOCATION,
    MAX_OPTION_PAYLOAD,
    MAX_STRING,
    NAMESPACES,
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from drivers.wire.nbd.steps import Handshake, Receive, Send, Step

# Payloads up to here are looked at; longer ones, up to MAX_OPTION_PAYLOAD, are skipped and refused.
MAX_KEPT_PAYLOAD = 64 << 10

# An int: the complement of an IntFlag knows only the bits that have names.
_KNOWN_HANDSHAKE_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client may learn of an export. Sizes in bytes; `flags` as they are without the ones
    that depend on the negotiation (SEND_DF, BLOCK_STATUS_PAYLOAD)."""

    name: str
    size: int
    flags: TransmissionFlag
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = 32 << 20
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)


class ExportTable(Protocol):
    """The exports that this client may see."""

    def listed(self) -> Iterable[tuple[str, str]]:
        """Name and description of each."""
        ...

    def find(self, name: str) -> ExportInfo | None: ...


@dataclass(slots=True)
class Session:
    """The outcome of a handshake. `contexts` maps the ids on the wire to names.

    `minimum_block` is what the client must keep to: 1 if it never heard of block sizes.
    """

    export: ExportInfo
    flags: TransmissionFlag
    structured: bool = False
    extended: bool = False
    contexts: dict[int, str] = field(default_factory=dict)
    minimum_block: int = 1


class _Refused(Exception):
    """An option that is answered with an error; the handshake goes on."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        self.reply = reply
        self.message = message


class ServerHandshake:
    """One client's negotiation. run() is the generator; everything else is its state."""

    def __init__(self, table: ExportTable) -> None:
        self._table = table
        self._no_zeroes = False
        self._fixed = False
        self._structured = False
        self._extended = False
        self._contexts: dict[int, str] = {}
        self._contexts_of = ""  # the export that they were chosen for

    def run(self) -> Handshake[Session | None]:
        """Returns the session, or None where the client left with ABORT."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        yield Send(messages.GREETING.pack(NBD_MAGIC, OPTION_MAGIC, flags))
        (answer,) = messages.CLIENT_FLAGS.unpack((yield Receive(messages.CLIENT_FLAGS.size)))
        if answer & ~_KNOWN_HANDSHAKE_FLAGS:
            raise ProtocolError(f"unknown client flags {answer:#x}")
        self._fixed = bool(answer & HandshakeFlag.FIXED_NEWSTYLE)
        self._no_zeroes = bool(answer & HandshakeFlag.NO_ZEROES)
        while True:
            magic, option, length = messages.OPTION.unpack((yield Receive(messages.OPTION.size)))
            if magic != OPTION_MAGIC:
                raise ProtocolError(f"bad option magic {magic:#x}")
            if length > MAX_OPTION_PAYLOAD:
                raise ProtocolError(f"option {option} with {length} bytes of data")
            if option == Option.EXPORT_NAME:
                return (yield from self._export_name(length))
            if not self._fixed:
                raise ProtocolError(f"option {option} from a client that does not know fixed newstyle")
            if length > MAX_KEPT_PAYLOAD:
                yield from _skip(length)
                yield _error(option, OptionReply.ERR_TOO_BIG, "the option's data is too long")
                continue
            data = (yield Receive(length)) if length else b""
            if option == Option.ABORT:
                yield _reply(option, OptionReply.ACK)
                return None
            try:
                session = yield from self._option(option, data)
            except _Refused as refusal:
                yield _error(option, refusal.reply, refusal.message)
            else:
                if session is not None:
                    return session

    # --- options ----------------------------------------------------------------------------

    def _option(self, option: int, data: bytes) -> Generator[Step, bytes, Session | None]:
        handler = _HANDLERS.get(option)
        if handler is None:
            raise _Refused(OptionReply.ERR_UNSUP, f"Unsupported option {option}")
        if option in _WITHOUT_DATA and data:
            raise _Refused(OptionReply.ERR_INVALID, f"option {_name(option)} should have zero length")
        return (yield from handler(self, option, data))

    def _export_name(self, length: int) -> Generator[Step, bytes, Session]:
        """The one option that cannot report an error: it can only end the session."""
        if self._extended:
            raise ProtocolError("EXPORT_NAME after extended headers were negotiated")
        if length > MAX_STRING:
            raise ProtocolError("the export name is too long")
        name = _text((yield Receive(length)) if length else b"")
        info = None if name is None else self._table.find(name)
        if info is None:
            raise ProtocolError(f"export '{name}' not present")
        session = self._session(info, minimum_block=1)
        yield Send(
            messages.EXPORT_NAME_REPLY.pack(info.size, session.flags)
            + (b"" if self._no_zeroes else messages.EXPORT_NAME_PADDING)
        )
        return session

    def _list(self, option: int, data: bytes) -> Generator[Step, bytes, None]:
        for name, description in self._table.listed():
            encoded = name.encode()
            payload = messages.U32.pack(len(encoded)) + encoded + description.encode()
            yield _reply(option, OptionReply.SERVER, payload)
        yield _reply(option, OptionReply.ACK)

    def _starttls(self, option: int, data: bytes) -> Generator[Step, bytes, None]:
        raise _Refused(OptionReply.ERR_POLICY, "TLS not configured")
        yield

    def _info_or_go(self, option: int, data: bytes) -> Generator[Step, bytes, Session | None]:
        name, rest = _take_name(data)
        if len(rest) < 2 or len(rest) != 2 + 2 * messages.U16.unpack_from(rest)[0]:
            raise _Refused(OptionReply.ERR_INVALID, "the list of information requests is malformed")
        wanted = {request for (request,) in messages.U16.iter_unpack(rest[2:])}
        info = self._find(name)
        # A client that does not ask for block sizes is not held to them; but one that only looks
        # (INFO) shall see them as they are.
        aware = Info.BLOCK_SIZE in wanted
        minimum = info.minimum_block if aware or option == Option.INFO else 1
        session = self._session(info, minimum_block=minimum)
        for payload in self._infos(session, wanted):
            yield _reply(option, OptionReply.INFO, payload)
        if option == Option.INFO and not aware and info.minimum_block > 1:
            raise _Refused(OptionReply.ERR_BLOCK_SIZE_REQD, "request NBD_INFO_BLOCK_SIZE to use this export")
        yield _reply(option, OptionReply.ACK)
        return session if option == Option.GO else None

    def _infos(self, session: Session, wanted: set[int]) -> Iterable[bytes]:
        info = session.export
        if Info.NAME in wanted:
            yield messages.U16.pack(Info.NAME) + info.name.encode()
        if info.description:
            yield messages.U16.pack(Info.DESCRIPTION) + info.description.encode()
        yield messages.INFO_BLOCK_SIZE.pack(
            Info.BLOCK_SIZE,
            session.minimum_block,
            max(info.preferred_block, session.minimum_block),
            info.maximum_payload,
        )
        yield messages.INFO_EXPORT.pack(Info.EXPORT, info.size, session.flags)

    def _structured_reply(self, option: int, data: bytes) -> Generator[Step, bytes, None]:
        if self._extended:
            raise _Refused(OptionReply.ERR_EXT_HEADER_REQD, "extended headers already negotiated")
        if self._structured:
            raise _Refused(OptionReply.ERR_INVALID, "structured reply already negotiated")
        self._structured = True
        yield _reply(option, OptionReply.ACK)

    def _extended_headers(self, option: int, data: bytes) -> Generator[Step, bytes, None]:
        if self._extended:
            raise _Refused(OptionReply.ERR_INVALID, "extended headers already negotiated")
        self._extended = True
        yield _reply(option, OptionReply.ACK)

    def _meta_context(self, option: int, data: bytes) -> Generator[Step, bytes, None]:
        setting = option == Option.SET_META_CONTEXT
        if setting:
            # Even a failed attempt takes back what an earlier one chose.
            self._contexts = {}
        if not (self._structured or self._extended):
            raise _Refused(
                OptionReply.ERR_INVALID,
                f"request option {_name(option)} when structured reply is not negotiated",
            )
        name, rest = _take_name(data)
        info = self._find(name)
        queries = _take_queries(rest)
        chosen = _chosen(queries, info.contexts) if setting else _listed(queries, info.contexts)
        for number, context in enumerate(chosen, 1):
            # Ids mean nothing in a mere listing.
            payload = messages.U32.pack(number if setting else 0) + context.encode()
            yield _reply(option, OptionReply.META_CONTEXT, payload)
        if setting:
            self._contexts = dict(enumerate(chosen, 1))
            self._contexts_of = info.name
        yield _reply(option, OptionReply.ACK)

    # --- parts ------------------------------------------------------------------------------

    def _find(self, name: str) -> ExportInfo:
        info = self._table.find(name)
        if info is None:
            shown = name if len(name) <= 80 else name[:80] + "..."
            raise _Refused(OptionReply.ERR_UNKNOWN, f"export '{shown}' not present")
        return info

    def _session(self, info: ExportInfo, *, minimum_block: int) -> Session:
        contexts = self._contexts if self._contexts_of == info.name else {}
        flags = info.flags | TransmissionFlag.HAS_FLAGS
        if self._structured or self._extended:
            flags |= TransmissionFlag.SEND_DF
        if self._extended and contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return Session(info, flags, self._structured, self._extended, dict(contexts), minimum_block)


_Handler = Callable[[ServerHandshake, int, bytes], Generator[Step, bytes, Session | None]]
_HANDLERS: dict[int, _Handler] = {
    Option.LIST: ServerHandshake._list,
    Option.STARTTLS: ServerHandshake._starttls,
    Option.INFO: ServerHandshake._info_or_go,
    Option.GO: ServerHandshake._info_or_go,
    Option.STRUCTURED_REPLY: ServerHandshake._structured_reply,
    Option.LIST_META_CONTEXT: ServerHandshake._meta_context,
    Option.SET_META_CONTEXT: ServerHandshake._meta_context,
    Option.EXTENDED_HEADERS: ServerHandshake._extended_headers,
}
_WITHOUT_DATA = {Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS}


def _name(option: int) -> str:
    return f"'{Option(option).name.lower().replace('_', ' ')}'"


def _reply(option: int, reply: OptionReply, payload: bytes = b"") -> Send:
    return Send(messages.OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(payload)) + payload)


def _error(option: int, reply: OptionReply, message: str) -> Send:
    return _reply(option, reply, message.encode()[:MAX_STRING])


def _skip(length: int) -> Generator[Step, bytes, None]:
    while length:
        chunk = min(length, MAX_KEPT_PAYLOAD)
        yield Receive(chunk)
        length -= chunk


def _text(data: bytes) -> str | None:
    """None where it is not UTF-8: no export is called that."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _take_string(data: bytes, what: str) -> tuple[str, bytes]:
    """A counted string from the front, and what follows. The inner length is checked against the
    outer one before it is used (CVE-2022-26495)."""
    if len(data) < 4:
        raise _Refused(OptionReply.ERR_INVALID, f"the {what} is missing")
    (length,) = messages.U32.unpack_from(data)
    if length > len(data) - 4:
        raise _Refused(OptionReply.ERR_INVALID, f"the {what} is longer than the option")
    if length > MAX_STRING:
        raise _Refused(OptionReply.ERR_INVALID, f"the {what} is too long")
    text = _text(data[4 : 4 + length])
    if text is None:
        raise _Refused(OptionReply.ERR_INVALID, f"the {what} is not UTF-8")
    return text, data[4 + length :]


def _take_name(data: bytes) -> tuple[str, bytes]:
    return _take_string(data, "export name")


def _take_queries(data: bytes) -> list[str]:
    if len(data) < 4:
        raise _Refused(OptionReply.ERR_INVALID, "the number of queries is missing")
    (count,) = messages.U32.unpack_from(data)
    rest = data[4:]
    if count > len(rest) // 4:
        raise _Refused(OptionReply.ERR_INVALID, "there are fewer queries than announced")
    queries = []
    for _ in range(count):
        query, rest = _take_string(rest, "query")
        queries.append(query)
    if rest:
        raise _Refused(OptionReply.ERR_INVALID, "there is data behind the queries")
    return queries


def _chosen(queries: Sequence[str], contexts: Sequence[str]) -> list[str]:
    """SET: exact names only; each context once, whatever the queries repeat."""
    wanted = set(queries)
    return [context for context in contexts if context in wanted]


def _listed(queries: Sequence[str], contexts: Sequence[str]) -> list[str]:
    """LIST: everything without queries; "base:" or "qemu:dirty-bitmap:" stand for all under them."""
    if not queries:
        return list(contexts)
    return [
        context
        for context in contexts
        if any(query == context or (query in NAMESPACES and context.startswith(query)) for query in queries)
    ]
