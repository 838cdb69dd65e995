"""The blocking facade."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from drivers.errors import ProtocolError, RequestError
from nbdclient import sync


def portals() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nbdclient"]


@pytest.mark.peer("nbdkit")
def test_all_operations_and_two_disks_at_once(peers: Any) -> None:
    with (
        sync.connect(peers.nbdkit("memory", "1M")) as first,
        sync.connect(peers.nbdkit("memory", "2M"), connections=2) as second,
    ):
        assert (first.size, second.size, second.connections) == (1 << 20, 2 << 20, 2)
        first.write(0, b"first" * 100, fua=first.can_fua)
        second.write(0, first.read(0, 500))
        second.zero(0, 5)
        second.flush()
        buffer = bytearray(10)
        second.read_into(0, buffer)
        assert buffer == bytes(5) + b"first"
        second.trim(1 << 20, 4096)
        first.cache(0, 4096)
        assert first.block_status(0, 4096)["base:allocation"]
        assert sum(extent.length for extent in second.extents()) == second.size


@pytest.mark.peer("nbdkit")
def test_the_blocks_own_error_comes_out_as_it_is(peers: Any) -> None:
    uri = peers.nbdkit("memory", "1M")
    with pytest.raises(ZeroDivisionError), sync.connect(uri):
        raise ZeroDivisionError
    with pytest.raises(RequestError), sync.connect(uri) as disk:
        disk.read(1 << 20, 1)
    with pytest.raises(ProtocolError, match="closed"):
        disk.read(0, 1)


def test_a_failed_connect_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(RequestError), sync.connect(f"nbd+unix:///?socket={tmp_path}/none"):
        pass
    assert not portals()


@pytest.mark.peer("nbdkit")
def test_an_interrupt_ends_a_waiting_request_and_the_block(peers: Any) -> None:
    uri = peers.nbdkit("--filter=delay", "memory", "1M", "delay-read=60")
    interrupt = threading.Timer(0.1, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    with pytest.raises(KeyboardInterrupt), sync.connect(uri) as disk:
        interrupt.start()
        disk.read(0, 512)
    interrupt.join()
    assert not portals()
    peers.stop(signal.SIGKILL)


@pytest.mark.peer("nbdkit")
def test_listing(peers: Any) -> None:
    uri = peers.nbdkit("memory", "1M")
    assert [export.name for export in sync.list_exports(uri)] == [""]
    assert sync.info(uri).size == sync.describe_exports(uri)[0].size == 1 << 20
