"""Sizes; compared with the real qemu-img where it is installed."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import OptionError
from drivers.units import format_size, parse_number, parse_size

GOOD = {
    "0": 0,
    "1": 1,
    "1b": 1,
    "4096": 4096,
    "64k": 65536,
    "64K": 65536,
    "1.5G": 3 << 29,
    "1.": 1,
    "1.k": 1024,
    "1.0": 1,
    "0.0k": 0,
    "0.1k": 102,
    "0.3333k": 341,
    "0x200": 512,
    "0X1F": 31,
    "0x1b": 27,
    "0x1E": 30,
    "0x200k": 524288,
    "010": 10,
    " 1k": 1024,
    "+1k": 1024,
    "1t": 1 << 40,
    "7.9999999999E": 9223372036739483648,
}
BAD = [
    "", "k", "abc", ".5k", "-1", "1.5", "1.5b", "0x", "0x1.8", "1kb", "1KiB", "1e3", "1e3k", "1 k", "1k ",
    "1.k2", "nan", "inf", "0xg", "+-1", "1_000", "\u0661",
]  # fmt: skip
TOO_LARGE = ["16E", "18446744073709551616", "99999999999999999999999", "0x10000000000000000", "17179869184G"]


@pytest.mark.parametrize("text", GOOD)
def test_size(text):
    assert parse_size(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_not_a_size(text):
    with pytest.raises(OptionError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", TOO_LARGE)
def test_too_large(text):
    with pytest.raises(OptionError, match="too large"):
        parse_size(text)


def test_the_largest():
    assert parse_size("18446744073709551615") == (1 << 64) - 1


@pytest.mark.parametrize("text", ["9" * 100_000, "0x" + "f" * 100_000, "1." + "9" * 100_000 + "k"])
def test_very_long_text_is_refused_in_a_short_line(text):
    with pytest.raises(OptionError) as caught:
        parse_size(text)
    assert len(str(caught.value)) < 300


def test_another_unit():
    assert parse_size("2", unit="M") == 2 << 20
    assert parse_size("2k", unit="M") == 2048
    assert parse_size("1.5", unit="k") == 1536


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("text", [*GOOD, *BAD, *TOO_LARGE])
def test_qemu_img_agrees(text, tmp_path):
    # measure computes from the size without making the file; a raw image needs what it holds.
    command = ["qemu-img", "measure", "-O", "raw", f"--size={text}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        expected = parse_size(text)
    except OptionError:
        assert run.returncode == 1
    else:
        assert f"required size: {(expected + 511) // 512 * 512}\n" in run.stdout


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1000448, "977 KiB"),
        (1022976, "999 KiB"),
        (1024000, "0.977 MiB"),
        (10 << 30, "10 GiB"),
        ((1 << 64) - 1, "16 EiB"),
    ],
)
def test_sizes_for_people(size, text):
    assert format_size(size) == text


@given(st.integers(0, (1 << 64) - 1))
def test_plain_numbers_and_hexadecimal(size):
    assert parse_size(str(size)) == parse_size(hex(size)) == size


@given(st.integers(1, (1 << 53) - 1), st.sampled_from("kMG"))
def test_fractions_are_exact_where_they_end_on_a_byte(size, suffix):
    shift = {"k": 10, "M": 20, "G": 30}[suffix]
    digits = (size % (1 << shift)) * 10**shift >> shift
    assert parse_size(f"{size >> shift}.{digits:0{shift}d}{suffix}") == size


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("10", 10),
        ("010", 8),
        ("0x10", 16),
        (" 5", 5),
        ("+5", 5),
        ("100", 100),
        ("101", None),
        ("-1", None),
        ("", None),
        ("x", None),
        ("08", None),
        ("1k", None),
        ("5 ", None),
        ("9" * 5000, None),
    ],
)
def test_numbers_as_c_reads_them(text, number):
    assert parse_number(text, high=100) == number


def test_negative_numbers_where_they_are_allowed():
    assert parse_number("-0x10", low=-16, high=0) == -16
