"""The client's handshake, fed from a script: no socket anywhere."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from drivers.errors import OptionError, ProtocolError
from drivers.wire.nbd import client_handshake, messages
from drivers.wire.nbd.client_handshake import Export, ListedExport, RefusedError, ReplyMode, Wishes
from drivers.wire.nbd.constants import (
    NBD_MAGIC,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from drivers.wire.nbd.steps import Receive, Send

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH


def converse(handshake: Generator[Any, bytes, Any], script: bytes) -> tuple[Any, bytes]:
    """The handshake's result and everything it sent; all of the script must be used."""
    sent = b""
    try:
        step = next(handshake)
        while True:
            if isinstance(step, Send):
                sent += step.data
                step = handshake.send(b"")
            else:
                assert isinstance(step, Receive)
                if len(script) < step.length:
                    step = handshake.throw(ProtocolError("the server closed the connection"))
                    continue
                data, script = script[: step.length], script[step.length :]
                step = handshake.send(data)
    except StopIteration as end:
        assert not script
        return end.value, sent


def greeting(flags: int = 3) -> bytes:
    return messages.GREETING.pack(NBD_MAGIC, OPTION_MAGIC, flags)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return messages.OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def ack(option: int) -> bytes:
    return reply(option, OptionReply.ACK)


def size_info(option: int, size: int = 1 << 20, flags: int = FLAGS) -> bytes:
    return reply(option, OptionReply.INFO, messages.INFO_EXPORT.pack(Info.EXPORT, size, flags))


def blocks_info(option: int, *blocks: int) -> bytes:
    return reply(option, OptionReply.INFO, messages.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *blocks))


def context(option: int, number: int, name: bytes) -> bytes:
    return reply(option, OptionReply.META_CONTEXT, messages.U32.pack(number) + name)


def options_sent(sent: bytes) -> list[int]:
    """The options among what a fixed newstyle client sent."""
    found, at = [], 4
    while at < len(sent):
        magic, option, length = messages.OPTION.unpack_from(sent, at)
        assert magic == OPTION_MAGIC
        found.append(option)
        at += messages.OPTION.size + length
    return found


UNSUP = OptionReply.ERR_UNSUP
EXT, SR, SET, GO, LIST = (
    Option.EXTENDED_HEADERS,
    Option.STRUCTURED_REPLY,
    Option.SET_META_CONTEXT,
    Option.GO,
    Option.LIST,
)


def test_everything_wished_for_is_had_from_a_server_that_has_it() -> None:
    script = greeting() + ack(EXT) + context(SET, 7, b"base:allocation") + ack(SET)
    script += reply(GO, OptionReply.INFO, b"\0\1canonical") + reply(GO, OptionReply.INFO, b"\0\2a text")
    script += reply(GO, OptionReply.INFO, b"\xff\0unknown") + blocks_info(GO, 512, 4096, 1 << 25)
    export, sent = converse(client_handshake.open_export(Wishes("disk")), script + size_info(GO) + ack(GO))
    assert export == Export(
        "canonical",
        1 << 20,
        FLAGS,
        description="a text",
        minimum_block=512,
        preferred_block=4096,
        maximum_payload=1 << 25,
        advertised_blocks=True,
        contexts={"base:allocation": 7},
        mode=ReplyMode.EXTENDED,
    )
    assert options_sent(sent) == [EXT, SET, GO]


def test_extended_headers_fall_back_to_structured_replies_and_those_to_simple_ones() -> None:
    script = greeting() + reply(EXT, UNSUP) + ack(SR) + ack(SET) + size_info(GO) + ack(GO)
    export, sent = converse(client_handshake.open_export(Wishes()), script)
    assert export.mode is ReplyMode.STRUCTURED and export.contexts == {}
    assert options_sent(sent) == [EXT, SR, SET, GO]

    script = greeting() + reply(EXT, UNSUP) + reply(SR, UNSUP) + size_info(GO) + ack(GO)
    export, sent = converse(client_handshake.open_export(Wishes()), script)
    assert export.mode is ReplyMode.SIMPLE
    assert options_sent(sent) == [EXT, SR, GO]


def test_wishes_not_had_are_not_asked_for() -> None:
    wishes = Wishes(extended=False, structured=False)
    export, sent = converse(client_handshake.open_export(wishes), greeting() + size_info(GO) + ack(GO))
    assert export.mode is ReplyMode.SIMPLE and options_sent(sent) == [GO]


@pytest.mark.parametrize("no_zeroes", [False, True])
def test_go_falls_back_to_export_name(no_zeroes: bool) -> None:
    script = greeting(1 | no_zeroes << 1) + reply(GO, UNSUP)
    script += messages.EXPORT_NAME_REPLY.pack(4096, FLAGS) + (b"" if no_zeroes else bytes(124))
    wishes = Wishes("x", extended=False, structured=False)
    export, sent = converse(client_handshake.open_export(wishes), script)
    assert (export.size, export.flags) == (4096, FLAGS)
    assert options_sent(sent) == [GO, Option.EXPORT_NAME]


def test_a_server_with_extended_headers_may_not_lack_go() -> None:
    script = greeting() + ack(EXT) + ack(SET) + reply(GO, UNSUP)
    with pytest.raises(ProtocolError, match="no NBD_OPT_GO"):
        converse(client_handshake.open_export(Wishes()), script)


def test_unfixed_newstyle_gets_nothing_but_the_export_name() -> None:
    script = greeting(0) + messages.EXPORT_NAME_REPLY.pack(4096, FLAGS) + bytes(124)
    export, sent = converse(client_handshake.open_export(Wishes("x")), script)
    assert export.size == 4096
    assert sent[:4] == bytes(4) and options_sent(sent) == [Option.EXPORT_NAME]


@pytest.mark.parametrize("flags", [0, 1])
def test_a_server_without_info_tells_by_entering_transmission(flags: int) -> None:
    refusals = b"".join(reply(option, UNSUP) for option in (EXT, SR, Option.INFO, GO)) if flags else b""
    script = greeting(flags) + refusals + messages.EXPORT_NAME_REPLY.pack(4096, FLAGS) + bytes(124)
    export, sent = converse(client_handshake.describe_export(Wishes("x")), script)
    assert (export.size, export.flags) == (4096, FLAGS)
    assert options_sent(sent)[-1] == Option.EXPORT_NAME


def test_unfixed_newstyle_has_no_list() -> None:
    for question in (client_handshake.list_exports, client_handshake.describe_all):
        with pytest.raises(ProtocolError, match="too old to list"):
            converse(question(Wishes()), greeting(0))


def test_oldstyle() -> None:
    script = messages.U32.pack(NBD_MAGIC >> 32) + messages.U32.pack(NBD_MAGIC & 0xFFFFFFFF)
    script += OLDSTYLE_MAGIC.to_bytes(8, "big") + messages.OLDSTYLE_REPLY.pack(4096, FLAGS) + bytes(124)
    export, sent = converse(client_handshake.open_export(Wishes()), script)
    assert (export.size, export.mode, sent) == (4096, ReplyMode.SIMPLE, b"")
    with pytest.raises(ProtocolError, match="no export names"):
        converse(client_handshake.open_export(Wishes("x")), script)


def test_a_context_that_cannot_be_had_is_done_without() -> None:
    script = greeting() + ack(EXT) + context(SET, 1, b"base:allocation")
    script += reply(SET, OptionReply.ERR_TOO_BIG) + size_info(GO) + ack(GO)
    export, _ = converse(client_handshake.open_export(Wishes()), script)
    assert export.contexts == {}


def test_list() -> None:
    entry = messages.U32.pack(1) + b"a" + b"the first"
    script = greeting() + ack(EXT) + reply(LIST, OptionReply.SERVER, entry)
    script += reply(LIST, OptionReply.SERVER, messages.U32.pack(0)) + ack(LIST)
    exports, sent = converse(client_handshake.list_exports(Wishes()), script)
    assert exports == [ListedExport("a", "the first"), ListedExport("")]
    assert options_sent(sent)[-1] == Option.ABORT


def test_describe_all_takes_one_connection() -> None:
    info, contexts = Option.INFO, Option.LIST_META_CONTEXT
    script = greeting() + ack(EXT) + reply(LIST, OptionReply.SERVER, messages.U32.pack(1) + b"a" + b"text")
    script += ack(LIST) + size_info(info) + ack(info) + context(contexts, 0, b"x:y") + ack(contexts)
    exports, sent = converse(client_handshake.describe_all(Wishes()), script)
    assert [(e.name, e.size, e.description, list(e.contexts)) for e in exports] == [
        ("a", 1 << 20, "text", ["x:y"])
    ]
    assert options_sent(sent) == [EXT, LIST, info, contexts, Option.ABORT]


def test_the_servers_own_words_are_in_the_error() -> None:
    script = greeting() + ack(EXT) + ack(SET) + reply(GO, OptionReply.ERR_UNKNOWN, b"no such thing")
    with pytest.raises(RefusedError, match=r"not available.*no such thing") as caught:
        converse(client_handshake.open_export(Wishes("x")), script)
    assert caught.value.reply == OptionReply.ERR_UNKNOWN


def test_cve_2020_10761_long_error_text_is_cut() -> None:
    script = greeting() + ack(EXT) + ack(SET) + reply(GO, OptionReply.ERR_UNKNOWN, b"x" * 60_000)
    with pytest.raises(RefusedError) as caught:
        converse(client_handshake.open_export(Wishes("x")), script)
    assert len(str(caught.value)) < 4200


START = greeting() + ack(EXT) + ack(SET)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (b"HTTP/1.1", "not an NBD server"),
        (NBD_MAGIC.to_bytes(8, "big") + bytes(8), "unknown protocol"),
        (greeting() + bytes(20), "wrong magic"),
        (greeting() + ack(SR), "answered option 8"),
        (greeting() + reply(EXT, OptionReply.ACK, b"?"), "carries data"),
        (greeting() + reply(EXT, OptionReply.INFO), "unexpected reply"),
        (greeting() + reply(EXT, OptionReply.ERR_TLS_REQD), "requires TLS"),
        (greeting() + messages.OPTION_REPLY.pack(OPTION_REPLY_MAGIC, EXT, 1, 1 << 31), "too large"),
        (START + ack(GO), "lacks the export's size"),
        (START + size_info(GO) + size_info(GO), "EXPORT twice"),
        (START + size_info(GO, 1 << 63), "impossible size"),
        (START + reply(GO, OptionReply.INFO, bytes(11)), "wrong length"),
        (START + reply(GO, OptionReply.INFO, b"\0"), "too short"),
        (START + reply(GO, OptionReply.INFO, b"\0\2" + b"x" * 4097), "more than 4096"),
        (START + reply(GO, OptionReply.INFO, b"\0\1\xff"), "not UTF-8"),
        (START + blocks_info(GO, 3, 4096, 1 << 25), "not a power of 2"),
        (START + blocks_info(GO, 0, 4096, 1 << 25), "not a power of 2"),
        (START + blocks_info(GO, 512, 0, 1 << 25), "not a power of 2"),
        (START + blocks_info(GO, 1 << 17, 1 << 17, 1 << 25), "over 65536"),
        (START + blocks_info(GO, 4096, 512, 1 << 25), "contradict"),
        (START + blocks_info(GO, 512, 4096, 0), "contradict"),
        (START + reply(GO, OptionReply.ERR_UNSUP + 90), "unknown error 91"),
        (greeting() + ack(EXT) + 2 * context(SET, 1, b"base:allocation") + ack(SET), "twice"),
        (greeting() + ack(EXT) + reply(SET, OptionReply.META_CONTEXT, b"\0"), "too short"),
        (START, "closed"),
    ],
)
def test_offences_end_the_handshake(script: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        converse(client_handshake.open_export(Wishes()), script)


def test_cve_2023_5215_a_size_over_2_to_the_63_is_refused_from_export_name_too() -> None:
    script = greeting(0) + messages.EXPORT_NAME_REPLY.pack((1 << 64) - 1, FLAGS) + bytes(124)
    with pytest.raises(ProtocolError, match="impossible size"):
        converse(client_handshake.open_export(Wishes()), script)


@pytest.mark.parametrize("kind", ["exports", "contexts", "infos"])
def test_endless_answers_are_cut_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_handshake, "MAX_EXPORTS", 5)
    monkeypatch.setattr(client_handshake, "MAX_CONTEXTS", 5)
    monkeypatch.setattr(client_handshake, "MAX_INFOS", 5)
    handshake: Generator[Any, bytes, Any] = client_handshake.open_export(Wishes())
    if kind == "exports":
        handshake = client_handshake.list_exports(Wishes())
        script = greeting() + ack(EXT) + 6 * reply(LIST, OptionReply.SERVER, bytes(4))
    elif kind == "contexts":
        script = greeting() + ack(EXT) + b"".join(context(SET, n, b"a:%d" % n) for n in range(6))
    else:
        script = START + 6 * reply(GO, OptionReply.INFO, b"\xff\xff")
    with pytest.raises(ProtocolError, match="more than 5"):
        converse(handshake, script)


def test_an_export_name_longer_than_its_reply_is_refused() -> None:
    script = greeting() + ack(EXT) + reply(LIST, OptionReply.SERVER, messages.U32.pack(100) + b"short")
    with pytest.raises(ProtocolError, match="longer than the reply"):
        converse(client_handshake.list_exports(Wishes()), script)


def test_cve_2019_14842_tls_is_not_silently_done_without() -> None:
    with pytest.raises(OptionError, match="TLS is not supported yet"):
        next(client_handshake.open_export(Wishes(tls=True)))


def test_a_script_cut_anywhere_is_a_clean_error() -> None:
    script = START + size_info(GO) + ack(GO)
    for end in range(len(script)):
        with pytest.raises(ProtocolError):
            converse(client_handshake.open_export(Wishes()), script[:end])
