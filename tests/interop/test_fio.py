"""fio's nbd engine on our server: random reads and writes by several jobs, every block verified."""

import json

import pytest

from tests.interop.programs import MiB, run

pytestmark = pytest.mark.peer("fio")


def fio(server, *options):
    out = run(
        "fio", "--output-format=json", "--ioengine=nbd", f"--uri={server.uri}", "--name=job",
        "--group_reporting", "--thread", "--verify_state_save=0", *options,
    )  # fmt: skip
    [job] = json.loads(out[out.index("{") :])["jobs"]
    assert job["error"] == 0
    return job


@pytest.fixture
def blank(tmp_path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(64 * MiB)
    return path


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough", "directsync", "unsafe"])
def test_random_mixed_sizes_verified(servers, blank, cache, tcp):
    server = servers.nbdserve("-e", "0", f"--cache={cache}", blank, tcp=tcp)
    slow = cache in ("writethrough", "directsync")
    job = fio(
        server, "--rw=randrw", "--bssplit=512/10:4k/40:64k/30:100k/10:300k/10", "--verify=crc32c",
        "--verify_fatal=1", "--iodepth=16", "--numjobs=4", "--offset_increment=16m", "--size=16m",
        f"--io_size={1 if slow else 8}m", "--random_generator=tausworthe64", "--randseed=7",
        "--verify_backlog=64",
    )  # fmt: skip
    assert job["read"]["total_ios"] and job["write"]["total_ios"]


def test_sequential_trims_and_syncs(servers, blank):
    server = servers.nbdserve("-e", "0", "--discard=unmap", blank)
    job = fio(
        server, "--rw=randtrimwrite", "--bs=64k", "--iodepth=8", "--numjobs=2", "--offset_increment=32m",
        "--size=32m", "--io_size=8m", "--fsync=16",
    )  # fmt: skip
    assert job["trim"]["total_ios"] and job["write"]["total_ios"]


def test_many_connections_at_once(servers, blank):
    blank.write_bytes(b"\x5a" * 64 * MiB)
    server = servers.nbdserve("-e", "0", "-r", blank)
    job = fio(
        server, "--rw=randread", "--bs=4k", "--iodepth=4", "--numjobs=32", "--size=64m", "--io_size=256k"
    )
    assert job["read"]["total_ios"] == 32 * 64
