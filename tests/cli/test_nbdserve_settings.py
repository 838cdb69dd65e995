"""From command lines to settings."""

import pytest

from drivers.errors import OptionError
from drivers.net.address import InetAddress, UnixAddress
from nbdserve.cli.nbd import Answer, parse
from nbdserve.settings import CacheMode, ExportSettings, ListSettings, ServeSettings, TraceSettings


def serve(line):
    settings = parse(line.split(), {})
    assert isinstance(settings, ServeSettings)
    return settings


def test_the_defaults():
    assert serve("disk") == ServeSettings(
        exports=(ExportSettings(image="disk"),),
        address=InetAddress("0.0.0.0", "10809"),
        shared=1,
        persistent=False,
        handshake_limit=10,
    )


def test_everything_at_once():
    line = (
        "-b ::1 -p 0 -e 0x10 -t -x name -D text -o 010 -A -r -s -f raw --cache=directsync --aio native"
        " --discard unmap --detect-zeroes unmap --fork --pid-file p --handshake-limit 0 -v -T nbd_* disk"
    )
    assert serve(line) == ServeSettings(
        exports=(
            ExportSettings(
                image="disk",
                image_format="raw",
                name="name",
                description="text",
                offset=8,
                read_only=True,
                snapshot=True,
                allocation_depth=True,
                cache=CacheMode(direct=True, writethrough=True),
                aio="native",
                discard=True,
                detect_zeroes="unmap",
            ),
        ),
        address=InetAddress("::1", "0"),
        shared=16,
        persistent=True,
        handshake_limit=0,
        pid_file="p",
        fork=True,
        verbose=True,
        trace=TraceSettings(("nbd_*",)),
    )


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", CacheMode(direct=True)),
        ("off", CacheMode(direct=True)),
        ("writeback", CacheMode()),
        ("writethrough", CacheMode(writethrough=True)),
        ("directsync", CacheMode(direct=True, writethrough=True)),
        ("unsafe", CacheMode(no_flush=True)),
    ],
)
def test_cache_modes(mode, expected):
    assert serve(f"--cache={mode} disk").exports[0].cache == expected


def test_nocache_is_cache_none():
    assert serve("-n disk").exports[0].cache == CacheMode(direct=True)


@pytest.mark.parametrize(
    ("mode", "expected"), [("ignore", False), ("off", False), ("unmap", True), ("on", True)]
)
def test_discard_modes(mode, expected):
    assert serve(f"--discard {mode} disk").exports[0].discard is expected


def test_abbreviations_keep_the_meaning_they_have_for_qemu_nbd():
    settings = serve("--share=2 --exp name --r --persis --form raw disk")
    assert (settings.shared, settings.persistent) == (2, True)
    assert settings.exports[0].name == "name"
    assert settings.exports[0].read_only
    assert settings.exports[0].image_format == "raw"


def test_image_options_are_parsed():
    [export] = serve("--image-opts driver=raw,file.filename=a,,b").exports
    assert export.image == "driver=raw,file.filename=a,,b"
    assert export.options == {"driver": "raw", "file": {"filename": "a,b"}}


def test_several_exports_share_what_is_not_about_file():
    line = "-r --cache=none -x first -D text -o 512 --export b=file.filename=B disk --export c=C=1,file=n"
    first, second, third = serve(line).exports
    assert (first.name, first.image, first.offset, first.description) == ("first", "disk", 512, "text")
    assert (second.name, second.options) == ("b", {"file": {"filename": "B"}})
    assert (third.name, third.options) == ("c", {"C": "1", "file": "n"})
    for export in (first, second, third):
        assert export.read_only
        assert export.cache == CacheMode(direct=True)
    assert (second.offset, second.description, second.image_format) == (0, "", None)


def test_file_may_be_missing_beside_export():
    assert [export.name for export in serve("--export a=driver=null-co").exports] == ["a"]


def test_sockets():
    assert serve("-k /s disk").address == UnixAddress("/s")
    assert serve("-k - disk").address is None
    assert serve("-k - disk").inherited == ()
    with pytest.raises(OptionError, match="is too long"):
        serve(f"-k /{'s' * 120} disk")


def test_a_command_has_a_private_socket_and_ends_the_server():
    settings = parse(["--run", "true", "disk"], {})
    assert (settings.address, settings.persistent, settings.run_command) == (None, True, "true")
    settings = parse(["--run", "true", "-p", "0", "disk"], {})
    assert settings.address == InetAddress("0.0.0.0", "0")


def test_objects_come_in_their_order():
    line = "--object secret,id=a,data=b --object {'qom-type':'secret','id':'c','data':'d,e'}"
    expected = (
        {"qom-type": "secret", "id": "a", "data": "b"},
        {"qom-type": "secret", "id": "c", "data": "d,e"},
    )
    assert serve(f"{line} x").objects == expected
    listing = parse([*line.split(), "-L"], {})
    assert isinstance(listing, ListSettings)
    assert listing.objects == expected


@pytest.mark.parametrize(
    ("value", "about"),
    [("help", ""), ("?", ""), ("secret,help", "secret"), ("secret,id=a,?", "secret"), ("x,help", "x")],
)
def test_questions_about_objects(value, about):
    assert parse(["--object", value, "-q"], {}) == Answer("object", about)


def test_listing():
    assert parse(["-L"], {}) == ListSettings(InetAddress("0.0.0.0", "10809"))
    assert parse(["-L", "-k", "/s", "--json"], {}) == ListSettings(UnixAddress("/s"), json=True)
    assert parse(["--li", "-b", "h", "-p", "nbd"], {}) == ListSettings(InetAddress("h", "nbd"))


def test_trace_options_add_up(tmp_path):
    (tmp_path / "events").write_text("# comment\nnbd_request\n\n-nbd_reply\n")
    arguments = ["-T", "nbd_*", "-T", f"enable=x,events={tmp_path}/events,file=log", "-T", "y", "disk"]
    assert parse(arguments, {}).trace == TraceSettings(
        ("nbd_*", "x", "nbd_request", "-nbd_reply", "y"), "log"
    )
