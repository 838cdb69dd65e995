"""What every driver's node must do. A driver's test inherits NodeContract and says how to open one."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest
import trio

from drivers.block.extents import ExtentFlags
from drivers.block.node import Node, OpenFlags
from drivers.errors import RequestError
from drivers.testing.model import check_plain, check_status, contents

Call: TypeAlias = Callable[[], Awaitable[object]]

# Not a multiple of any block size, so that every driver shows what it does with its tail.
SIZE = (1 << 20) + 700


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes of which no two blocks are alike."""
    return random.Random(seed).randbytes(length)


class NodeContract:
    """Inherit, call the class Test..., and define opened().

    `granularity`: what image sizes must be multiples of. `resizable`: truncate() works.
    """

    granularity = 1
    resizable = True
    tmp_path: Path

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path

    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        """A node that reads as `content`, closed at the end if the test did not do it."""
        raise NotImplementedError
        yield

    @property
    def size(self) -> int:
        return SIZE // self.granularity * self.granularity

    @asynccontextmanager
    async def with_pattern(self, flags: OpenFlags | None = None) -> AsyncIterator[tuple[Node, bytearray]]:
        content = pattern(self.size)
        async with self.opened(content, flags or OpenFlags(discard=True)) as node:
            yield node, bytearray(content)

    async def test_it_has_the_size_and_the_content_it_was_made_with(self) -> None:
        async with self.with_pattern() as (node, model):
            assert node.size == self.size
            assert await contents(node) == model
            check_plain(node, model, 0, len(model))

    @pytest.mark.parametrize(
        ("offset", "length"),
        [
            (0, 1),
            (1, 511),
            (511, 2),
            (513, 4096),
            (4096, 4096),
            (65535, 70001),
            (-1, 1),
            (-701, 701),
            (-5000, 4999),
        ],
    )
    async def test_reads_and_writes_of_any_alignment_touch_their_range_alone(
        self, offset: int, length: int
    ) -> None:
        async with self.with_pattern() as (node, model):
            offset %= self.size
            found = bytearray(length)
            await node.read_into(offset, found)
            assert found == model[offset : offset + length]
            check_plain(node, model, offset, length)
            data = pattern(length, seed=1)
            await node.write(offset, data)
            model[offset : offset + length] = data
            assert await contents(node) == model
            check_plain(node, model, offset, length)
            assert node.size == self.size

    @pytest.mark.parametrize("may_unmap", [False, True])
    @pytest.mark.parametrize(
        ("offset", "length"), [(0, 65536), (1, 1), (700, 131072), (4095, 4098), (-70000, 70000), (-700, 699)]
    )
    async def test_zeroed_ranges_read_as_zeroes_and_their_neighbours_stay(
        self, offset: int, length: int, may_unmap: bool
    ) -> None:
        async with self.with_pattern() as (node, model):
            offset %= self.size
            await node.write_zeroes(offset, length, may_unmap=may_unmap)
            model[offset : offset + length] = bytes(length)
            assert await contents(node) == model
            check_plain(node, model, 0, self.size)
            await check_status(node, model)
            assert node.size == self.size

    async def test_a_fast_zero_either_works_or_changes_nothing(self) -> None:
        async with self.with_pattern() as (node, model):
            try:
                await node.write_zeroes(65536, 65536, fast=True)
                model[65536:131072] = bytes(65536)
            except OSError as error:
                assert error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP)
            assert await contents(node) == model

    async def test_a_discard_leaves_what_lies_outside_it(self) -> None:
        async with self.with_pattern() as (node, model):
            await node.discard(70000, 200001)
            found = await contents(node)
            assert found[:70000] == model[:70000]
            assert found[270001:] == model[270001:]
            await check_status(node, found)

    async def test_without_discard_the_content_stays(self) -> None:
        async with self.with_pattern(OpenFlags(discard=False)) as (node, model):
            await node.discard(0, self.size)
            assert await contents(node) == model

    async def test_block_status_covers_the_image(self) -> None:
        async with self.with_pattern() as (node, model):
            await check_status(node, model)
            assert await node.block_status(5, 0) == []
            extents = await node.block_status(1001, 3)
            assert sum(extent.length for extent in extents) == 3

    async def test_what_was_written_durably_is_there_when_opened_again(self) -> None:
        async with self.with_pattern() as (node, model):
            await node.write(300, b"durable", fua=True)
            await node.write_zeroes(5000, 5000, fua=True)
            await node.flush()
            model[300:307] = b"durable"
            model[5000:10000] = bytes(5000)
            assert await contents(node) == model

    @pytest.mark.parametrize(
        ("offset", "length"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (1 << 63, 1), (SIZE - 1, 2), (5, 1 << 64)]
    )
    async def test_ranges_outside_the_image_are_refused(self, offset: int, length: int) -> None:
        async with self.with_pattern() as (node, model):
            calls: list[Call] = [
                lambda: node.write_zeroes(offset, length),
                lambda: node.discard(offset, length),
                lambda: node.block_status(offset, length),
                lambda: node.cache(offset, length),
            ]
            if length <= 2:
                calls.append(lambda: node.read_into(offset, bytearray(length)))
                calls.append(lambda: node.write(offset, bytes(length)))
            for call in calls:
                with pytest.raises(RequestError) as caught:
                    await call()
                assert caught.value.errno == errno.EINVAL
            assert await contents(node) == model

    async def test_empty_requests_do_nothing(self) -> None:
        async with self.with_pattern() as (node, model):
            for offset in (0, 77, self.size):
                await node.read_into(offset, bytearray())
                await node.write(offset, b"")
                await node.write_zeroes(offset, 0)
                await node.discard(offset, 0)
                await node.cache(offset, 0)
            assert await contents(node) == model

    async def test_a_read_only_image_refuses_to_change(self) -> None:
        async with self.with_pattern(OpenFlags(read_only=True, discard=True)) as (node, model):
            calls: list[Call] = [
                lambda: node.write(0, b"x"),
                lambda: node.write_zeroes(0, 512),
                lambda: node.discard(0, 512),
                lambda: node.truncate(0),
            ]
            for call in calls:
                with pytest.raises(RequestError) as caught:
                    await call()
                assert caught.value.errno in (errno.EPERM, errno.EACCES)
            assert node.plain_write(0, 512) is None
            await node.flush()
            assert await contents(node) == model

    async def test_a_closed_image_answers_nothing(self) -> None:
        async with self.with_pattern() as (node, _):
            await node.aclose()
            await node.aclose()
            calls: list[Call] = [
                lambda: node.read_into(0, bytearray(1)),
                lambda: node.write(0, b"x"),
                lambda: node.write_zeroes(0, 512),
                lambda: node.block_status(0, 1),
                lambda: node.flush(),
                lambda: node.truncate(0),
            ]
            for call in calls:
                with pytest.raises(RequestError) as caught:
                    await call()
                assert caught.value.errno == errno.ENOMEDIUM
            assert node.plain(0, 512) is None
            assert node.plain_write(0, 512) is None

    async def test_neighbouring_bytes_written_at_once_do_not_lose_each_other(self) -> None:
        """Each writer reads, modifies and writes the same blocks as its neighbours."""
        async with self.with_pattern() as (node, model):
            async with trio.open_nursery() as nursery:
                for index in range(64):
                    offset = 1000 + 37 * index
                    nursery.start_soon(node.write, offset, bytes([index]) * 37)
                    model[offset : offset + 37] = bytes([index]) * 37
                nursery.start_soon(node.write_zeroes, 1000 + 37 * 64, 1801)
            model[1000 + 37 * 64 : 1000 + 37 * 64 + 1801] = bytes(1801)
            assert await contents(node) == model

    async def test_after_a_cancelled_request_the_node_goes_on(self) -> None:
        async with self.with_pattern() as (node, model):
            before = bytes(model)
            async with trio.open_nursery() as nursery:
                for index in range(8):
                    nursery.start_soon(node.write, 3001 + 600 * index, b"c" * 600)
                    nursery.start_soon(node.read_into, 3001 + 600 * index, bytearray(600))
                await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            found = await contents(node)
            assert found[:3001] == before[:3001]
            assert found[7801:] == before[7801:]
            for index in range(8):
                start = 3001 + 600 * index
                assert found[start : start + 600] in (b"c" * 600, before[start : start + 600])
            await node.write(0, b"alive")
            model = bytearray(found)
            model[:5] = b"alive"
            assert await contents(node) == model

    async def test_truncate_cuts_and_adds_zeroes(self) -> None:
        async with self.with_pattern() as (node, model):
            unit = self.granularity
            shorter, longer = self.size // 2 // unit * unit, (self.size * 2 + unit) // unit * unit
            if not self.resizable:
                with pytest.raises(RequestError):
                    await node.truncate(longer)
                assert (node.size, await contents(node)) == (self.size, model)
                return
            await node.truncate(shorter)
            assert (node.size, await contents(node)) == (shorter, model[:shorter])
            await node.truncate(longer)
            expected = model[:shorter] + bytes(longer - shorter)
            assert (node.size, await contents(node)) == (longer, expected)
            check_plain(node, expected, 0, longer)
            await check_status(node, expected)

    async def test_zero_detection_writes_zeroes_that_read_so(self) -> None:
        async with self.with_pattern(OpenFlags(discard=True, detect_zeroes="unmap")) as (node, model):
            await node.write(65536, bytes(65536))
            model[65536:131072] = bytes(65536)
            assert node.plain_write(0, 512) is None
            assert await contents(node) == model
            extents = await node.block_status(65536, 65536)
            assert all(extent.flags & (ExtentFlags.ZERO | ExtentFlags.DATA) for extent in extents)
