import pytest

from drivers.errors import OptionError
from drivers.net.address import InetAddress, UnixAddress
from drivers.options.address import take_server
from drivers.options.keyval import parse_keyval
from drivers.options.schema import Options


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("server.type=inet,server.host=h,server.port=1", InetAddress("h", "1")),
        ("server.type=unix,server.path=/s", UnixAddress("/s")),
        ("host=h", InetAddress("h", "10809")),
        ("host=h,port=1", InetAddress("h", "1")),
        ("path=/s", UnixAddress("/s")),
    ],
)
def test_reads_an_address(text, address):
    options = Options(parse_keyval(text), owner="nbd")
    assert take_server(options) == address
    options.finish()


def test_a_port_may_be_a_json_number():
    server = {"type": "inet", "host": "h", "port": 1}
    assert take_server(Options({"server": server}, owner="nbd")) == InetAddress("h", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "NBD server address missing"),
        ("port=1", "NBD server address missing"),
        ("path=/s,host=h", "path and host"),
        ("path=/s,port=1", "port may not be used without host"),
        ("host=h,server.type=unix,server.path=/s", "at the same time"),
        ("server.type=unix,server.path=/s,server.host=h", "does not support the option 'host'"),
        ("server.type=tcp", "one of inet, unix"),
        ("server.type=inet,server.host=h", "'port' is missing"),
        ("host=h,port=65536", "from 0 to 65535"),
        ("server=foo", "a set of options"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(OptionError, match=message):
        take_server(Options(parse_keyval(text), owner="nbd"))
