"""nbdserve --list and qemu-nbd --list say the same about every kind of server."""

import subprocess
import sys

import pytest

OURS = (sys.executable, "-m", "nbdserve")

pytestmark = pytest.mark.peer("qemu-nbd", "nbdkit")


def both(*where):
    """What qemu-nbd and we print for the same server: (status, stdout, stderr) of each."""
    answers = []
    for command in (("qemu-nbd",), OURS):
        done = subprocess.run(
            [*command, "--list", *where], capture_output=True, text=True, check=False, timeout=30
        )
        answers.append((done.returncode, done.stdout, done.stderr.replace("qemu-nbd", "nbdserve")))
    return answers


@pytest.fixture
def nbdkit(tmp_path):
    """Starts nbdkit on a Unix socket and returns the path; it is stopped in the end."""
    started = []

    def start(*arguments):
        path = str(tmp_path / "nbdkit.sock")
        process = subprocess.Popen(
            ["nbdkit", "--foreground", "--unix", path, *arguments, "--run", "echo up; read x; exit 0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "up\n"
        return path

    yield start
    for process in started:
        process.communicate("\n", timeout=10)


@pytest.mark.parametrize(
    "arguments",
    [
        ["memory", "1M"],
        ["--no-sr", "null", "0"],
        ["-r", "memory", "1M"],
        ["--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512", "blocksize-maximum=1M"],
        [
            "--filter=exportname",
            "memory",
            "1M",
            "exportname=a",
            "exportname=b",
            "exportdesc=fixed:some words",
        ],
    ],
    ids=lambda arguments: arguments[0],
)
def test_nbdkit(nbdkit, arguments):
    genuine, ours = both("-k", nbdkit(*arguments))
    assert genuine[0] == 0
    assert ours == genuine


def test_several_exports(nbdkit, tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    for name in ("a", "b b", "ü"):
        (directory / name).write_bytes(bytes(4096))
    genuine, ours = both("-k", nbdkit("file", f"dir={directory}"))
    assert genuine[1].startswith("exports available: 3\n")
    assert ours == genuine


@pytest.mark.parametrize("program", [("qemu-nbd",), OURS], ids=["qemu-nbd", "nbdserve"])
@pytest.mark.parametrize("options", [["-r", "-A", "-x", "foo", "-D", "text", "-e", "3"], []], ids=str)
def test_qemu_nbd_and_ourselves(program, options, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    command = [*program, "--fork", "-t", "-f", "raw", "-k", f"{tmp_path}/s", "--pid-file", f"{tmp_path}/pid"]
    subprocess.run([*command, *options, f"{tmp_path}/disk"], check=True, timeout=30)
    try:
        genuine, ours = both("-k", f"{tmp_path}/s")
    finally:
        subprocess.run(["kill", (tmp_path / "pid").read_text().strip()], check=True)
    assert genuine[0] == 0
    assert ours == genuine


@pytest.mark.parametrize(
    "where",
    [["-k", "/nonexistent"], ["-b", "127.0.0.1", "-p", "1"], ["-b", "x.invalid"], ["-p", "nosuch"]],
    ids=str,
)
def test_nobody_there(where):
    genuine, ours = both(*where)
    assert ours == genuine
    assert ours[0] == 1
