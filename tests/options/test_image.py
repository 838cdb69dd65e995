import pytest

from drivers.errors import OptionError
from drivers.options.image import complete_options, image_options, set_file_default

PREFIXES = {"file": "file", "nbd": "nbd", "null-co": "null-co", "host_device": "host_device"}
FILE = {"driver": "file", "filename": "x"}


def test_without_a_format_the_file_is_to_be_probed():
    assert image_options("x", None, PREFIXES) == {"file": FILE}


def test_a_format_goes_on_top_of_the_protocol():
    assert image_options("x", "raw", PREFIXES) == {"driver": "raw", "file": FILE}
    assert image_options("null-co://", "raw", PREFIXES) == {"driver": "raw", "file": {"driver": "null-co"}}


def test_a_protocol_named_as_the_format_is_used_alone():
    assert image_options("x", "host_device", PREFIXES) == {"driver": "host_device", "filename": "x"}


def test_json_says_it_all_but_an_explicit_format_wins():
    name = 'json:{"driver": "qcow2", "file.filename": "x"}'
    assert image_options(name, None, PREFIXES) == {"driver": "qcow2", "file": FILE}
    assert image_options(name, "raw", PREFIXES) == {"driver": "raw", "file": FILE}


def test_file_names_inside_options_may_have_a_protocol():
    tree = {"driver": "raw", "file": {"filename": "nbd:unix:/s", "reconnect-delay": "1"}}
    assert complete_options(tree, PREFIXES) == {
        "driver": "raw",
        "file": {"driver": "nbd", "server": {"type": "unix", "path": "/s"}, "reconnect-delay": "1"},
    }
    assert complete_options({"file": FILE}, PREFIXES) == {"file": FILE}
    assert complete_options({"file": {"driver": "file", "filename": "nbd:x"}}, PREFIXES) == {
        "file": {"driver": "file", "filename": "nbd:x"}
    }


def test_options_that_lead_nowhere():
    for tree in ({}, {"filename": "x"}, {"offset": "1"}):
        with pytest.raises(OptionError, match="Must specify either driver or file"):
            complete_options(tree, PREFIXES)


def test_a_default_reaches_the_host_file_only():
    tree = {"driver": "qcow2", "file": {"driver": "raw", "file": dict(FILE)}}
    set_file_default(tree, "aio", "native")
    assert tree["file"]["file"] == {**FILE, "aio": "native"}
    set_file_default(tree, "aio", "threads")
    assert tree["file"]["file"]["aio"] == "native"
    tree = {"driver": "nbd", "server": {}}
    set_file_default(tree, "aio", "native")
    assert tree == {"driver": "nbd", "server": {}}
