"""nbdimg on qcow2 images says and does what qemu-img does."""

import random
import subprocess
import sys

import pytest

from tests.image.both import OURS, THEIRS, Both, run

pytestmark = pytest.mark.peer("qemu-img")


def prepare(directory):
    (directory / "r.raw").write_bytes(bytes(1 << 20))
    content = random.Random(1).randbytes(3 << 20) + bytes(300 << 10) + b"x" * 5120
    (directory / "u.raw").write_bytes(content)
    for name, below in (("a", None), ("b", "a"), ("c", "b")):
        backing = ["-b", f"{below}.qcow2", "-F", "qcow2"] if below else []
        size = [] if below else ["1M"]
        command = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{name}.qcow2", *size]
        subprocess.run(command, cwd=directory, check=True)


@pytest.fixture
def both(tmp_path):
    return Both(tmp_path, prepare)


def test_rebase(both):
    both.agree(
        "rebase",
        "rebase c.qcow2",
        "rebase -b a.qcow2 c.qcow2",
        "rebase -b a.qcow2 -F qcow2 c.qcow2",
        "rebase -u -b b.qcow2 c.qcow2",
        "rebase -u -b b.qcow2 -F qcow2 c.qcow2",
        "rebase -u -b nofile -F raw c.qcow2",
        "rebase -b a.qcow2 -F qcow2 c.qcow2",
        "rebase -u -b b.qcow2 -F qcow2 c.qcow2",
        "rebase -b nofile -F raw c.qcow2",
        "rebase -b a.qcow2 -F foo c.qcow2",
        'rebase -b "" c.qcow2',
        "rebase -b a.qcow2 -F qcow2 r.raw",
        "rebase -u -b a.qcow2 -F qcow2 r.raw",
        "rebase -u -b b.qcow2 -F qcow2 c.qcow2",
        "rebase -p -b a.qcow2 -F qcow2 c.qcow2",
        "rebase -b a.qcow2 -F qcow2",
        "rebase -b a -t foo c.qcow2",
        "rebase -b a -T foo c.qcow2",
        "rebase -c -b a c.qcow2",
        "rebase -u -b b.qcow2 -F foo c.qcow2",
        'rebase -u -b "" c.qcow2',
        'rebase -u -b "" r.raw',
        'rebase -b "" r.raw',
        "rebase -b c.qcow2 -F qcow2 c.qcow2",
    )


def test_commit(both):
    both.agree(
        "commit",
        "commit r.raw",
        "commit a.qcow2",
        "commit c.qcow2",
        "commit -d c.qcow2",
        "commit -b a.qcow2 c.qcow2",
        "commit -b nofile c.qcow2",
        "commit -b c.qcow2 c.qcow2",
        "commit -q c.qcow2",
        "commit -r x c.qcow2",
        "commit -r 1M c.qcow2",
        "commit -t foo c.qcow2",
        "commit -t none a.qcow2",
        "commit a b",
        "commit -f raw c.qcow2",
    )


def test_bitmap(both):
    both.agree(
        "bitmap",
        "bitmap a.qcow2",
        "bitmap a.qcow2 x",
        "bitmap --add a.qcow2",
        "bitmap --add a.qcow2 x",
        "bitmap --add a.qcow2 x",
        "bitmap --add -g 3 a.qcow2 y",
        "bitmap --add -g x a.qcow2 y",
        "bitmap --add -g 32k a.qcow2 y",
        "bitmap --clear a.qcow2 x",
        "bitmap --disable a.qcow2 x",
        "bitmap --disable a.qcow2 x",
        "bitmap --enable a.qcow2 x",
        "bitmap --merge y a.qcow2 x",
        "bitmap --merge z a.qcow2 x",
        "bitmap --remove a.qcow2 z",
        "bitmap --clear a.qcow2 z",
        "bitmap --enable a.qcow2 z",
        "bitmap --remove --clear a.qcow2 z",
        "bitmap -g 4k --clear a.qcow2 x",
        "bitmap -b b.qcow2 --clear a.qcow2 x",
        "bitmap -F raw --merge y a.qcow2 x",
        "bitmap -b nofile -F qcow2 --merge y a.qcow2 x",
        "bitmap -b b.qcow2 -F qcow2 --merge y a.qcow2 x",
        "bitmap --add r.raw x",
        "bitmap --add -f raw r.raw x",
        "bitmap --remove -f raw r.raw x",
        'bitmap --add a.qcow2 ""',
        "bitmap a b c --add",
        "bitmap --add --merge y --disable a.qcow2 new",
        "bitmap --remove a.qcow2 new",
        "bitmap --add nofile x",
        "bitmap --enable --disable a.qcow2 x",
        "bitmap --add --add a.qcow2 x",
    )


@pytest.mark.parametrize(
    "options", ["", "-c", "-c -o compression_type=zstd", "-o cluster_size=4k", "-S 0", "-W"]
)
def test_convert_there_and_back(tmp_path, options):
    prepare(tmp_path)
    for program, other in ((OURS, THEIRS), (THEIRS, OURS)):
        words = ["convert", "-O", "qcow2", *options.split(), "u.raw", "u.qcow2"]
        assert run(program, words, tmp_path) == (0, "", "")
        assert run(THEIRS, ["check", "-q", "u.qcow2"], tmp_path) == (0, "", "")
        assert run(other, ["compare", "u.raw", "u.qcow2"], tmp_path) == (0, "Images are identical.\n", "")
        assert run(other, ["convert", "u.qcow2", "copy.raw"], tmp_path) == (0, "", "")
        assert (tmp_path / "copy.raw").read_bytes() == (tmp_path / "u.raw").read_bytes()


def test_rebase_and_commit_keep_the_content(tmp_path):
    prepare(tmp_path)
    for name, pattern, offset in (("a", 1, 0), ("b", 2, 65536), ("c", 3, 131072)):
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} 100k", f"{name}.qcow2"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
    assert run(THEIRS, ["convert", "c.qcow2", "before.raw"], tmp_path)[0] == 0
    for words in (
        ["rebase", "-b", "a.qcow2", "-F", "qcow2", "c.qcow2"],
        ["rebase", "-b", "", "c.qcow2"],
        ["rebase", "-b", "r.raw", "-F", "raw", "c.qcow2"],
    ):
        assert run(OURS, words, tmp_path) == (0, "", ""), words
        same = run(THEIRS, ["compare", "c.qcow2", "before.raw"], tmp_path)
        assert same == (0, "Images are identical.\n", ""), words
    assert run(OURS, ["commit", "c.qcow2"], tmp_path) == (0, "Image committed.\n", "")
    same = run(THEIRS, ["compare", "-f", "raw", "r.raw", "before.raw"], tmp_path)
    assert same == (0, "Images are identical.\n", "")


def test_measuring_bitmaps_of_a_vast_image(both):
    """A bitmap of half a gibibyte in which nothing is dirty costs neither time nor memory."""
    both.agree(
        "create -q -f qcow2 -o cluster_size=2M vast 2T",
        "bitmap --add -g 512 vast fine",
        "bitmap --add -g 2M vast coarse",
        "measure -O raw vast",
        "measure -O qcow2 vast",
        "measure -O qcow2 -o compat=0.10 vast",
        "measure --output=json -O qcow2 -o cluster_size=2M vast",
    )
    done = run(THEIRS, ["check", "vast"], both.ours)
    assert done[0] == 0
    script = (
        "import sys\n"
        "from nbdclient.image.__main__ import main\n"
        "assert main(['measure', '-O', 'qcow2', 'vast']) == 0\n"
        "[peak] = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "sys.exit(int(peak.split()[1]) > 200 << 10)\n"
    )
    assert run((sys.executable, "-c", script), [], both.ours)[0] == 0


def test_amending_the_backing_file_leads_to_rebase(both):
    both.agree("create -q -f qcow2 disk.qcow2 1M", "amend -o backing_file=base disk.qcow2")
