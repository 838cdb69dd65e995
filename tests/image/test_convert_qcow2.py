"""What `nbdimg convert` allocates in qcow2 images, and what it says of that, as qemu-img does."""

import json
import random
import subprocess

import pytest

from tests.image.both import OURS, THEIRS, Both, run

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

KIB = 1 << 10


def make(directory, name, size, *writes, options="cluster_size=1k"):
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, name, size]
    subprocess.run(command, cwd=directory, check=True)
    words = [word for write in writes for word in ("-c", write)]
    subprocess.run(["qemu-io", *words, name], cwd=directory, check=True, stdout=subprocess.DEVNULL)


def prepare(directory):
    make(directory, "base", "1M", "write -P 1 0 300k")
    make(directory, "a", "1M", "write -P 0 0 64k", "write 0 1k", "write 8k 1k", "write 17k 1k")
    make(directory, "b", "1M", "write -P 2 0 64k", "write -z 128k 64k")
    quarters = [f"write {quarter * 16}M 1M" for quarter in range(4)]
    make(directory, "quarters", "64M", *quarters, options="cluster_size=64k")


@pytest.fixture
def both(tmp_path):
    return Both(tmp_path, prepare)


@pytest.mark.parametrize(
    "options", ["", "-S 8k", "-S 0", "-c", "-c -S 4k", "-c -S 8k", "-c -S 0", "-c -W -m 4", "-c -S 64k"]
)
@pytest.mark.parametrize("source", ["a", "b", "a b"])
def test_the_same_is_allocated(both, options, source):
    both.agree(f"convert -O qcow2 -o cluster_size=1k {options} {source} t")
    assert allocated(both.ours) == allocated(both.theirs)


def allocated(directory):
    """(start, end) of what "t" has by itself, wherever in the file it lies."""
    runs = []
    for extent in json.loads(run(THEIRS, ["map", "--output=json", "t"], directory)[1]):
        start, end = extent["start"], extent["start"] + extent["length"]
        if not extent["present"]:
            continue
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, end))
    return runs


def test_what_does_not_go_with_a_backing_file(both):
    both.agree(
        "convert -O qcow2 -B base a b t",
        "convert -O qcow2 -B base a t",
        "convert -O qcow2 -B base -F qcow2 a b t",
        "convert -O qcow2 -o backing_file=base a b t",
        "convert -O qcow2 -c -o preallocation=metadata -B base a b t",
        "convert -O qcow2 --bitmaps -B base a b t",
        "convert -O raw -c -B base -F qcow2 a b t",
        "convert -O raw -c a t",
        "convert -O qcow2 -B base -F qcow2 a t",
    )


def test_progress_is_that_of_the_data(both):
    both.agree(
        "convert -p -O qcow2 quarters t",
        "convert -p -O qcow2 base t",
        "create -q -f qcow2 empty 1M",
        "convert -p -O qcow2 empty t",
    )


def test_a_target_that_was_made_with_a_key_is_opened_with_it(tmp_path):
    content = random.Random(5).randbytes(200 * KIB)
    (tmp_path / "plain").write_bytes(content)
    secret = ["--object", "secret,id=key,data=much too simple"]
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,preallocation=metadata"
    convert = ["convert", *secret, "-f", "raw", "-O", "qcow2", "-o", options, "plain", "t"]
    assert run(OURS, convert, tmp_path)[0] == 0
    image = ["--image-opts", "driver=qcow2,encrypt.key-secret=key,file.filename=t"]
    assert run(THEIRS, ["convert", *secret, *image, "-O", "raw", "back"], tmp_path)[0] == 0
    assert (tmp_path / "back").read_bytes() == content
