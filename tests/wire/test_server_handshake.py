"""The server's handshake machine, without a socket: every option in every state."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import ProtocolError
from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import (
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from drivers.wire.nbd.server_handshake import ExportInfo, ServerHandshake, Session
from drivers.wire.nbd.steps import Receive, Send

FIXED, NO_ZEROES = 1, 2
DISK = ExportInfo(
    "disk",
    12345,
    TransmissionFlag.SEND_FLUSH,
    "a disk",
    contexts=("base:allocation", "qemu:allocation-depth"),
)
ALIGNED = ExportInfo("aligned", 1 << 40, TransmissionFlag.SEND_FLUSH, minimum_block=4096)


class Table:
    def listed(self) -> Iterable[tuple[str, str]]:
        return [("disk", "a disk"), ("aligned", "")]

    def find(self, name: str) -> ExportInfo | None:
        return {"disk": DISK, "aligned": ALIGNED, "": DISK}.get(name)


@dataclass
class Outcome:
    replies: list[tuple[int, int, bytes]] = field(default_factory=list)  # option, type, payload
    raw: bytes = b""
    session: Session | None = None
    ended: bool = False
    error: ProtocolError | None = None
    consumed: int = 0

    def types(self) -> list[int]:
        return [kind for _, kind, _ in self.replies]


def play(data: bytes) -> Outcome:
    """Run the machine over `data` until it ends or wants more than there is."""
    outcome = Outcome()
    machine = ServerHandshake(Table()).run()
    answer = b""
    sent = []
    try:
        step = next(machine)
        while True:
            if isinstance(step, Send):
                sent.append(step.data)
                answer = b""
            else:
                assert isinstance(step, Receive)
                assert 0 < step.length <= 64 << 10  # nothing larger is ever allocated
                if outcome.consumed + step.length > len(data):
                    break
                answer = data[outcome.consumed :][: step.length]
                outcome.consumed += step.length
            step = machine.send(answer)
    except StopIteration as end:
        outcome.ended, outcome.session = True, end.value
    except ProtocolError as error:
        outcome.ended, outcome.error = True, error
    assert sent[0] == messages.GREETING.pack(NBD_MAGIC, OPTION_MAGIC, FIXED | NO_ZEROES)
    outcome.raw = rest = b"".join(sent[1:])
    while len(rest) >= 20 and rest[:8] == OPTION_REPLY_MAGIC.to_bytes(8, "big"):
        _, option, kind, length = messages.OPTION_REPLY.unpack_from(rest)
        outcome.replies.append((option, kind, rest[20 : 20 + length]))
        rest = rest[20 + length :]
    return outcome


def option(number: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    return messages.OPTION.pack(OPTION_MAGIC, number, len(payload) if length is None else length) + payload


def text(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def go(name: bytes = b"disk", *infos: int) -> bytes:
    return text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def contexts(name: bytes, *queries: bytes) -> bytes:
    return text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))


def client(*options: bytes, flags: int = FIXED | NO_ZEROES) -> bytes:
    return struct.pack(">I", flags) + b"".join(options)


# --- one option at a time -------------------------------------------------------------------------


def test_list_names_every_export_with_its_description() -> None:
    outcome = play(client(option(Option.LIST)))
    assert outcome.replies == [
        (Option.LIST, OptionReply.SERVER, text(b"disk") + b"a disk"),
        (Option.LIST, OptionReply.SERVER, text(b"aligned")),
        (Option.LIST, OptionReply.ACK, b""),
    ]


def test_go_answers_infos_and_ends_in_a_session() -> None:
    outcome = play(client(option(Option.GO, go(b"", Info.NAME, Info.BLOCK_SIZE))))
    assert [payload for _, kind, payload in outcome.replies if kind == OptionReply.INFO] == [
        struct.pack(">H", Info.NAME) + b"disk",  # the canonical name
        struct.pack(">H", Info.DESCRIPTION) + b"a disk",
        struct.pack(">HIII", Info.BLOCK_SIZE, 1, 4096, 32 << 20),
        struct.pack(">HQH", Info.EXPORT, 12345, TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH),
    ]
    assert outcome.types()[-1] == OptionReply.ACK
    assert outcome.session and outcome.session.export is DISK


def test_info_leaves_the_handshake_open() -> None:
    outcome = play(client(option(Option.INFO, go()), option(Option.GO, go())))
    assert outcome.types().count(OptionReply.ACK) == 2
    assert outcome.session


@pytest.mark.parametrize(("flags", "padding"), [(FIXED, 124), (FIXED | NO_ZEROES, 0), (0, 124)])
def test_export_name(flags: int, padding: int) -> None:
    outcome = play(client(option(Option.EXPORT_NAME, b"disk"), flags=flags))
    assert outcome.raw == struct.pack(">QH", 12345, 5) + bytes(padding)
    assert outcome.session


def test_export_name_of_an_unknown_export_ends_the_session() -> None:
    outcome = play(client(option(Option.EXPORT_NAME, b"other")))
    assert outcome.error and not outcome.raw


def test_abort_is_acknowledged() -> None:
    outcome = play(client(option(Option.ABORT, b"bye")))
    assert outcome.types() == [OptionReply.ACK]
    assert outcome.ended and outcome.session is None and outcome.error is None


@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
def test_an_unknown_export_is_refused_and_the_handshake_goes_on(number: int) -> None:
    outcome = play(client(option(number, go(b"other")), option(Option.GO, go())))
    assert outcome.types()[0] == OptionReply.ERR_UNKNOWN
    assert outcome.session


def test_an_aligned_export_tells_those_who_only_look_to_ask_for_block_sizes() -> None:
    outcome = play(client(option(Option.INFO, go(b"aligned"))))
    assert struct.pack(">HIII", Info.BLOCK_SIZE, 4096, 4096, 32 << 20) in [r[2] for r in outcome.replies]
    assert outcome.types()[-1] == OptionReply.ERR_BLOCK_SIZE_REQD


@pytest.mark.parametrize(("infos", "minimum"), [((), 1), ((Info.BLOCK_SIZE,), 4096)])
def test_only_a_client_that_asked_is_held_to_block_sizes(infos: tuple[int, ...], minimum: int) -> None:
    outcome = play(client(option(Option.GO, go(b"aligned", *infos))))
    assert outcome.session and outcome.session.minimum_block == minimum


def test_starttls_without_tls_is_refused_politely() -> None:
    outcome = play(client(option(Option.STARTTLS), option(Option.GO, go())))
    assert outcome.types()[0] == OptionReply.ERR_POLICY
    assert outcome.session


def test_flags_follow_the_negotiation() -> None:
    plain = play(client(option(Option.GO, go()))).session
    structured = play(client(option(Option.STRUCTURED_REPLY), option(Option.GO, go()))).session
    extended = play(
        client(
            option(Option.EXTENDED_HEADERS),
            option(Option.SET_META_CONTEXT, contexts(b"disk", b"base:allocation")),
            option(Option.GO, go()),
        )
    ).session
    assert plain and structured and extended
    df, payload = TransmissionFlag.SEND_DF, TransmissionFlag.BLOCK_STATUS_PAYLOAD
    assert [s.flags & (df | payload) for s in (plain, structured, extended)] == [0, df, df | payload]
    assert extended.contexts == {1: "base:allocation"}


# --- metadata contexts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ((), [b"base:allocation", b"qemu:allocation-depth"]),
        ((b"base:",), [b"base:allocation"]),
        ((b"qemu:",), [b"qemu:allocation-depth"]),
        ((b"qemu:allocation-depth", b"base:"), [b"base:allocation", b"qemu:allocation-depth"]),
        ((b"unknown:",), []),
    ],
)
def test_listing_contexts(queries: tuple[bytes, ...], names: list[bytes]) -> None:
    outcome = play(
        client(option(Option.STRUCTURED_REPLY), option(Option.LIST_META_CONTEXT, contexts(b"disk", *queries)))
    )
    assert [payload[4:] for _, kind, payload in outcome.replies if kind == OptionReply.META_CONTEXT] == names


def test_wildcards_select_nothing() -> None:
    outcome = play(
        client(
            option(Option.STRUCTURED_REPLY),
            option(Option.SET_META_CONTEXT, contexts(b"disk", b"base:", b"")),
            option(Option.GO, go()),
        )
    )
    assert outcome.session and outcome.session.contexts == {}


def test_contexts_belong_to_the_export_they_were_chosen_for() -> None:
    outcome = play(
        client(
            option(Option.STRUCTURED_REPLY),
            option(Option.SET_META_CONTEXT, contexts(b"disk", b"base:allocation")),
            option(Option.GO, go(b"aligned")),
        )
    )
    assert outcome.session and outcome.session.contexts == {}


def test_a_failed_choice_of_contexts_takes_back_an_earlier_one() -> None:
    outcome = play(
        client(
            option(Option.STRUCTURED_REPLY),
            option(Option.SET_META_CONTEXT, contexts(b"disk", b"base:allocation")),
            option(Option.SET_META_CONTEXT, contexts(b"other", b"base:allocation")),
            option(Option.GO, go()),
        )
    )
    assert outcome.session and outcome.session.contexts == {}


# --- every option in every state ------------------------------------------------------------------

STATES = {
    "fresh": (),
    "structured": (option(Option.STRUCTURED_REPLY),),
    "extended": (option(Option.EXTENDED_HEADERS),),
    "both": (option(Option.STRUCTURED_REPLY), option(Option.EXTENDED_HEADERS)),
}
META = contexts(b"disk", b"base:allocation")
ACK, INVALID, UNSUP = OptionReply.ACK, OptionReply.ERR_INVALID, OptionReply.ERR_UNSUP
# Option with good data: the final reply in each state, None where the session ends at once.
FINAL: dict[tuple[int, bytes], tuple[int | None, ...]] = {
    (Option.EXPORT_NAME, b"disk"): (0, 0, None, None),
    (Option.ABORT, b""): (ACK, ACK, ACK, ACK),
    (Option.LIST, b""): (ACK, ACK, ACK, ACK),
    (Option.PEEK_EXPORT, b""): (UNSUP, UNSUP, UNSUP, UNSUP),
    (Option.STARTTLS, b""): (OptionReply.ERR_POLICY,) * 4,
    (Option.INFO, go()): (ACK, ACK, ACK, ACK),
    (Option.GO, go()): (ACK, ACK, ACK, ACK),
    (Option.STRUCTURED_REPLY, b""): (
        ACK,
        INVALID,
        OptionReply.ERR_EXT_HEADER_REQD,
        OptionReply.ERR_EXT_HEADER_REQD,
    ),
    (Option.LIST_META_CONTEXT, META): (INVALID, ACK, ACK, ACK),
    (Option.SET_META_CONTEXT, META): (INVALID, ACK, ACK, ACK),
    (Option.EXTENDED_HEADERS, b""): (ACK, ACK, INVALID, INVALID),
    (12, b""): (UNSUP,) * 4,
    (0, b"x"): (UNSUP,) * 4,
    (0xFFFFFFFF, b"payload"): (UNSUP,) * 4,
}


@pytest.mark.parametrize(("state", "case"), list(itertools.product(STATES, FINAL)))
def test_every_option_in_every_state(state: str, case: tuple[int, bytes]) -> None:
    number, payload = case
    outcome = play(client(*STATES[state], option(number, payload)))
    expected = FINAL[case][list(STATES).index(state)]
    if expected is None:
        assert outcome.error
    elif number == Option.EXPORT_NAME:
        assert outcome.session
    else:
        assert outcome.replies[-1][:2] == (number, expected)


@pytest.mark.parametrize(
    ("number", "payload"),
    [
        (Option.LIST, b"x"),
        (Option.STARTTLS, b"x"),
        (Option.STRUCTURED_REPLY, b"x"),
        (Option.EXTENDED_HEADERS, b"x"),
        (Option.GO, b""),
        (Option.GO, b"\0\0\0"),
        (Option.GO, text(b"disk")),
        (Option.GO, text(b"disk") + b"\0"),
        (Option.GO, text(b"disk") + b"\0\2\0\0"),
        (Option.GO, text(b"disk") + b"\0\0\0"),
        (Option.GO, go(b"\xff")),
        (Option.GO, go(b"x" * 4097)),
        (Option.SET_META_CONTEXT, text(b"disk")),
        (Option.SET_META_CONTEXT, text(b"disk") + b"\0\0\0\1"),
        (Option.SET_META_CONTEXT, text(b"disk") + b"\xff\xff\xff\xff"),
        (Option.SET_META_CONTEXT, text(b"disk") + b"\0\0\0\1\0\0\0\5base"),
        (Option.SET_META_CONTEXT, contexts(b"disk", b"x" * 4097)),
        (Option.SET_META_CONTEXT, META + b"x"),
        (Option.LIST_META_CONTEXT, b""),
    ],
)
def test_malformed_data_is_invalid_and_the_stream_stays_in_step(number: int, payload: bytes) -> None:
    structured = () if number == Option.STRUCTURED_REPLY else (option(Option.STRUCTURED_REPLY),)
    outcome = play(client(*structured, option(number, payload), option(Option.GO, go())))
    assert (number, OptionReply.ERR_INVALID) in [reply[:2] for reply in outcome.replies]
    assert outcome.session


@pytest.mark.parametrize("name_length", [0xFFFFFFFF, 0x80000000, 5])
def test_cve_2022_26495_inner_length_beyond_the_outer_one(name_length: int) -> None:
    payload = struct.pack(">I", name_length) + b"disk\0\0"[: 4 if name_length != 5 else 0] + b""
    outcome = play(client(option(Option.GO, payload), option(Option.GO, go())))
    assert outcome.types()[0] == OptionReply.ERR_INVALID
    assert outcome.session


def test_cve_2017_15119_a_huge_option_is_skipped_without_being_held() -> None:
    huge = 1 << 20
    outcome = play(client(option(Option.INFO, bytes(huge)), option(Option.GO, go())))
    assert outcome.types()[0] == OptionReply.ERR_TOO_BIG
    assert outcome.session


@pytest.mark.parametrize("length", [(32 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("number", [Option.GO, Option.EXPORT_NAME, Option.LIST, 99])
def test_cve_2017_15119_an_absurd_length_ends_the_connection(number: int, length: int) -> None:
    outcome = play(client(option(number, length=length)))
    assert outcome.error and not outcome.raw


def test_cve_2017_15118_long_export_names_are_refused_before_they_are_received() -> None:
    outcome = play(client(option(Option.EXPORT_NAME, b"x" * 4097)))
    assert outcome.error
    assert outcome.consumed == 4 + messages.OPTION.size


def test_cve_2020_10761_a_long_name_does_not_come_back_in_the_error() -> None:
    outcome = play(client(option(Option.GO, go(b"n" * 4096))))
    (reply,) = outcome.replies
    assert reply[1] == OptionReply.ERR_UNKNOWN
    assert len(reply[2]) < 200


@pytest.mark.parametrize("flags", [4, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(flags: int) -> None:
    assert play(client(flags=flags)).error


def test_a_client_without_fixed_newstyle_gets_export_name_only() -> None:
    assert play(client(option(Option.LIST), flags=0)).error


def test_a_bad_option_magic_ends_the_connection() -> None:
    assert play(client(struct.pack(">QII", OPTION_MAGIC ^ 1, Option.LIST, 0))).error


# --- hostile streams ------------------------------------------------------------------------------

any_option = st.builds(
    lambda number, payload: option(number, payload),
    st.one_of(st.sampled_from(sorted(Option)), st.integers(0, 0xFFFFFFFF)),
    st.one_of(
        st.binary(max_size=40), st.sampled_from([b"", go(), go(b""), META, contexts(b"disk")]),
    ),
)  # fmt: skip


@given(st.lists(any_option, max_size=12), st.sampled_from([0, 1, 2, 3]))
def test_any_sequence_of_options_is_answered_in_step(options: list[bytes], flags: int) -> None:
    outcome = play(client(*options, flags=flags))
    # Either it ended, or everything was consumed and each option got its final reply.
    if not outcome.ended:
        assert outcome.consumed == 4 + sum(map(len, options))
        finals = [kind for kind in outcome.types() if kind == OptionReply.ACK or kind >> 31]
        assert len(finals) == len(options)


@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error_and_nothing_else(data: bytes) -> None:
    play(client() + data)
