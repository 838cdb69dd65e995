import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import OptionError
from drivers.options.pseudo import filename_options, parse_json_pseudo

PREFIXES = {"file": "file", "host_device": "host_device", "nbd": "nbd", "null-co": "null-co", "ssh": "ssh"}


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("disk.raw", {"driver": "file", "filename": "disk.raw"}),
        ("/a/b:c", {"driver": "file", "filename": "/a/b:c"}),
        ("./a:b", {"driver": "file", "filename": "./a:b"}),
        ("file:a:b", {"driver": "file", "filename": "a:b"}),
        ("host_device:/dev/sda", {"driver": "host_device", "filename": "/dev/sda"}),
        ("null-co://", {"driver": "null-co"}),
        ("ssh://host/p", {"driver": "ssh", "filename": "ssh://host/p"}),
        (
            "nbd:localhost:10810:exportname=a",
            {
                "driver": "nbd",
                "server": {"type": "inet", "host": "localhost", "port": "10810"},
                "export": "a",
            },
        ),
        ("json:{}", {}),
    ],
)
def test_a_file_name_becomes_options(name, tree):
    assert filename_options(name, PREFIXES) == tree


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xyz:abc", "Unknown protocol 'xyz'"),
        (":abc", "Unknown protocol ''"),
        ("", "The 'file' block driver requires a file name"),
        ("file:", "The 'file' block driver requires a file name"),
        ("null-co:foo", "The only allowed filename for this driver is 'null-co://'"),
    ],
)
def test_a_bad_file_name_is_refused(name, message):
    with pytest.raises(OptionError) as caught:
        filename_options(name, PREFIXES)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ('{"a.b": 1, "a": {"c": true}}', {"a": {"b": 1, "c": True}}),
        ('{"a": {"b.c": null, "d": []}}', {"a": {"b": {"c": None}, "d": []}}),
        ('{"e": ["x", {"f": 2}]}', {"e": ["x", {"f": 2}]}),
        ('{"e.1": "y", "e.0": "x"}', {"e": ["x", "y"]}),
        ('{"a": {}}', {"a": {}}),
        ('{"a": {}, "a.b": 1}', {"a": {"b": 1}}),
        ("{'driver': 'raw', 'n': 'it\\'s \"so\"'}", {"driver": "raw", "n": 'it\'s "so"'}),
        ('{"a": "it\'s"}', {"a": "it's"}),
    ],
)
def test_json_becomes_options(text, tree):
    assert parse_json_pseudo("json:" + text) == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Could not parse the JSON options: Expecting a JSON value"),
        ("{", "Could not parse the JSON options: JSON parse error, premature EOI"),
        ("[]", "Invalid JSON object given"),
        ("5", "Invalid JSON object given"),
        ("null", "Invalid JSON object given"),
        ('{"a": 1, "a": 2}', "Could not parse the JSON options: JSON parse error, duplicate key"),
        ('{"a": NaN}', "Could not parse the JSON options: JSON parse error, invalid keyword 'NaN'"),
        ('{"a": {"b": 1}, "a.b": {"c": 1}}', "Parameters 'a.b.*' used inconsistently"),
        ('{"a": 1, "a.b": 2}', "Parameters 'a.*' used inconsistently"),
        ('{"e": ["x"], "e.2": "y"}', "Parameter 'e.1' missing"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(OptionError) as caught:
        parse_json_pseudo("json:" + text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a":' * 300 + "1" + "}" * 300,
        '{"' + "a." * 300 + 'a":1}',
        '{"a":' + "9" * 5000 + "}",
        '{"a":"' + "x" * (1 << 20) + '"}',
        "{'a':1} x",
        "{'a",
    ],
)
def test_hostile_json_is_refused_in_one_line(text):
    with pytest.raises(OptionError) as caught:
        parse_json_pseudo("json:" + text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


KEYS = st.from_regex(r"[a-z][a-z-]{0,6}", fullmatch=True)
LEAVES = st.text(max_size=8) | st.integers() | st.booleans() | st.none()
TREES = st.dictionaries(
    KEYS,
    st.recursive(LEAVES, lambda below: st.lists(below) | st.dictionaries(KEYS, below), max_leaves=12),
)


@given(TREES)
def test_json_written_by_json_is_read_back(tree):
    assert parse_json_pseudo("json:" + json.dumps(tree)) == tree


@given(st.text(st.sampled_from("{}[]\"':,a.01\\ ")))
def test_any_text_is_read_or_refused(text):
    try:
        tree = filename_options("json:" + text, PREFIXES)
    except OptionError:
        return
    assert isinstance(tree, dict)
