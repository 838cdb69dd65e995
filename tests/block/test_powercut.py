"""The disk that loses power: whatever a test builds on it is worth as much as its own rules."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.catalog import Catalog
from drivers.errors import OptionError
from drivers.testing.contract import NodeContract
from drivers.testing.memory import MemoryNode
from drivers.testing.powercut import SECTOR, PowerCutNode


class TestPowerCut(NodeContract):
    """Until the power is cut it is a disk like any other."""

    @asynccontextmanager
    async def opened(self, content: bytes, flags: OpenFlags, /) -> AsyncIterator[Node]:
        node = PowerCutNode(content, flags=flags)
        yield node
        await node.aclose()


def found(node: PowerCutNode, **arguments: int) -> set[bytes]:
    """Each sector as its first byte, for every state."""
    return {bytes(state[::SECTOR]) for state in node.states(**arguments)}


async def test_any_subset_of_the_sectors_may_be_lost() -> None:
    node = PowerCutNode(b"." * 3 * SECTOR)
    await node.write(0, b"a" * 2 * SECTOR)
    await node.write(2 * SECTOR, b"b" * SECTOR)
    assert found(node) == {b"...", b"a..", b".a.", b"aa.", b"..b", b"a.b", b".ab", b"aab"}


async def test_nothing_is_lost_that_was_flushed() -> None:
    node = PowerCutNode(b"." * 2 * SECTOR)
    await node.write(0, b"a" * SECTOR)
    await node.flush()
    assert found(node) == {b"a."}
    await node.write(SECTOR, b"b" * SECTOR)
    assert found(node) == {b"a.", b"ab"}


async def test_a_sector_written_twice_may_hold_either() -> None:
    node = PowerCutNode(b"." * SECTOR)
    await node.write(0, b"a" * SECTOR)
    await node.write(0, b"b" * SECTOR)
    assert found(node) == {b".", b"a", b"b"}


async def test_small_writes_to_a_sector_go_with_what_was_written_there_before() -> None:
    node = PowerCutNode(b"." * SECTOR)
    await node.write(0, b"a")
    await node.write(1, b"b")
    assert {bytes(state[:2]) for state in node.states()} == {b"..", b"a.", b"ab"}


async def test_zeroes_and_discards_may_be_lost_too() -> None:
    node = PowerCutNode(b"." * 2 * SECTOR)
    await node.write_zeroes(0, SECTOR)
    await node.discard(SECTOR, SECTOR)
    assert found(node) == {b"..", b"\0.", b".\0", b"\0\0"}


async def test_a_write_with_fua_is_there_and_others_still_need_not_be() -> None:
    node = PowerCutNode(b"." * 2 * SECTOR)
    await node.write(0, b"a" * SECTOR)
    await node.write(SECTOR, b"b" * SECTOR, fua=True)
    assert found(node) == {b".b", b"ab"}


async def test_a_write_with_fua_behind_the_flushed_end_makes_the_growth_durable() -> None:
    node = PowerCutNode(b"." * SECTOR)
    await node.truncate(3 * SECTOR)
    await node.write(2 * SECTOR, b"c" * SECTOR, fua=True)
    assert found(node) == {b".\0c"}


@pytest.mark.parametrize("way", ["grow", "truncate"])
async def test_growth_may_be_lost_with_what_was_written_there(way: str) -> None:
    node = PowerCutNode(b"." * SECTOR)
    if way == "grow":
        assert node.grow(2 * SECTOR)
    else:
        await node.truncate(2 * SECTOR)
    await node.write(SECTOR, b"b" * SECTOR)
    assert found(node) == {b".", b".\0", b".b"}


async def test_a_cut_file_may_be_whole_still_and_what_is_added_later_is_zero() -> None:
    node = PowerCutNode(b"ab" * (SECTOR // 2) + b"c" * SECTOR)
    await node.truncate(SECTOR // 2)
    await node.truncate(2 * SECTOR)
    await node.flush()
    [state] = node.states()
    assert state == (b"ab" * (SECTOR // 4)).ljust(2 * SECTOR, b"\0")


async def test_the_power_can_be_cut_after_every_single_write() -> None:
    node = PowerCutNode(b"." * 2 * SECTOR)
    await node.write(0, b"a" * SECTOR)
    await node.flush()
    await node.write(SECTOR, b"b" * SECTOR)
    seen = [(position, {bytes(state[::SECTOR]) for state in states}) for position, states in node.cuts()]
    assert seen == [(0, {b".."}), (1, {b"..", b"a."}), (2, {b"a."}), (3, {b"a.", b"ab"})]
    for position, states in seen:
        assert found(node, position=position) == states
    assert [position for position, _ in node.cuts(first=2)] == [2, 3]


async def test_of_very_many_states_the_extremes_and_some_others_are_chosen_by_the_seed() -> None:
    node = PowerCutNode(b"." * 100 * SECTOR)
    for sector in range(100):
        await node.write(sector * SECTOR, b"x" * SECTOR)
    states = [bytes(state[::SECTOR]) for state in node.states(limit=40, seed=5)]
    assert len(states) == 40
    assert {b"." * 100, b"x" * 100} <= set(states)
    assert {state.count(b"x") for state in states} >= {0, 1, 99, 100}
    assert len(set(states)) > 30
    assert states == [bytes(state[::SECTOR]) for state in node.states(limit=40, seed=5)]
    assert states != [bytes(state[::SECTOR]) for state in node.states(limit=40, seed=6)]


async def test_a_ready_node_can_be_put_into_a_graph() -> None:
    graph = Graph(Catalog())
    disk = PowerCutNode(b"." * SECTOR, name="disk")
    graph.add(disk)
    with pytest.raises(OptionError, match="Duplicate"):
        graph.add(MemoryNode(bytearray(1), name="disk"))
    raw = await graph.open({"driver": "raw", "file": "disk"})
    await raw.write(0, b"x")
    assert disk.content[:1] == b"x"
    await raw.aclose()
    assert not graph.nodes
