"""Wrong command lines and questions, as a user meets them: through the installed module."""

import os
import subprocess
import sys

import pytest

LONG = "x" * 4097


def run(*arguments, command=(sys.executable, "-m", "nbdserve"), **environ):
    environ = {**os.environ, **environ}
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        stdin=subprocess.DEVNULL,
        env=environ,
    )


# Command lines that the genuine program refuses before it opens or binds anything.
REFUSED = [
    "",
    "a b",
    "-f raw",
    "--",
    "-- -a -b",
    "--foo x",
    "--foo=1 x",
    "-q x",
    "-tq x",
    "--s x",
    "--a",
    "--b",
    "--c",
    "--d",
    "--f",
    "--l",
    "--o",
    "--p",
    "--v",
    "--t",
    "--k",
    "--port",
    "-p",
    "--co",
    "--fork=1",
    "--persis=yes",
    "-t -t -t",
    "x -q",
    "x -- -q",
    "-k rel x",
    "-k a -b b -p 1 x",
    "-e -1 x",
    "-e abc x",
    "-e 99999999999 x",
    "-e 2147483648 x",
    "-e= x",
    "--share=x y",
    "-o abc x",
    "-o 1k x",
    "-o 1.5 x",
    "-o 18446744073709551616 x",
    "--cache=foo x",
    "--cache none --cache none x",
    "-n -n x",
    "-n --cache=none x",
    "--cach=none -n",
    "--aio foo x",
    "--aio threads --aio native x",
    "--discard foo x",
    "--discard off --discard on x",
    "--detect-zeroes foo x",
    "--detect-zeroes unmap x",
    "--detect-zeroes unmap --discard off x",
    f"-x {LONG} x",
    f"-D {LONG} x",
    "-L x",
    "-L -x a",
    "-L -D a",
    "-L -o 1",
    "-L -f raw",
    "-L -c /dev/nbd0",
    "-L -d /dev/nbd0",
    "-L -d",
    "-L -l a",
    "-L -B a",
    "-L -A",
    "-L --aio threads",
    "-L --discard off",
    "-L --cache none",
    "-L -n",
    "-L --fork",
    "-L --fork x",
    "-L -A --fork",
    "-L --tls-authz x",
    "--tls-authz a x",
    "--tls-hostname a x",
    "--selinux-label foo x",
    "-T enable=foo,bar=1 x",
    "-T file=/nonexistent/log x",
    "-d",
    "-d /dev/nbd0 x",
]


@pytest.mark.peer("qemu-nbd")
@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line[:40])
def test_is_refused_like_qemu_nbd(line):
    words = line.split(" ") if line else []
    genuine = run(*words, command=("qemu-nbd",))
    ours = run(*words)
    assert genuine.returncode == 1
    assert (ours.stdout, ours.stderr) == (genuine.stdout, genuine.stderr.replace("qemu-nbd", "nbdserve"))
    assert ours.returncode == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-p 65536 x", "Invalid port number '65536'"),
        ("-P 1 x", "--partition is no longer there; choose a part of the image with"),
        ("--partition=1 x", "--partition is no longer there; choose a part of the image with"),
        ("--handshake-limit=-1 x", "Invalid handshake limit '-1'"),
        ("--export foo", "--export wants NAME=IMAGE-OPTS, not 'foo'"),
        ("--export a=driver=raw --export a=driver=raw", "the export name 'a' is used twice"),
        ("--export =driver=raw x", "the export name '' is used twice"),
        ("--export a=driver=raw -x b", "--export-name describes FILE, which is missing"),
        ("--export a=driver=raw x y", "Invalid number of arguments"),
        ("--export a=b.0=1,b.2=1", "Parameter 'b.1' missing"),
        ("--image-opts -f raw driver=raw", "--image-opts and -f are mutually exclusive"),
        ("--json x", "--json is only supported with --list"),
        ("--run true -L", "List mode is incompatible with running a command"),
        ("-L -k -", "List mode needs a server's own socket"),
        ("--fork --run true x", "--fork and --run are mutually exclusive"),
        ("--fork -k - x", "--fork and a private socket (-k -) are mutually exclusive"),
        ("-l snapshot.foo=x x", "Failed in parsing snapshot param `snapshot.foo=x'"),
        ("-l snapshot.id=1,foo=3 x", "Failed in parsing snapshot param `snapshot.id=1,foo=3'"),
        ("-c /dev/nbd0 x", "--connect: binding a kernel NBD device is not supported yet"),
        ("-d /dev/nbd0", "--disconnect: disconnecting a kernel NBD device is not supported yet"),
        ("--object secret,id=a x", "Either 'file' or 'data' must be provided"),
        ("--object secret,id=a -L", "Either 'file' or 'data' must be provided"),
        ("--object secret,data=b x", "Parameter 'id' is missing"),
        ("--object id=a x", "Parameter 'qom-type' is missing"),
        (
            "--object secret,id=a,data=b --object secret,id=a,data=c x",
            "attempt to add duplicate property 'a'",
        ),
        ("--object secret,id=a,data x", "Expected '=' after parameter 'data'"),
        ('--object {"qom-type":"secret" x', "JSON parse error, premature EOI"),
        ("--object no-such-type,id=a x", "Parameter 'qom-type' does not accept value 'no-such-type'"),
        (
            "--object tls-creds-x509,id=a x",
            "--object: objects of type 'tls-creds-x509' are not supported yet",
        ),
        ("--tls-creds a x", "--tls-creds: TLS is not supported yet"),
        ("--tls-creds a --tls-hostname b x", "TLS hostname is only supported with export list"),
        ("--tls-creds a -c /dev/nbd0 x", "TLS is not supported with a host device"),
        ("-T events=/nonexistent x", "/nonexistent: No such file or directory"),
    ],
)
def test_is_refused_in_one_clear_line(line, message):
    ours = run(*line.split())
    assert ours.returncode == 1
    assert ours.stdout == ""
    assert ours.stderr.startswith(f"nbdserve: {message}")
    assert "Traceback" not in ours.stderr


def test_an_option_that_answers_wins_over_a_mistake_behind_it():
    for line in ("-h -q", "-p 0 -V -q", "--hel"):
        ours = run(*line.split())
        assert (ours.returncode, ours.stderr) == (0, "")
        assert ours.stdout
    assert run("-q", "-h").returncode == 1


def test_help_names_every_option():
    from nbdserve.cli.nbd import TABLE

    text = run("--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    for option in TABLE:
        if option.name != "partition":
            assert f"--{option.name}" in text
            assert not option.letter or f" -{option.letter}," in text


def test_version_is_the_packages():
    import tomllib

    with open("pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert run("--version").stdout == f"nbdserve {version}\n"


def test_the_name_in_messages_can_be_another():
    ours = run("-q", IOTESTS_PROGNAME="qemu-nbd")
    assert ours.stderr == (
        "qemu-nbd: invalid option -- 'q'\nqemu-nbd: Try `qemu-nbd --help' for more information.\n"
    )


def test_trace_help_lists_the_events():
    ours = run("-T", "help")
    assert ours.returncode == 0
    assert "nbd_request\n" in ours.stdout


def test_an_unknown_trace_event_is_a_warning():
    assert run("-T", "nosuch", "-L", "-p", "1").stderr.startswith(
        "nbdserve: warning: trace event 'nosuch' does not exist\n"
    )
    assert "warning" not in run("-T", "nosuch*", "-L", "-p", "1").stderr


def test_questions_and_mistakes_do_not_import_what_serving_needs():
    heavy = ("trio", "structlog", "cryptography", "OpenSSL", "rich")
    for line in ("--version", "--help", "-T help", "-q", ""):
        code = (
            "import sys; from nbdserve.__main__ import main;"
            f" main(); print('LOADED', [name for name in {heavy} if name in sys.modules])"
        )
        ours = run(*line.split(), command=(sys.executable, "-c", code))
        assert "LOADED []" in ours.stdout, ours.stderr


def test_help_about_objects():
    assert run("--object", "help").stdout == "List of user creatable objects:\n  secret\n"
    properties = run("--object", "secret,help").stdout.splitlines()
    assert properties[0] == "secret options:"
    assert [line.split("=")[0].strip() for line in properties[1:]] == [
        "data",
        "file",
        "format",
        "iv",
        "keyid",
    ]
    assert run("--object", "x,help").stdout == run("--object", "help").stdout
