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


def operations(
    kinds: tuple[str, ...] = ("read", "write", "write", "zero", "discard", "flush", "truncate"),
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
        offset = step.offset % (node.size + 1)
        length = min(step.length, node.size - offset)
        await _STEPS[step.kind](node, model, step, offset, length)
        assert node.size == len(model)
        assert await contents(node) == model
        if step.kind != "truncate" and length:
            check_plain(node, model, offset, length)
        await check_status(node, model)


async def _read(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    found = bytearray(length)
    await node.read_into(offset, found)
    assert found == model[offset : offset + length]


async def _write(node: Node, model: bytearray, step: Operation, offset: int, length: int) -> None:
    data = bytes([step.fill]) * length
    await node.write(offset, data, fua=step.flag)
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
    "zero": _zero,
    "discard": _discard,
    "flush": _flush,
    "truncate": _truncate,
}
