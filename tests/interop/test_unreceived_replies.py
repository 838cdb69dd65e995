"""A client that asks for much and does not receive it: what is on its way stays what it was, or becomes
what the same sectors hold, never what others hold."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

import nbdclient
from tests.interop.programs import Server, Servers
from tests.qcow2.qemu import create, qemu_io

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

LENGTH = 8 << 20
SIZE = 64 << 20


def ask(server: Server) -> socket.socket:
    """A client that has asked for the first LENGTH bytes, with simple replies."""
    sock = server.connect()
    greeting = _receive(sock, 18)
    assert greeting.startswith(b"NBDMAGICIHAVEOPT")
    sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
    _receive(sock, 10)
    sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, LENGTH))
    return sock


def _receive(sock: socket.socket, length: int) -> bytearray:
    data = bytearray()
    while len(data) < length:
        more = sock.recv(length - len(data))
        assert more
        data += more
    return data


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("passes", ["on", "off"], ids=["the host discards", "the host keeps"])
async def test_sectors_of_others_do_not_show(
    servers: Servers, tmp_path: Path, tcp: bool, passes: str
) -> None:
    path = create(tmp_path / "disk.qcow2", SIZE)
    qemu_io(path, f"write -P 1 0 {LENGTH}")
    options = f"driver=qcow2,discard=unmap,pass-discard-request={passes},file.filename={path}"
    server = servers.nbdserve("-e", "0", "--image-opts", options, tcp=tcp)
    with ask(server) as slow:
        _receive(slow, 16)
        async with nbdclient.connect(server.uri) as other:
            await other.trim(0, LENGTH)
            await other.flush()
            for at in range(LENGTH, 3 * LENGTH, LENGTH):
                await other.write(at, b"\x02" * LENGTH)
                await other.flush()
        found = _receive(slow, LENGTH)
    assert set(found) <= {0, 1}
    async with nbdclient.connect(server.uri) as other:
        for at in range(0, LENGTH, 1 << 20):
            await other.write(at, b"\x03" * (1 << 20))
        await other.flush()
    servers.stop()
    # 24 MiB are in use, and those of the slow reader are used again.
    assert path.stat().st_size < 26 << 20
