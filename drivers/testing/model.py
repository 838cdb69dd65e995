"""A node against a bytearray: what it must read as, whatever was done to it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hypothesis import strategies

from drivers.block.extents import ExtentFlags
from drivers.block.limits import MAX_REQUEST
from drivers.block.node import Node


async def contents(node: Node) -> bytearray:
    """All that the node reads as, read by requests."""
    found = bytearray(b"\xee" * node.size)
    for offset in range(0, node.size, MAX_REQUEST):
        await node.read_into(offset, memoryview(found)[offset : offset + MAX_REQUEST])
    return found


def check_plain(node: Node, model: bytes | bytearray, offset: int, length: int) -> None:
    """Whatever plain() answers must add up to the range and hold the model's bytes."""
    spans = node.plain(offset, length)
    if spans is None:
        return
    assert sum(span[2] for span in spans) == length
    for fd, host_offset, span_length in spans:
        assert span_length > 0
        found = bytes(span_length) if fd < 0 else os.pread(fd, span_length, host_offset)
        # A file may end inside the node: what is missing is zeroes.
        assert found.ljust(span_length, b"\0") == model[offset : offset + span_length]
        offset += span_length


def write_plain(node: Node, offset: int, data: bytes) -> bool:
    """Write where the node says that the bytes lie, if it does."""
    spans = node.plain_write(offset, len(data))
    if spans is None:
        return False
    assert sum(span[2] for span in spans) == len(data)
    for fd, host_offset, length in spans:
        assert fd >= 0
        assert os.pwrite(fd, data[:length], host_offset) == length
        data = data[length:]
    return True


async def check_status(node: Node, model: bytes | bytearray) -> None:
    """block_status() covers the node without gaps, and what it calls zero is zero."""
    offset = 0
    while offset < node.size:
        extents = await node.block_status(offset, node.size - offset)
        assert extents
        for extent in extents:
            assert extent.length > 0
            if extent.flags & ExtentFlags.ZERO:
                assert not any(model[offset : offset + extent.length])
            offset += extent.length
        assert offset <= node.size


@dataclass(frozen=True)
class Operation:
    """One step; `offset` and `length` are taken modulo what the node has at that moment."""

    kind: str
    offset: int
    length: int
    fill: int
    flag: bool


BASIC_KINDS = ("read", "write", "write", "write-plain", "zero", "discard", "flush", "truncate")


def operations(
    kinds: tuple[str, ...] = BASIC_KINDS,
    *,
    max_size: int = 1 << 18,
) -> strategies.SearchStrategy[list[Operation]]:
    """Sequences of steps, biased towards the edges of blocks."""
    edges = strategies.sampled_from([0, 1, 511, 512, 513, 4095, 4096, 4097, 65536])
    number = strategies.integers(0, max_size) | edges
    step = strategies.builds(
        Operation,
        kind=strategies.sampled_from(kinds),
        offset=number,
        length=number,
        fill=strategies.integers(0, 255),
        flag=strategies.booleans(),
    )
    return strategies.lists(step, max_size=20)


async def replay(node: Node, model: bytearray, steps: list[Operation]) -> None:
    """Do `steps` to the node and to `model`, comparing after each. Discarded bytes may read as
    anything outside the model's knowledge, so the model takes them over."""
    for step in steps:
        await do(node, model, step)


async def do(node: Node, model: bytearray, step: Operation) -> tuple[int, int]:
    """One step; the range that it was about."""
    offset = step.offset % (node.size + 1)
    length = min(step.length, node.size - offset)
    await _STEPS[step.kind](node, model, step, offset, length)
    assert node.size == len(model)
    assert await contents(node) == model
    if step.kind != "truncate" and length:
        check_plain(node, model, offset, length)
    await check_status(node, model)
    return offset, length


async def _read(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    found = bytearray(length)
    await node.read_into(offset, found)
    assert found == model[offset : offset + length]


async def _write(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    data = bytes([step.fill]) * length
    await node.write(offset, data, fua=step.flag)
    model[offset : offset + length] = data


async def _write_plain(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    data = bytes([step.fill]) * length
    if length and write_plain(node, offset, data):
        model[offset : offset + length] = data


async def _zero(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    await node.write_zeroes(offset, length, may_unmap=step.flag)
    model[offset : offset + length] = bytes(length)


async def _discard(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    await node.discard(offset, length)
    await node.read_into(offset, memoryview(model)[offset : offset + length])


async def _flush(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    await node.flush()


async def _truncate(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    await node.truncate(step.offset)
    del model[step.offset :]
    model.extend(bytes(step.offset - len(model)))


_STEPS: dict[str, Callable[[Node, bytearray, Operation, int, int], Awaitable[None]]] = {
    "read": _read,
    "write": _write,
    "write-plain": _write_plain,
    "zero": _zero,
    "discard": _discard,
    "flush": _flush,
    "truncate": _truncate,
}
