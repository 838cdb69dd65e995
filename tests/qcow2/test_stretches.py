"""Stretches of table entries and of counts."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.format.qcow2.counts import changed, pack_counts, uniform, unpack_counts
from drivers.format.qcow2.stretches import stretch_end

CLUSTER = 65536


@given(
    runs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), min_size=1, max_size=5),
    step=st.sampled_from([0, CLUSTER]),
    data=st.data(),
)
def test_a_stretch_never_reaches_too_far(runs, step, data):
    entries = array("Q")
    for first, count in runs:
        entries.extend(first * CLUSTER + number * step for number in range(count))
    at = data.draw(st.integers(0, len(entries) - 1))
    end = data.draw(st.integers(at + 1, len(entries)))
    whole = at + 1
    while whole < end and entries[whole] == entries[whole - 1] + step:
        whole += 1
    found = stretch_end(entries, at, end, step)
    assert at < found <= whole
    assert (found == end) == (whole == end)


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("value", [0, 1])
def test_counts_change_together_or_one_by_one(order, value):
    counts = unpack_counts(bytes(80), order)
    maximum = (1 << (1 << order)) - 1
    counts[3:9] = array(counts[:1].typecode, [value] * 6)
    assert uniform(counts[3:9]) == value
    after, wrong = changed(counts[3:9], 1, maximum)
    if value + 1 > maximum:
        assert wrong == 0
        return
    assert wrong is None
    counts[3:9] = after
    assert list(unpack_counts(pack_counts(counts), order)[2:10]) == [0, *[value + 1] * 6, 0]
    mixed, wrong = changed(counts[2:10], -1, maximum)
    assert wrong == 0
    assert list(changed(counts[2:10], 0, maximum)[0]) == list(mixed)
