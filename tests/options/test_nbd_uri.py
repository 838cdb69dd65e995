import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import OptionError
from drivers.net.address import InetAddress, UnixAddress
from drivers.options.nbd_uri import NbdUri, parse_nbd_filename, parse_nbd_uri

LOCAL = InetAddress("localhost", "10809")


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        # The specification's own table of export names.
        ("nbd://example.com/disk", NbdUri(InetAddress("example.com", "10809"), "disk")),
        ("nbd+unix:///disk?socket=sock", NbdUri(UnixAddress("sock"), "disk")),
        ("nbd://example.com/", NbdUri(InetAddress("example.com", "10809"))),
        ("nbd://example.com", NbdUri(InetAddress("example.com", "10809"))),
        ("nbd://example.com//disk", NbdUri(InetAddress("example.com", "10809"), "/disk")),
        ("nbd://example.com/hello%20world", NbdUri(InetAddress("example.com", "10809"), "hello world")),
        ("nbd://", NbdUri(LOCAL)),
        ("nbd:///a/b", NbdUri(LOCAL, "a/b")),
        ("NBD://h:1/", NbdUri(InetAddress("h", "1"))),
        ("nbd+tcp://h:10810/e", NbdUri(InetAddress("h", "10810"), "e")),
        ("nbd://[::1]:5/e", NbdUri(InetAddress("::1", "5"), "e")),
        ("nbd://[fe80::1%25eth0]/", NbdUri(InetAddress("fe80::1%eth0", "10809"))),
        ("nbds://h/", NbdUri(InetAddress("h", "10809"), tls=True)),
        (
            "nbds://al%40ice@h/?tls-psk-file=/k%26&tls-hostname=n&tls-certificates=/c",
            NbdUri(
                InetAddress("h", "10809"),
                tls=True,
                user="al@ice",
                tls_psk_file="/k&",
                tls_hostname="n",
                tls_certificates="/c",
            ),
        ),
        ("nbds+unix:///?socket=/s%20s", NbdUri(UnixAddress("/s s"), tls=True)),
        ("nbd+unix://alice@/?socket=/s", NbdUri(UnixAddress("/s"), user="alice")),
    ],
)
def test_reads_a_uri(text, uri):
    assert parse_nbd_uri(text) == uri
    assert parse_nbd_filename(text) == uri


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd:localhost:1", NbdUri(InetAddress("localhost", "1"))),
        ("nbd:localhost:1:exportname=", NbdUri(InetAddress("localhost", "1"))),
        ("nbd:localhost:1:exportname=a:b", NbdUri(InetAddress("localhost", "1"), "a:b")),
        ("nbd:[::1]:1", NbdUri(InetAddress("::1", "1"))),
        ("nbd:unix:/a:b", NbdUri(UnixAddress("/a:b"))),
        ("nbd:unix:/a:exportname=%20", NbdUri(UnixAddress("/a"), "%20")),
    ],
)
def test_reads_the_old_forms(text, uri):
    assert parse_nbd_filename(text) == uri


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nbd+unix:///", r"'\?socket=PATH' is missing"),
        ("nbd+unix:///?socket=", r"'\?socket=PATH' is missing"),
        ("nbd+unix://host/?socket=/s", "no host and no port"),
        ("nbd+unix:///?socket=/s&socket=/t", "comes twice"),
        ("nbd+unix:///?socket=%00s", "zero byte"),
        ("nbd+unix:///?socket=/" + "s" * 108, "too long"),
        ("nbd://h/?socket=/s", "the parameter 'socket' is not known"),
        ("nbd://h/?foo=1", "the parameter 'foo' is not known"),
        ("nbd://h:0/", "no port has the number 0"),
        ("nbd://h:65536/", "no port has the number 65536"),
        ("nbd://h:99999999999999999999/", "no port has the number"),
        ("nbd://h:x/", "not .USER@.HOST"),
        ("nbd://::1/", "not .USER@.HOST"),
        ("nbd://[::1/", "not .USER@.HOST"),
        ("nbd://h/%ff", "not UTF-8"),
        ("nbd://h/%00", "zero byte"),
        ("nbd://h/" + "x" * 4097, "longer than 4096"),
        ("nbd://h/#part", "fragment"),
        ("nbd+ssh://h/", r"the scheme 'nbd\+ssh' is not known"),
        ("http://h/", "the scheme 'http' is not known"),
        ("nbd:", "NBD server address missing"),
        ("nbd:foo", "error parsing address 'foo'"),
        ("nbd:::1:10809", "error parsing address '::1:10809'"),
        ("nbds:h:1", "'//' must follow"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(OptionError, match=message):
        parse_nbd_filename(text)


def test_options_of_the_driver():
    assert parse_nbd_uri("nbd://h:1/e").to_options() == {
        "driver": "nbd",
        "server": {"type": "inet", "host": "h", "port": "1"},
        "export": "e",
    }
    assert parse_nbd_uri("nbd+unix:///?socket=/s").to_options() == {
        "driver": "nbd",
        "server": {"type": "unix", "path": "/s"},
    }


def test_the_demand_for_tls_is_never_dropped():
    tree = parse_nbd_uri("nbds://alice@h/?tls-hostname=n").to_options()
    assert tree["tls"] == "on"
    assert tree["tls-username"] == "alice"
    assert tree["tls-hostname"] == "n"


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
SOCKETS = NAMES.filter(bool)
HOSTS = st.from_regex(r"[a-z][a-z0-9.-]{0,10}", fullmatch=True) | st.ip_addresses().map(str)
ADDRESSES = st.builds(UnixAddress, SOCKETS) | st.builds(InetAddress, HOSTS, st.integers(1, 65535).map(str))
URIS = st.builds(
    NbdUri,
    ADDRESSES,
    export=NAMES,
    tls=st.booleans(),
    user=NAMES,
    tls_hostname=NAMES,
    tls_certificates=NAMES,
    tls_psk_file=NAMES,
)


@given(URIS)
def test_what_is_written_is_read_back(uri):
    assert parse_nbd_uri(str(uri)) == uri


@given(st.text(st.sampled_from("nbds+unix:/?#@[]=&%0a. socket")))
def test_any_text_is_read_or_refused(text):
    try:
        parse_nbd_filename("nbd:" + text)
    except OptionError:
        return
