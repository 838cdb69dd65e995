"""nbd-client, which asks for the list alone where there is no kernel device."""

import pytest

from tests.interop.programs import attempt

pytestmark = pytest.mark.peer("nbd-client")


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_list(servers, disk, tcp):
    exports = [f"--export={name}=driver=raw,file.filename={disk}" for name in ("one", "two words")]
    server = servers.nbdserve("-r", *exports, tcp=tcp)
    host, _, port = server.where.rpartition(":")
    where = [host, port] if tcp else ["-unix", server.where]
    done = attempt("nbd-client", "-l", *where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["one", "two words"]
