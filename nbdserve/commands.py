"""The commands of the transmission phase: which requests are valid, and how each is carried out
where the fast path of connection.py cannot do it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from drivers.block.node import is_zero
from drivers.wire.nbd.constants import (
    MAX_EXTENTS,
    MAX_PAYLOAD,
    Command,
    CommandFlag,
    WireError,
)
from drivers.wire.nbd.messages import OFFSET, U32
from drivers.wire.nbd.server_handshake import Session
from nbdserve.exports.nbd import NbdExport
from nbdserve.replies import Replies, wire_error
from nbdserve.trace import trace

Buffer = bytes | bytearray | memoryview

# Flags that a client may set; FUA is tolerated everywhere because existing clients set it.
_VALID_FLAGS = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA | CommandFlag.PAYLOAD_LEN,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE | CommandFlag.PAYLOAD_LEN,
}
_FUA = int(CommandFlag.FUA)
_MODIFYING = {Command.WRITE, Command.TRIM, Command.WRITE_ZEROES}


@dataclass(slots=True)
class Request:
    """One request off the wire; `payload` is what came with it."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: Buffer = b""


class Refusal(Exception):
    """The request is invalid: answered with `number`, and the connection lives on."""

    def __init__(self, number: WireError, text: str) -> None:
        super().__init__(text)
        self.number = number


def trace_request(event: str, request: Request, **more: object) -> None:
    """Trace `event` with what identifies a request; only to be called while anything is traced."""
    trace(
        event,
        command=request.command,
        cookie=request.cookie,
        offset=request.offset,
        flags=request.flags,
        **more,
    )


def check(export: NbdExport, session: Session, request: Request) -> None:
    """Raise Refusal for what must not reach the node (proto.md, "Error values")."""
    command, flags, length = request.command, request.flags, request.length
    valid = _VALID_FLAGS.get(command)  # type: ignore[call-overload]
    if valid is None:
        raise Refusal(WireError.EINVAL, f"unknown command {command}")
    if flags & ~_FUA:  # arithmetic with flags that have names is slow; most requests have none
        if not session.extended:
            valid &= ~CommandFlag.PAYLOAD_LEN
        if not session.structured and not session.extended:
            valid &= ~CommandFlag.DF
        if flags & ~int(valid):  # ~ of an IntFlag knows only the bits that have names
            raise Refusal(WireError.EINVAL, f"command {Command(command).name} with unknown flags {flags:#x}")
    if command == Command.FLUSH:
        if request.offset or length:
            raise Refusal(WireError.EINVAL, "a flush has no offset and no length")
        return
    if command in _MODIFYING and not export.writable:
        raise Refusal(WireError.EPERM, "Export is read-only")
    if command in (Command.READ, Command.WRITE) and length > MAX_PAYLOAD:
        raise Refusal(WireError.EINVAL, f"len ({length}) is larger than max len ({MAX_PAYLOAD})")
    if request.offset + length > export.info.size:
        number = WireError.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else WireError.EINVAL
        raise Refusal(
            number, f"operation past EOF; From: {request.offset}, Len: {length}, Size: {export.info.size}"
        )
    mask = session.minimum_block - 1
    if (request.offset | length) & mask and not (
        command == Command.BLOCK_STATUS or request.offset + length == export.info.size
    ):
        raise Refusal(WireError.EINVAL, f"unaligned request; the minimum block size is {mask + 1}")
    if command == Command.BLOCK_STATUS:
        if not session.contexts:
            raise Refusal(WireError.EINVAL, "no metadata context was negotiated")
        if not length:
            raise Refusal(WireError.EINVAL, "need non-zero length")


async def execute(export: NbdExport, session: Session, replies: Replies, request: Request) -> list[Buffer]:
    """Carry out a checked request; the reply in parts, an error reply if it failed."""
    try:
        return await _COMMANDS[request.command](export, session, replies, request)
    except Refusal as refusal:
        return [replies.error(request.cookie, request.offset, refusal.number, str(refusal))]
    except OSError as error:
        number = wire_error_of(request, error)
        if trace.enabled:
            trace_request("nbd_request_failed", request, reason=str(error))
        return [replies.error(request.cookie, request.offset, number, error.strerror or str(error))]
    except MemoryError:
        return [replies.error(request.cookie, request.offset, WireError.ENOMEM)]


def wire_error_of(request: Request, error: OSError) -> WireError:
    """ENOTSUP may be said only of fast zeroing; otherwise clients do not know it."""
    number = wire_error(error.errno)
    if number == WireError.ENOTSUP and not request.flags & CommandFlag.FAST_ZERO:
        return WireError.EINVAL
    return number


async def _read(export: NbdExport, session: Session, replies: Replies, request: Request) -> list[Buffer]:
    cookie, offset, length = request.cookie, request.offset, request.length
    if not length:
        return [replies.done(cookie, offset) or replies.success(cookie, offset)]
    buffer = bytearray(length)
    await export.node.read_into(offset, buffer)
    if replies.structured and is_zero(memoryview(buffer)):
        return [replies.hole(cookie, offset, offset, length, done=True)]
    return [replies.data(cookie, offset, offset, length, done=True), buffer]


async def _write(export: NbdExport, session: Session, replies: Replies, request: Request) -> list[Buffer]:
    fua = bool(request.flags & CommandFlag.FUA) or export.writethrough
    await export.node.write(request.offset, request.payload, fua=fua)
    return [replies.success(request.cookie, request.offset)]


async def _flush(export: NbdExport, session: Session, replies: Replies, request: Request) -> list[Buffer]:
    await export.node.flush()
    return [replies.success(request.cookie, request.offset)]


async def _trim(export: NbdExport, session: Session, replies: Replies, request: Request) -> list[Buffer]:
    await export.node.discard(request.offset, request.length)
    if request.flags & CommandFlag.FUA or export.writethrough:
        await export.node.flush()
    return [replies.success(request.cookie, request.offset)]


async def _cache(export: NbdExport, session: Session, replies: Replies, request: Request) -> list[Buffer]:
    await export.node.cache(request.offset, request.length)
    return [replies.success(request.cookie, request.offset)]


async def _write_zeroes(
    export: NbdExport, session: Session, replies: Replies, request: Request
) -> list[Buffer]:
    await export.node.write_zeroes(
        request.offset,
        request.length,
        fua=bool(request.flags & CommandFlag.FUA) or export.writethrough,
        may_unmap=not request.flags & CommandFlag.NO_HOLE,
        fast=bool(request.flags & CommandFlag.FAST_ZERO),
    )
    return [replies.success(request.cookie, request.offset)]


async def _block_status(
    export: NbdExport, session: Session, replies: Replies, request: Request
) -> list[Buffer]:
    ids = _wanted_contexts(session, request)
    parts: list[Buffer] = []
    for number, context_id in enumerate(ids, 1):
        context = export.contexts[session.contexts[context_id]]
        statuses = await context.describe(
            export.node, request.offset, request.length, alignment=session.minimum_block
        )
        if request.flags & CommandFlag.REQ_ONE:
            statuses = statuses[:1]
        done = number == len(ids)
        parts.append(
            replies.status(request.cookie, request.offset, context_id, statuses[:MAX_EXTENTS], done=done)
        )
    return parts


def _wanted_contexts(session: Session, request: Request) -> Sequence[int]:
    """All negotiated contexts, or those that an extended request's payload names."""
    if not request.flags & CommandFlag.PAYLOAD_LEN:
        return list(session.contexts)
    ids = [context_id for (context_id,) in U32.iter_unpack(bytes(request.payload[OFFSET.size :]))]
    if not ids or len(set(ids)) != len(ids) or not set(ids) <= session.contexts.keys():
        raise Refusal(WireError.EINVAL, "unknown or repeated metadata contexts")
    return ids


_Handler = Callable[[NbdExport, Session, Replies, Request], Awaitable[list[Buffer]]]
_COMMANDS: dict[int, _Handler] = {
    Command.READ: _read,
    Command.WRITE: _write,
    Command.FLUSH: _flush,
    Command.TRIM: _trim,
    Command.CACHE: _cache,
    Command.WRITE_ZEROES: _write_zeroes,
    Command.BLOCK_STATUS: _block_status,
}
