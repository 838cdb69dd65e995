"""Encrypted images: who asks for the key, and what an image is called that needs one."""

import subprocess

import pytest

from tests.image.both import OURS, THEIRS, Both, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KEYS = "--object secret,id=low,data=one --object secret,id=high,data=two"
LUKS = "encrypt.format=luks,encrypt.iter-time=10"
BASE = "driver=qcow2,file.filename=base,encrypt.key-secret=low"
TOP = "driver=qcow2,file.filename=top,encrypt.key-secret=high"
CHAIN = f"{TOP},backing.driver=qcow2,backing.file.filename=base,backing.encrypt.key-secret=low"


def create(directory, words):
    line = f"qemu-img create -q -f qcow2 {KEYS} -o {LUKS},{words}"
    for _ in range(200):
        done = subprocess.run(line.split(" "), cwd=directory, capture_output=True, text=True, check=False)
        # Some machines are too fast for qemu-img to measure them.
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def prepare(directory):
    create(directory, "encrypt.key-secret=low base 1M")


@pytest.fixture
def both(tmp_path):
    return Both(tmp_path, prepare)


def test_a_new_image_over_an_encrypted_one_takes_its_size_without_the_key(both):
    both.agree(
        "create -f qcow2 -b base -F qcow2 over",
        "create -f qcow2 -b base -F raw plain",
        "create -f qcow2 -u -b base -F qcow2 unchecked",
        "map over",
    )


@pytest.mark.parametrize(
    "image",
    [
        BASE,
        "driver=qcow2,file.filename=base",
        "driver=raw,file.filename=base,offset=512",
        "driver=raw,file.filename=base",
    ],
)
def test_the_name_tells_what_the_file_alone_does_not(both, image):
    lines = []
    for program, directory in ((OURS, both.ours), (THEIRS, both.theirs)):
        status, out, _ = run(program, ["info", "--image-opts", image], directory)
        assert status == 0
        lines.append(out.splitlines()[0])
    assert lines[0] == lines[1]


def test_what_is_committed_goes_to_the_base_that_the_options_describe(both):
    for directory in (both.ours, both.theirs):
        create(directory, "encrypt.key-secret=high -u -b base -F qcow2 top 1M")
        words = ["qemu-io", *KEYS.split(" "), "-c", "write -P 9 64k 64k", "--image-opts", CHAIN]
        subprocess.run(words, cwd=directory, check=True, capture_output=True)
    both.agree(f"commit {KEYS} --image-opts {CHAIN}")
    for directory in (both.ours, both.theirs):
        words = ["qemu-io", *KEYS.split(" "), "-c", "read -P 9 64k 64k", "--image-opts", BASE]
        done = subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)
        assert "failed" not in done.stdout
