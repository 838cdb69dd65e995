"""Finding zeroes, against looking at every byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbdclient.image.zeroes import data_runs


def slowly(buffer: bytes, length: int, granule: int, minimum: int, phase: int) -> list[tuple[int, int]]:
    zeroes: list[tuple[int, int]] = []
    if not any(buffer[:length]):
        return []
    start = -phase % granule
    while start < length:
        end = min(start + granule, length)
        if (end - start == granule or start) and not any(buffer[start:end]):
            if zeroes and zeroes[-1][1] == start:
                start = zeroes.pop()[0]
            zeroes.append((start, end))
        start = end
    data, done = [], 0
    for start, end in zeroes:
        if end - start >= minimum or end == length:
            if start > done:
                data.append((done, start))
            done = end
    return [*data, (done, length)] if done < length else data


@given(
    granule=st.sampled_from([512, 1024, 4096]),
    length=st.integers(1, 30000),
    behind=st.integers(0, 600),
    phase=st.integers(0, 20).map(lambda sectors: sectors * 512),
    least=st.integers(1, 4),
    marks=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 6000)), max_size=6),
)
def test_every_byte_that_is_not_zero_is_data(granule, length, behind, phase, least, marks):
    buffer = bytearray(length + behind)
    for where, size in marks:
        start = int(where * (length - 1))
        end = min(start + size, len(buffer))
        buffer[start:end] = b"\1" * (end - start)
    found = list(data_runs(buffer, length, granule=granule, minimum=least * granule, phase=phase))
    assert found == slowly(buffer, length, granule, least * granule, phase)
