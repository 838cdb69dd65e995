import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import OptionError
from drivers.options.keyval import parse_keyval


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("", {}),
        ("driver=raw", {"driver": "raw"}),
        ("driver=raw,", {"driver": "raw"}),
        ("file.filename=a,,b", {"file": {"filename": "a,b"}}),
        ("a=,,", {"a": ","}),
        ("a=1,,,b=2", {"a": "1,", "b": "2"}),
        ("a=x=y", {"a": "x=y"}),
        ("a=1,a=2", {"a": "2"}),
        ("a.b.c=1,a.b.d=2,a.e=3", {"a": {"b": {"c": "1", "d": "2"}, "e": "3"}}),
        ("e.1.file=y,e.0.file=x", {"e": [{"file": "x"}, {"file": "y"}]}),
        ("e.0=x", {"e": ["x"]}),
        ("x-a_b.cache-size=1", {"x-a_b": {"cache-size": "1"}}),
    ],
)
def test_reads(text, tree):
    assert parse_keyval(text) == tree


def test_a_first_value_may_stand_alone():
    assert parse_keyval("secret,id=a", implied_key="qom-type") == {"qom-type": "secret", "id": "a"}
    assert parse_keyval("id=a", implied_key="qom-type") == {"id": "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("driver", "Expected '=' after parameter 'driver'"),
        ("a=1,b", "Expected '=' after parameter 'b'"),
        (",a=1", "Parameter name missing"),
        ("=1", "Invalid parameter ''"),
        ("a..b=1", "Invalid parameter 'a..b'"),
        (".a=1", "Invalid parameter '.a'"),
        ("a.=1", "Invalid parameter 'a.'"),
        ("0=1", "Invalid parameter '0'"),
        ("a.01=1", "Invalid parameter 'a.01'"),
        ("a b=1", "Invalid parameter 'a b'"),
        ("ä=1", "Invalid parameter 'ä'"),
        ("a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
        ("a.b=2,a=1", "Parameters 'a.*' used inconsistently"),
        ("a.b.c=2,a.b=1", "Parameters 'a.b.*' used inconsistently"),
        ("a.0=1,a.b=2", "Parameters 'a.*' used inconsistently"),
        ("a.0=1,a.2=2", "Parameter 'a.1' missing"),
        ("a.99999999999=1", "Parameter 'a.0' missing"),
        ("k" * 128 + "=1", "Invalid parameter '" + "k" * 128 + "'"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(OptionError) as caught:
        parse_keyval(text)
    assert str(caught.value) == message


def test_nesting_is_bounded():
    parse_keyval("a" + ".a" * 255 + "=1")
    with pytest.raises(OptionError, match="nested too deeply"):
        parse_keyval("a" + ".a" * 256 + "=1")


KEYS = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True)
LEAVES = st.text(max_size=12)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda below: st.lists(below, min_size=1, max_size=4) | st.dictionaries(KEYS, below, min_size=1),
        max_leaves=12,
    ),
)


def written(value, prefix):
    if isinstance(value, str):
        escaped = value.replace(",", ",,")
        yield f"{prefix}={escaped}"
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield from written(item, f"{prefix}.{key}" if prefix else str(key))


@given(TREES)
def test_what_is_written_is_read_back(tree):
    assert parse_keyval(",".join(written(tree, ""))) == tree


@given(st.text(st.sampled_from("a.=,01")))
def test_any_text_is_read_or_refused(text):
    try:
        tree = parse_keyval(text)
    except OptionError:
        return
    assert isinstance(tree, dict)
