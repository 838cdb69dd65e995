"""An image in use: nbdserve and qemu's programs refuse each other in the same cases and words."""

import sys

import pytest

from tests.interop.programs import Server, Servers, attempt, run

pytestmark = pytest.mark.peer("qemu-nbd", "qemu-img")

HOLDERS = pytest.mark.parametrize(
    "holder", [Servers.nbdserve, Servers.qemu_nbd], ids=["nbdserve", "qemu-nbd"]
)
PROGRAMS = pytest.mark.parametrize(
    "program", [(sys.executable, "-m", "nbdserve"), ("qemu-nbd",)], ids=["nbdserve", "qemu-nbd"]
)


def refusal(program, path, *options):
    """What a further server says instead of serving an image; None where it serves it."""
    where, pid_file = path.with_name("second"), path.with_name("pid")
    done = attempt(*program, "--fork", "-t", "-k", where, "--pid-file", pid_file, *options, path)
    if done.returncode == 0:
        Server(int(pid_file.read_text()), str(where)).stop()
        return None
    return done.stderr.replace(program[-1], "PROGRAM").replace(str(path), "IMAGE")


@pytest.fixture
def qcow2(tmp_path):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    return path


@HOLDERS
@PROGRAMS
def test_raw_images_are_shared_by_servers(servers, disk, holder, program):
    """An export shares everything but resizing, and asks for no more than writing."""
    holder(servers, disk)
    assert refusal(program, disk, "-f", "raw") is None
    assert refusal(program, disk, "-f", "raw", "-r") is None


@PROGRAMS
def test_an_image_that_a_format_driver_writes_to_is_nobody_elses(servers, qcow2, program):
    servers.qemu_nbd("-f", "qcow2", qcow2)
    assert refusal(program, qcow2, "-f", "raw") == (
        "PROGRAM: Failed to blk_new_open 'IMAGE': Failed to get \"write\" lock\n"
        "Is another process using the image [IMAGE]?\n"
    )


@HOLDERS
def test_an_image_that_is_served_is_no_format_drivers(servers, qcow2, holder):
    holder(servers, "-f", "raw", qcow2)
    assert refusal(("qemu-nbd",), qcow2, "-f", "qcow2") == (
        "PROGRAM: Failed to blk_new_open 'IMAGE': Failed to get \"resize\" lock\n"
        "Is another process using the image [IMAGE]?\n"
    )


@HOLDERS
@pytest.mark.parametrize("options", [[], ["-r"]], ids=str)
def test_nobody_resizes_an_image_that_is_served(servers, disk, holder, options):
    size = disk.stat().st_size
    holder(servers, *options, disk)
    done = attempt("qemu-img", "resize", "-f", "raw", disk, "16M")
    assert (done.returncode, disk.stat().st_size) == (1, size)
    assert 'Failed to get "resize" lock' in done.stderr


@HOLDERS
def test_an_image_is_free_again_once_the_server_has_ended(servers, disk, holder):
    holder(servers, disk).stop()
    run("qemu-img", "resize", "-f", "raw", disk, "16M")


@PROGRAMS
def test_locking_can_be_switched_off(servers, qcow2, program):
    servers.qemu_nbd("-f", "qcow2", qcow2)
    options = f"driver=raw,file.driver=file,file.locking=off,file.filename={qcow2}"
    where, pid_file = qcow2.with_name("second"), qcow2.with_name("pid")
    run(*program, "--fork", "-t", "-k", where, "--pid-file", pid_file, "--image-opts", options)
    Server(int(pid_file.read_text()), str(where)).stop()
