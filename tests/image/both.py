"""The same command lines given to qemu-img and to nbdimg, each in a directory of its own."""

import os
import re
import shlex
import subprocess
import sys

OURS = (sys.executable, "-m", "nbdclient.image")
THEIRS = ("qemu-img",)
# What differs from run to run.
NOISE = ((re.compile(r"#block\d+"), "#block"), (re.compile(r"in [0-9.]+ seconds"), "in N seconds"))


def run(program, arguments, directory):
    done = subprocess.run(
        [*program, *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "IOTESTS_PROGNAME": "qemu-img"},
    )
    texts = [done.stdout, done.stderr]
    for pattern, word in NOISE:
        texts = [pattern.sub(word, text) for text in texts]
    return done.returncode, *texts


def nbdimg(*arguments, directory):
    return run(OURS, [str(word) for word in arguments], directory)


class Both:
    """`prepare` is called with each of the two directories."""

    def __init__(self, tmp_path, prepare):
        self.ours, self.theirs = tmp_path / "ours", tmp_path / "theirs"
        for directory in (self.ours, self.theirs):
            directory.mkdir()
            prepare(directory)

    def agree(self, *lines):
        """Every line has the same exit status and output, one after the other."""
        for line in lines:
            words = shlex.split(line)
            theirs = run(THEIRS, words, self.theirs)
            assert run(OURS, words, self.ours) == theirs, line

    def same_files(self, *names):
        for name in names:
            assert (self.ours / name).read_bytes() == (self.theirs / name).read_bytes(), name
