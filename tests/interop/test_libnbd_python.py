"""libnbd's Python module on our server: single requests, and ones that its tools never make."""

import errno
import functools
import os

import pytest

from tests.interop.programs import GiB, KiB, MiB

pytestmark = pytest.mark.peer("module:nbd")

CONTEXTS = ("base:allocation", "qemu:allocation-depth")
HOLE_AND_ZERO = 3


@pytest.fixture
def connect():
    """Opens connections; they are closed in the end."""
    import nbd

    handles = []

    def start(server, *, strict=True, structured=True, contexts=(), export=None):
        handle = nbd.NBD()
        handles.append(handle)
        if not strict:
            handle.set_strict_mode(0)
        handle.set_request_structured_replies(structured)
        for context in contexts:
            handle.add_meta_context(context)
        handle.connect_uri(server.export(export) if export is not None else server.uri)
        return handle

    yield start
    for handle in handles:
        if handle.aio_is_ready():
            handle.shutdown()


@pytest.fixture
def blank(tmp_path):
    path = tmp_path / "blank"
    with path.open("wb") as file:
        file.truncate(64 * MiB)
    return path


def refused(call, *arguments, **options):
    """The errno that a call fails with."""
    import nbd

    with pytest.raises(nbd.Error) as caught:
        call(*arguments, **options)
    return errno.errorcode[caught.value.errnum]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_every_command(servers, connect, blank, structured, tcp):
    import nbd

    disk = connect(servers.nbdserve("-e", "2", "--discard=unmap", blank, tcp=tcp), structured=structured)
    assert (disk.get_size(), disk.is_read_only(), disk.get_protocol()) == (64 * MiB, False, "newstyle-fixed")
    assert disk.get_structured_replies_negotiated() == structured
    assert disk.can_df() == structured
    for can in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn"):
        assert getattr(disk, f"can_{can}")(), can
    model = bytearray(64 * MiB)
    for offset, length, flags in [
        (0, 1, 0),
        (4095, 2, nbd.CMD_FLAG_FUA),
        (100_000, 70_000, 0),
        (MiB, 1 << 25, 0),
        (40 * MiB - 1, 200_000, nbd.CMD_FLAG_FUA),
    ]:
        data = os.urandom(length)
        disk.pwrite(data, offset, flags)
        model[offset : offset + length] = data
    for offset, length, flags in [
        (4096, 4096, nbd.CMD_FLAG_NO_HOLE),
        (105_000, 5, 0),
        (2 * MiB, 5 * MiB, nbd.CMD_FLAG_FUA),
        (10 * MiB, MiB, nbd.CMD_FLAG_FAST_ZERO),
    ]:
        disk.zero(length, offset, flags)
        model[offset : offset + length] = bytes(length)
    disk.trim(MiB, 12 * MiB)
    disk.trim(MiB, 14 * MiB, nbd.CMD_FLAG_FUA)
    for start in (12 * MiB, 14 * MiB):
        model[start : start + MiB] = bytes(MiB)
    disk.cache(1 << 20, 0)
    disk.flush()
    for offset, length in [
        (0, 32 * MiB),
        (32 * MiB, 32 * MiB),
        (4095, 3),
        (99_999, 70_002),
        (64 * MiB - 1, 1),
    ]:
        assert disk.pread(length, offset) == model[offset : offset + length]
    assert blank.read_bytes() == model


def test_structured_reads_in_chunks(servers, connect, disk):
    """A hole is told, not sent; DF keeps the reply in one piece."""
    import nbd

    handle = connect(servers.nbdserve("-r", disk))
    content = disk.read_bytes()

    def read(flags):
        chunks = []

        def chunk(data, offset, status, error):
            assert error.value == 0
            chunks.append((offset, len(data), status))

        assert handle.pread_structured(8 * MiB, 0, chunk, flags) == content
        # Holes included, every byte comes once.
        ends = [0, *(offset + length for offset, length, _ in sorted(chunks))]
        assert [offset for offset, _, _ in sorted(chunks)] == ends[:-1] and ends[-1] == 8 * MiB
        return chunks

    data = [(offset, length) for offset, length, status in read(0) if status == nbd.READ_DATA]
    assert data == [(start * MiB + 64 * KiB, 192 * KiB) for start in range(0, 8, 2)] + [
        (8 * MiB - 4096, 4096)
    ]
    assert read(nbd.CMD_FLAG_DF) == [(0, 8 * MiB, nbd.READ_DATA)]


def test_block_status_of_several_contexts(servers, connect, blank):
    import nbd

    server = servers.nbdserve("-A", "--discard=unmap", "-e", "2", blank)
    disk = connect(server, contexts=[*CONTEXTS, "x-none:such"])
    assert [disk.can_meta_context(context) for context in (*CONTEXTS, "x-none:such")] == [True, True, False]
    disk.pwrite(os.urandom(64 * KiB), MiB)
    disk.pwrite(os.urandom(MiB), 63 * MiB)

    def status(length, offset, flags=0):
        found = {}

        def extents(context, at, entries, error):
            assert at == offset and context not in found
            found[context] = list(zip(entries[::2], entries[1::2], strict=True))

        disk.block_status(length, offset, extents, flags)
        return found

    base = [
        (MiB, HOLE_AND_ZERO),
        (64 * KiB, 0),
        (62 * MiB - 64 * KiB, HOLE_AND_ZERO),
        (MiB, 0),
    ]
    assert status(64 * MiB, 0) == {"base:allocation": base, "qemu:allocation-depth": [(64 * MiB, 1)]}
    assert status(64 * MiB, 0, nbd.CMD_FLAG_REQ_ONE) == {
        "base:allocation": base[:1],
        "qemu:allocation-depth": [(64 * MiB, 1)],
    }
    assert status(100, MiB - 50)["base:allocation"] == [(50, HOLE_AND_ZERO), (50, 0)]
    disk.trim(64 * KiB, MiB)
    assert status(2 * MiB, 0)["base:allocation"] == [(2 * MiB, HOLE_AND_ZERO)]


def test_a_single_extent_beyond_4_gib_is_cut_to_32_bits(servers, connect, tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(9 * GiB)
    disk = connect(servers.nbdserve("-r", path), contexts=CONTEXTS[:1])
    at, rounds = 0, 0
    while at < 9 * GiB:
        lengths = []

        def extents(context, offset, entries, error, lengths=lengths):
            lengths += entries[::2]

        disk.block_status(min(9 * GiB - at, (1 << 32) - 1), at, extents)
        at += sum(lengths)
        rounds += 1
    assert (at, rounds) == (9 * GiB, 3)


INVALID = [
    ("a read past the end", "EINVAL", lambda disk: functools.partial(disk.pread, 512, 8 * MiB)),
    ("a read across the end", "EINVAL", lambda disk: functools.partial(disk.pread, 1024, 8 * MiB - 512)),
    ("a write across the end", "ENOSPC", lambda disk: functools.partial(disk.pwrite, b"1" * 9, 8 * MiB - 1)),
    ("zeroes across the end", "ENOSPC", lambda disk: functools.partial(disk.zero, 513, 8 * MiB - 512)),
    ("a trim across the end", "EINVAL", lambda disk: functools.partial(disk.trim, 513, 8 * MiB - 512)),
    ("an offset beyond all", "EINVAL", lambda disk: functools.partial(disk.pread, 1, (1 << 63) - 1)),
    ("a cache request past the end", "EINVAL", lambda disk: functools.partial(disk.cache, 1, 8 * MiB)),
    ("a read with a flag of writes", "EINVAL", lambda disk: functools.partial(disk.pread, 512, 0, 1 << 1)),
    ("a flag that does not exist", "EINVAL", lambda disk: functools.partial(disk.flush, 1 << 15)),
    (
        "a status without a context",
        "EINVAL",
        lambda disk: functools.partial(disk.block_status, 512, 0, lambda *_: 0),
    ),
]


@pytest.mark.parametrize("structured", [True, False])
def test_invalid_requests_fail_alone(servers, connect, disk, structured):
    handle = connect(servers.nbdserve(disk), strict=False, structured=structured)
    before = disk.read_bytes()
    for name, expected, call in INVALID:
        assert refused(call(handle)) == expected, name
        assert handle.pread(512, 65536) == before[65536 : 65536 + 512]
    assert disk.read_bytes() == before


def test_a_write_to_a_read_only_export_fails_alone(servers, connect, disk):
    handle = connect(servers.nbdserve("-r", disk), strict=False)
    before = disk.read_bytes()
    assert refused(handle.pwrite, b"x" * 100_000, 0) == "EPERM"
    assert refused(handle.zero, 4096, 0) == "EPERM"
    assert refused(handle.trim, 4096, 0) == "EPERM"
    assert handle.pread(8 * MiB, 0) == before == disk.read_bytes()


@pytest.mark.parametrize("structured", [True, False])
def test_hundreds_of_requests_in_flight(servers, connect, blank, structured):
    import nbd

    handle = connect(servers.nbdserve(blank), structured=structured)
    size = 3 * KiB
    model = {number * 5000: os.urandom(size) for number in range(600)}

    def finish(cookies):
        while cookies:
            handle.poll(-1)
            for cookie in list(cookies):
                if handle.aio_command_completed(cookie):
                    cookies.remove(cookie)

    finish({handle.aio_pwrite(nbd.Buffer.from_bytearray(data), at) for at, data in model.items()})
    buffers = {at: nbd.Buffer(size) for at in model}
    finish({handle.aio_pread(buffer, at) for at, buffer in buffers.items()})
    assert {at: bytes(buffer.to_bytearray()) for at, buffer in buffers.items()} == model


def test_reads_overtake_a_slow_flush_and_long_writes(servers, connect, blank):
    """Requests of all kinds, mixed in one connection, each with its own result."""
    import nbd

    handle = connect(servers.nbdserve("--discard=unmap", blank), contexts=CONTEXTS[:1])
    finished = []

    def done(name):
        def note(error):
            assert error.value == 0, name
            finished.append(name)
            return 1

        return note

    data = os.urandom(MiB)
    for number in range(8):
        handle.aio_pwrite(nbd.Buffer.from_bytearray(data), number * 8 * MiB, done("write"))
        handle.aio_flush(done("flush"))
        handle.aio_zero(MiB, (number * 8 + 2) * MiB, done("zero"))
        handle.aio_trim(MiB, (number * 8 + 4) * MiB, done("trim"))
        handle.aio_cache(MiB, number * 8 * MiB, done("cache"))
        handle.aio_block_status(MiB, number * 8 * MiB, lambda *_: 0, done("status"))
        handle.aio_pread(nbd.Buffer(4096), (number * 8 + 5) * MiB, done("read"))
    while handle.aio_in_flight() or handle.aio_peek_command_completed() > 0:
        handle.poll(-1)
        if len(finished) == 56:
            break
    assert sorted(finished) == sorted(["write", "flush", "zero", "trim", "cache", "status", "read"] * 8)
    assert all(handle.pread(MiB, number * 8 * MiB) == data for number in range(8))


def test_what_one_connection_flushed_another_reads(servers, connect, blank):
    server = servers.nbdserve("-e", "2", blank)
    first, second = connect(server), connect(server)
    assert first.can_multi_conn()
    first.pwrite(b"first" * 1000, 0)
    second.pwrite(b"other" * 1000, 5000)
    second.flush()
    assert second.pread(5000, 0) == b"first" * 1000
    assert first.pread(5000, 5000) == b"other" * 1000


def test_the_options_of_the_handshake_in_any_order(servers, disk):
    import nbd

    server = servers.nbdserve("-e", "0", "-x", "name", "-D", "of some kind", "-A", disk)
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(server.export("nosuch"))
    assert handle.aio_is_negotiating()
    assert refused(handle.opt_info) == "ENOENT"
    listed = []
    assert handle.opt_list(lambda name, description: listed.append((name, description))) == 1
    assert listed == [("name", "of some kind")]
    handle.set_export_name("name")
    handle.set_full_info(True)
    contexts = []
    handle.opt_list_meta_context(contexts.append)
    assert contexts == list(CONTEXTS)
    handle.opt_info()
    assert (handle.get_size(), handle.get_export_description()) == (8 * MiB, "of some kind")
    assert handle.get_canonical_export_name() == "name"
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MiB
    handle.opt_go()
    assert handle.pread(16, 0) == bytes(16)
    handle.shutdown()


@pytest.mark.parametrize("handshake_flags", [0, 1, 2, 3])
def test_old_kinds_of_newstyle(servers, disk, handshake_flags):
    """Without fixed newstyle the client has EXPORT_NAME alone, with and without the padding."""
    import nbd

    handle = nbd.NBD()
    handle.set_handshake_flags(handshake_flags)
    handle.connect_uri(servers.nbdserve("-e", "2", disk).uri)
    fixed = handshake_flags & nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE
    assert handle.get_protocol() == ("newstyle-fixed" if fixed else "newstyle")
    assert handle.get_size() == 8 * MiB
    assert handle.pread(192 * KiB, 64 * KiB) == disk.read_bytes()[64 * KiB : 256 * KiB]
    handle.shutdown()


def test_tls_is_refused_politely(servers, disk):
    import nbd

    server = servers.nbdserve("-e", "2", disk)
    handle = nbd.NBD()
    handle.set_tls(nbd.TLS_REQUIRE)
    assert refused(handle.connect_uri, server.uri)
    handle = nbd.NBD()
    handle.set_tls(nbd.TLS_ALLOW)
    handle.connect_uri(server.uri)
    assert not handle.get_tls_negotiated()
    handle.shutdown()
