"""What one client leaves half done is no other client's business."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivers.wire.nbd.constants import Command, CommandFlag
from tests.hostile.client import STYLES
from tests.hostile.conftest import Serve, tcp_listener, unix_listener

MIB = 1 << 20


@pytest.fixture(params=["unix", "tcp"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    return tcp_listener() if request.param == "tcp" else unix_listener(tmp_path / "listener")


@pytest.mark.parametrize("style", STYLES)
def test_a_client_that_stops_in_the_middle_of_a_write(
    serve: Serve, disk: Path, listener: object, style: str
) -> None:
    """Others write there, even less than a sector of an image whose format was probed, which takes a
    read-modify-write that nothing else may overlap."""
    server = serve("-t", "-e", "0", str(disk), listener=listener)
    with server.good(style) as bad, server.good() as good:
        bad.send(bad.begin(Command.WRITE, MIB, 31 * MIB), b"x" * (1 * MIB))
        for offset in (3, MIB + 1_600_001, 20 * MIB + 5):
            assert good.write(offset, b"good", CommandFlag.FUA) == 0
            assert good.read(offset, 4) == b"good"
        assert good.flush() == 0
        # It goes on after all, and is answered.
        bad.send(b"y" * (30 * MIB))
        assert bad.reply().error == 0
        assert good.read(2 * MIB, 30 * MIB) == b"y" * 30 * MIB
    assert "Image format was not specified" in server.end()


@pytest.mark.parametrize("style", STYLES)
def test_a_client_that_never_reads_its_reply(serve: Serve, disk: Path, listener: object, style: str) -> None:
    server = serve("-t", "-e", "0", str(disk), listener=listener)
    with server.good(style) as bad, server.good() as good:
        bad.send(*(bad.begin(Command.READ, 0, 32 * MIB, cookie=i) for i in range(50)))
        for offset in (3, 600_001, 20 * MIB + 5):
            assert good.write(offset, b"good", CommandFlag.FUA) == 0
            assert good.read(offset, 4) == b"good"
        assert good.flush() == 0
        # It reads after all, and finds everything whole.
        for _ in range(3):
            reply = bad.reply()
            assert (reply.error, len(reply.data)) == (0, 32 * MIB)
            assert reply.data[20 * MIB + 5 :][:4] in (b"good", bytes(4))
    assert "Image format was not specified" in server.end()
