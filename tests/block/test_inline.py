"""Reading and writing the page cache in place: all of it, or nothing at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivers.block.extents import Span
from drivers.block.inline import read_now, write_now
from drivers.block.node import OpenFlags
from drivers.block.pace import Pace
from drivers.testing.memory import MemoryNode


class Pieces(MemoryNode):
    """Claims to lie in these pieces of files."""

    pieces: list[Span] | None = None

    def _plain(self, offset: int, length: int, /) -> list[Span] | None:
        return self.pieces

    _plain_write = _plain


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(number, b"0123456789")
    yield number
    os.close(number)


def test_a_read_joins_the_pieces(fd: int) -> None:
    node, buffer = Pieces(bytearray(10)), bytearray(b"x" * 8)
    node.pieces = [(fd, 2, 3), (-1, 0, 2), (fd, 0, 3)]
    assert read_now(node, 0, memoryview(buffer))
    assert buffer == b"234\0\x00012"


@pytest.mark.parametrize("where", [(None), (8,), (100,)])
def test_a_read_that_would_have_to_wait_or_ends_early_is_left_to_others(
    fd: int, where: tuple[int] | None
) -> None:
    node = Pieces(bytearray(10))
    node.pieces = where and [(fd, where[0], 4)]
    assert not read_now(node, 0, memoryview(bytearray(4)))


def test_a_read_that_fails_is_left_to_others() -> None:
    node = Pieces(bytearray(10))
    node.pieces = [(1 << 20, 0, 4)]
    assert not read_now(node, 0, memoryview(bytearray(4)))


def test_a_write_fills_the_pieces(fd: int) -> None:
    node = Pieces(bytearray(10))
    node.pieces = [(fd, 8, 4), (fd, 1, 2)]
    assert write_now(node, 0, memoryview(b"abcdef"), Pace())
    assert os.pread(fd, 100, 0) == b"0ef34567abcd"


def test_a_write_is_left_to_others_where_it_may_stall_or_must_not_be_plain(fd: int) -> None:
    node, slow = Pieces(bytearray(10)), Pace()
    node.pieces = [(fd, 0, 2)]
    slow.note(1.0)
    assert not write_now(node, 0, memoryview(b"ab"), slow)
    read_only = Pieces(bytearray(10), flags=OpenFlags(read_only=True))
    read_only.pieces = node.pieces
    assert not write_now(read_only, 0, memoryview(b"ab"), Pace())
    assert os.pread(fd, 100, 0) == b"0123456789"
    with pytest.raises(OSError):
        node.pieces = [(1 << 20, 0, 2)]
        write_now(node, 0, memoryview(b"ab"), Pace())
