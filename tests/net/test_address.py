"""Real sockets, in a temporary directory and on the loopback interface."""

import errno
import socket

import pytest
import trio

from drivers.errors import OptionError, RequestError
from drivers.net.address import InetAddress, UnixAddress, parse_port


async def exchange(address, listener):
    """A byte from a client of `address` arrives at `listener`."""
    client = await address.connect(timeout=5)
    with client:
        assert not client.getblocking()
        await trio.lowlevel.wait_readable(listener)
        server, _ = listener.accept()
        with server:
            client.send(b"x")
            await trio.lowlevel.wait_readable(server)
            assert server.recv(2) == b"x"


async def test_unix(tmp_path):
    address = UnixAddress(str(tmp_path / "sock"))
    [listener] = address.listen()
    with listener:
        assert not listener.getblocking()
        await exchange(address, listener)


async def test_unix_replaces_a_stale_socket_and_even_a_file(tmp_path):
    address = UnixAddress(str(tmp_path / "sock"))
    address.listen()[0].close()
    (tmp_path / "sock").unlink()
    (tmp_path / "sock").write_text("left over")
    [listener] = address.listen()
    with listener:
        await exchange(address, listener)


def test_unix_listen_errors_are_one_line(tmp_path):
    (tmp_path / "directory").mkdir()
    with pytest.raises(RequestError, match=r"^Failed to unlink socket .*/directory: Is a directory$"):
        UnixAddress(str(tmp_path / "directory")).listen()
    with pytest.raises(RequestError, match=r"^Failed to bind socket to .*/no/s: No such file or directory$"):
        UnixAddress(str(tmp_path / "no/s")).listen()


def test_unix_path_limit():
    UnixAddress("/" + "x" * 106)
    with pytest.raises(OptionError, match="is too long\nPath must be less than 108 bytes"):
        UnixAddress("/" + "x" * 107)


async def test_inet():
    [listener] = InetAddress("127.0.0.1", "0").listen()
    with listener:
        port = str(listener.getsockname()[1])
        await exchange(InetAddress("127.0.0.1", port), listener)


async def test_every_local_address_means_both_families_on_one_port():
    listeners = InetAddress("", "0").listen()
    try:
        assert len({listener.getsockname()[1] for listener in listeners}) == 1
        for listener in listeners:
            host = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
            await exchange(InetAddress(host, str(listener.getsockname()[1])), listener)
    finally:
        for listener in listeners:
            listener.close()


async def test_the_any_address_of_ipv6_takes_ipv4_too():
    try:
        listeners = InetAddress("::", "0").listen()
    except RequestError:
        pytest.skip("this machine has no IPv6")
    with listeners[0] as listener:
        await exchange(InetAddress("127.0.0.1", str(listener.getsockname()[1])), listener)


def test_a_port_in_use():
    with InetAddress("127.0.0.1", "0").listen()[0] as listener:
        port = str(listener.getsockname()[1])
        with pytest.raises(
            RequestError, match=r"^Failed to find an available port: Address already in use$"
        ) as caught:
            InetAddress("127.0.0.1", port).listen()
    assert caught.value.errno == errno.EADDRINUSE


async def test_nobody_listens(tmp_path):
    path = str(tmp_path / "none")
    with pytest.raises(RequestError, match=rf"^Failed to connect to '{path}': No such file or directory$"):
        await UnixAddress(path).connect()
    with InetAddress("127.0.0.1", "0").listen()[0] as listener:
        port = str(listener.getsockname()[1])
    with pytest.raises(RequestError, match="Connection refused") as caught:
        await InetAddress("127.0.0.1", port).connect()
    assert caught.value.errno == errno.ECONNREFUSED


async def test_a_connection_that_is_not_taken_times_out(tmp_path, autojump_clock):
    address = UnixAddress(str(tmp_path / "sock"))
    [listener] = address.listen(backlog=0)
    with listener, await address.connect():
        with pytest.raises(RequestError, match="Connection timed out") as caught:
            await address.connect(timeout=3)
        assert caught.value.errno == errno.ETIMEDOUT


async def test_a_name_that_does_not_resolve():
    with pytest.raises(RequestError, match=r"^address resolution failed for x\.invalid:1: "):
        await InetAddress("x.invalid", "1").connect()
    with pytest.raises(
        RequestError, match=r"^address resolution failed for 127\.0\.0\.1:abc: Servname not supp"
    ):
        InetAddress("127.0.0.1", "abc").listen()
    with pytest.raises(RequestError, match=r"^address resolution failed for "):
        InetAddress("a" * 70 + ".b", "1").listen()


def test_a_number_that_is_no_port():
    assert parse_port("65535") == "65535"
    assert parse_port("nbd") == "nbd"
    with pytest.raises(OptionError, match="Invalid port number '65536'"):
        parse_port("65536")
