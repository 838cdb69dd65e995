"""Key slots, changed as a user does; QEMU opens what comes of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.image.both import Both, nbdimg

SECRETS = ("--object", "secret,id=a,data=one", "--object", "secret,id=b,data=two")


def _unlocks(path: Path, secret: str) -> bool:
    image = f"driver=luks,file.filename={path},key-secret={secret}"
    done = subprocess.run(
        ["qemu-io", *SECRETS, "--image-opts", image, "-c", "read 0 512"], capture_output=True, text=True
    )
    return done.returncode == 0 and "read 512/512" in done.stdout


@pytest.mark.peer("qemu-io")
def test_a_second_key_is_added_and_the_first_erased(tmp_path: Path) -> None:
    path = tmp_path / "disk.luks"
    created = nbdimg(
        "create",
        "-q",
        "-f",
        "luks",
        *SECRETS,
        "-o",
        "key-secret=a,iter-time=10",
        path,
        "1M",
        directory=tmp_path,
    )
    assert created == (0, "", "")
    image = f"driver=luks,file.filename={path},key-secret="
    new = "state=active,new-secret=b,iter-time=10"
    added = nbdimg("amend", *SECRETS, "--image-opts", image + "a", "-o", new, directory=tmp_path)
    assert added == (0, "", "")
    assert _unlocks(path, "a")
    assert _unlocks(path, "b")
    old = "state=inactive,old-secret=a"
    erased = nbdimg("amend", *SECRETS, "--image-opts", image + "b", "-o", old, directory=tmp_path)
    assert erased == (0, "", "")
    assert not _unlocks(path, "a")
    assert _unlocks(path, "b")


@pytest.mark.peer("qemu-img")
def test_what_can_be_amended_is_listed_as_by_qemu_img(tmp_path: Path) -> None:
    both = Both(tmp_path, lambda directory: None)
    both.agree("amend -f luks -o help", "amend -f qcow2 -o help")
