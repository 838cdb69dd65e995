"""The whole command, from FILE to a client's bytes, and its refusals beside qemu-nbd's."""

import json
import subprocess
import sys

import pytest

OURS = (sys.executable, "-m", "nbdserve")
WARNING = "WARNING: Image format was not specified"


def run(*arguments, command=OURS, **options):
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, timeout=60, **options
    )


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"\x11" * 4096 + bytes((1 << 20) - 4096))
    return str(path)


@pytest.mark.peer("nbdinfo")
def test_size_name_and_description(disk):
    done = run("-f", "raw", "-x", "n ä", "-D", "text", disk, "--run", 'nbdinfo --json "$uri"')
    [export] = json.loads(done.stdout)["exports"]
    assert (export["export-name"], export["export-size"], export["description"]) == ("n ä", 1 << 20, "text")
    assert not export["is_read_only"]


@pytest.mark.peer("qemu-io")
def test_what_is_written_reaches_the_file(disk):
    script = 'qemu-io -f raw -c "write -P 5 64k 4k" -c "read -P 0x11 0 4k" "$uri"'
    assert run("-f", "raw", disk, "--run", script).returncode == 0
    with open(disk, "rb") as file:
        assert file.seek(65536) and file.read(4096) == b"\x05" * 4096


@pytest.mark.peer("qemu-io")
def test_read_only(disk):
    done = run("-r", "-f", "raw", disk, "--run", 'qemu-io -f raw -c "write -P 5 0 4k" "$uri"')
    assert done.returncode == 1
    with open(disk, "rb") as file:
        assert file.read(4096) == b"\x11" * 4096


@pytest.mark.peer("nbdinfo")
def test_offset_leaves_out_the_beginning(disk):
    assert run("-o", "0x1000", "-f", "raw", disk, "--run", 'nbdinfo --size "$uri"').stdout == "1044480\n"


@pytest.mark.peer("nbdinfo")
def test_several_exports(disk):
    options = f"driver=raw,file.filename={disk}"
    done = run(
        "-r", "--export", f"a={options}", "--export", f"b={options},offset=4k",
        "--run", 'nbdinfo --list --json "nbd+unix:///?socket=$unixsocket"',
    )  # fmt: skip
    exports = json.loads(done.stdout)["exports"]
    assert [(export["export-name"], export["export-size"]) for export in exports] == [
        ("a", 1048576),
        ("b", 1044480),
    ]


def test_a_probed_raw_image_is_served_with_a_warning(disk):
    assert run(disk, "--run", "true").stderr.startswith(WARNING)
    assert run("-r", disk, "--run", "true").stderr == ""
    assert run("-f", "raw", disk, "--run", "true").stderr == ""


@pytest.mark.peer("qemu-io")
def test_it_ends_with_its_last_client_and_the_socket_is_gone(disk, tmp_path):
    run("--fork", "--pid-file", f"{tmp_path}/pid", "-f", "raw", "-k", f"{tmp_path}/s", disk)
    import os
    import select

    watch = os.pidfd_open(int((tmp_path / "pid").read_text()))
    try:
        uri = f"nbd+unix:///?socket={tmp_path}/s"
        subprocess.run(["qemu-io", "-r", "-f", "raw", "-c", "read 0 1", uri], check=True, capture_output=True)
        assert select.select([watch], [], [], 10)[0], "it did not end"
    finally:
        os.close(watch)
    assert not (tmp_path / "s").exists()


# Refused when the socket is bound and the image is to be opened. {disk} is a raw file of 1 MiB.
REFUSED = [
    "/nonexistent",
    "-f raw /nonexistent",
    "-f nosuch {disk}",
    "file:",
    "file:/nonexistent",
    "xyz:abc",
    "nbd:",
    "nbd:foo",
    "null-co://x",
    "null-co:foo",
    "json:{",
    "json:[]",
    'json:{"a":1,"a":2}',
    'json:{"driver":"raw"}',
    'json:{"driver":"raw","file.filename":"/nonexistent"}',
    "--image-opts driver=raw",
    "--image-opts driver=foo",
    "--image-opts driver=raw,file.filename=/nonexistent",
    "--image-opts driver=raw,file.driver=file,file.filename={disk},foo=1",
    "--image-opts driver=raw,file.driver=file,file.filename={disk},file.foo=1",
    "--image-opts driver=file,filename={disk},foo=1",
    "--image-opts driver=null-co,foo.bar=1",
    "-f raw --aio native {disk}",
    "-f raw --pid-file /nonexistent/pid {disk}",
    "-f raw --pid-file /nonexistent/pid --fork {disk}",
]


@pytest.mark.peer("qemu-nbd")
@pytest.mark.parametrize("line", REFUSED)
def test_is_refused_like_qemu_nbd(line, disk, tmp_path):
    words = ["-k", f"{tmp_path}/s", *line.replace("{disk}", disk).split(" ")]
    genuine = run(*words, command=("qemu-nbd",))
    ours = run(*words)
    assert genuine.returncode == 1
    assert ours.stderr == genuine.stderr.replace("qemu-nbd", "nbdserve")
    assert (ours.returncode, ours.stdout) == (1, "")
    assert not (tmp_path / "s").exists()


@pytest.mark.peer("qemu-nbd")
@pytest.mark.parametrize(
    "words",
    [
        ["-k", "/nonexistent/s"],
        ["-b", "x.invalid"],
        ["-b", "192.0.2.1", "-p", "1"],
        ["-p", "abc"],
        ["-k", "/" + "s" * 108],
        ["-k", "/tmp"],
    ],
    ids=lambda words: " ".join(words)[:30],
)
def test_where_it_cannot_listen_is_told_like_qemu_nbd(words, disk):
    genuine = run(*words, "-f", "raw", disk, command=("qemu-nbd",))
    ours = run(*words, "-f", "raw", disk)
    assert ours.stderr == genuine.stderr.replace("qemu-nbd", "nbdserve")
    assert ours.returncode == genuine.returncode == 1
