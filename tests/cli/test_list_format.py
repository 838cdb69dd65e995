"""How a list is printed; tests/interop compares it with qemu-nbd's for real servers."""

import json

from nbdserve.cli.list import ExportDescription, as_json, as_text

PLAIN = ExportDescription(name="", description="", size=1048576, flags=0xCED)
FULL = ExportDescription(
    name="foo",
    description="some desc",
    size=1048576,
    flags=0x58F,
    min_block=1,
    opt_block=4096,
    max_block=33554432,
    contexts=("base:allocation", "qemu:allocation-depth"),
    transaction_size="64-bit",
)


def test_text():
    assert as_text([FULL, PLAIN]) == (
        "exports available: 2\n"
        " export: 'foo'\n"
        "  description: some desc\n"
        "  size:  1048576\n"
        "  flags: 0x58f ( readonly flush fua df multi cache )\n"
        "  min block: 1\n"
        "  opt block: 4096\n"
        "  max block: 33554432\n"
        "  available meta contexts: 2\n"
        "   base:allocation\n"
        "   qemu:allocation-depth\n"
        " export: ''\n"
        "  size:  1048576\n"
        "  flags: 0xced ( flush fua trim zeroes df cache fast-zero )\n"
    )


def test_nothing_to_list():
    assert as_text([]) == "exports available: 0\n"


def test_an_export_that_only_its_name_is_known_of():
    assert as_text([ExportDescription("a", "", 0, 0)]) == "exports available: 1\n export: 'a'\n"


def test_verbose_tells_the_size_of_transactions():
    assert "  transaction size: 64-bit\n" in as_text([FULL], verbose=True)


def test_a_peers_text_cannot_command_the_terminal():
    text = as_text([ExportDescription("a\x1b[2J\n", "\r\x00", 0, 0)])
    assert text == "exports available: 1\n export: 'a\\x1b[2J\\x0a'\n  description: \\x0d\\x00\n"


def test_json():
    [export] = json.loads(as_json([FULL]))["exports"]
    assert export == {
        "name": "foo",
        "description": "some desc",
        "size": 1048576,
        "flags": 0x58F,
        "flag-names": ["readonly", "flush", "fua", "df", "multi", "cache"],
        "min-block": 1,
        "opt-block": 4096,
        "max-block": 33554432,
        "contexts": ["base:allocation", "qemu:allocation-depth"],
        "transaction-size": "64-bit",
    }
