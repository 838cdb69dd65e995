"""getopt_long's rules; the messages are compared with a real glibc program's in tests/cli."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.options.argv import ArgumentParser, Opt, UsageError

TABLE = [
    Opt("port", "p", takes_value=True),
    Opt("persistent", "t"),
    Opt("socket", "k", takes_value=True),
    Opt("snapshot", "s"),
    Opt("fork"),
    Opt("export-name", "x", takes_value=True),
    Opt("export", takes_value=True, exact=True),
]


def parse(*arguments):
    parser = ArgumentParser(TABLE, arguments)
    return list(parser), parser.operands


@pytest.mark.parametrize(
    ("arguments", "options", "operands"),
    [
        ([], [], []),
        (["-tk", "S"], [("persistent", ""), ("socket", "S")], []),
        (["-tkS"], [("persistent", ""), ("socket", "S")], []),
        (["-p10809"], [("port", "10809")], []),
        (["-p="], [("port", "=")], []),
        (["--port=1", "--port", "2"], [("port", "1"), ("port", "2")], []),
        (["--port="], [("port", "")], []),
        (["--port", "--fork"], [("port", "--fork")], []),
        (["-p", "--"], [("port", "--")], []),
        (["--po", "1", "--pe"], [("port", "1"), ("persistent", "")], []),
        (["disk", "-t", "more", "-p", "1"], [("persistent", ""), ("port", "1")], ["disk", "more"]),
        (["-t", "--", "-p", "disk", "--"], [("persistent", "")], ["-p", "disk", "--"]),
        (["-", "-t", ""], [("persistent", "")], ["-", ""]),
        # An exact option neither takes an abbreviation nor disturbs another's.
        (["--exp", "a", "--export", "b"], [("export-name", "a"), ("export", "b")], []),
    ],
)
def test_reads_what_getopt_long_reads(arguments, options, operands):
    assert parse(*arguments) == (options, operands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo"], "unrecognized option '--foo'"),
        (["--foo=1"], "unrecognized option '--foo=1'"),
        (["--s"], "option '--s' is ambiguous; possibilities: '--socket' '--snapshot'"),
        (["-tq"], "invalid option -- 'q'"),
        (["-tp"], "option requires an argument -- 'p'"),
        (["--po"], "option '--port' requires an argument"),
        (["--fo=1"], "option '--fork' doesn't allow an argument"),
    ],
)
def test_refuses_in_glibcs_words(arguments, message):
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    assert str(caught.value) == message


def test_a_mistake_is_met_only_when_its_turn_comes():
    arguments = iter(ArgumentParser(TABLE, ["-t", "-q"]))
    assert next(arguments) == ("persistent", "")
    with pytest.raises(UsageError):
        next(arguments)


@given(st.lists(st.text(st.sampled_from("-=ptksx ab"), max_size=6)))
def test_any_command_line_is_read_or_refused(arguments):
    try:
        options, operands = parse(*arguments)
    except UsageError:
        return
    assert {name for name, _ in options} <= {option.name for option in TABLE}
    assert all(operand in arguments for operand in operands)
