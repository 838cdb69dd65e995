"""nbdimg on raw images says and does what qemu-img does: exit status, both outputs, and files."""

import random

import pytest

from tests.image.both import Both, nbdimg

pytestmark = pytest.mark.peer("qemu-img")


def prepare(directory):
    for name, size in (("r.raw", 1 << 20), ("s.raw", 2 << 20), ("o.raw", 1000)):
        (directory / name).write_bytes(b"")
        with (directory / name).open("r+b") as file:
            file.truncate(size)
    with (directory / "d.raw").open("wb") as file:
        file.seek(70000)
        file.write(b"x")
        file.truncate(1 << 20)
    content = random.Random(1).randbytes(3072000) + bytes(300001) + b"x" * 5000
    (directory / "u.raw").write_bytes(content)
    (directory / "v.raw").write_bytes(content[:-1] + b"y")


@pytest.fixture
def both(tmp_path):
    return Both(tmp_path, prepare)


def test_command_line(both):
    both.agree(
        "foo",
        "--foo",
        "-T",
        "-x create",
    )


def test_create(both):
    both.agree(
        "create",
        "create -x",
        "create --foo",
        "create -f",
        "create -qx a",
        "create -xq a",
        "create a b c",
        "create -f raw a 1x",
        "create a -1",
        "create a 9E",
        "create a 17E",
        "create a 1.5",
        "create a",
        "create -f foo a 1M",
        "create a 1M 2M",
        "create -f raw a.raw 1M",
        "create -f raw -o preallocation=full a.raw 1M",
        "create -f raw -o preallocation=falloc a.raw 1M",
        "create -f raw -o preallocation=metadata a.raw 1M",
        "create -f raw -o preallocation=foo a.raw 1M",
        "create -f raw -b a b 1M",
        "create -f raw -F a b 1M",
        "create -o help",
        "create -f raw -o help",
        "create -f raw -o help x",
        "create -o help",
        "create nbd://localhost/x 1M",
        "create foo:bar 1M",
        "create /nonexist/x 1M",
        "create -o '' x 1M",
        "create -o ',a' x 1M",
        "create -o size x",
        "create -o nocow x 1M",
        "create -o nonocow x 1M",
        "create -o nocow=foo x 1M",
        "create -o size=1024.5M x",
        "create -o size=-1 x",
        "create -o size=99E x",
        "create -o foo=1 x 1M",
        "create -f raw -o nocow=on,extent_size_hint=1M x 1M",
        "create -q x 1000",
        "create -o preallocation=falloc x 900T",
        "create x 7E",
    )


def test_info(both):
    both.agree(
        "info a.raw",
        "info a.raw",
        "info x",
        "info",
        "info a b",
        "info nofile",
        "info -f foo r.raw",
        "info r.raw",
        "info --output=json r.raw",
        "info --backing-chain --output=json r.raw",
        "info --backing-chain r.raw",
        "info --output=foo r.raw",
        "info --image-opts foo",
        "info --image-opts driver=raw",
        "info --image-opts driver=raw,file.filename=r.raw",
        "info --image-opts -f raw driver=raw,file.filename=r.raw",
        "info --image-opts filename=r.raw",
        "info --image-opts driver=raw,file.filename=r.raw,foo=bar",
        'info \'json:{"driver":"raw","file":{"driver":"file","filename":"r.raw"}}\'',
        "info -U --image-opts driver=raw,file.filename=r.raw,force-share=off",
        'info --image-opts "driver=raw,,file.filename=r.raw"',
        'info --image-opts "driver=raw,file.filename"',
        "info r.raw",
    )


def test_map(both):
    both.agree(
        "map",
        "map r.raw",
        "map --output=json r.raw",
        "map --output=json d.raw",
        "map d.raw",
        "map --start-offset=64k --max-length=64k --output=json r.raw",
        "map -s 2M r.raw",
        "map -s 2M --output=json r.raw",
        "map -s x r.raw",
        "map -l -5 r.raw",
        "map --start-offset=-5 r.raw",
    )


def test_check(both):
    both.agree(
        "check",
        "check r.raw",
        "check --output=json r.raw",
        "check -r foo r.raw",
        "check nofile",
        "check -T foo r.raw",
        "check -q r.raw",
        "check a b",
    )


def test_snapshot(both):
    both.agree(
        "snapshot",
        "snapshot r.raw",
        "snapshot -c a r.raw",
        "snapshot -d a r.raw",
        "snapshot -l r.raw",
        "snapshot -l -c a a.qcow2",
        "snapshot -a x nofile",
    )


def test_resize(both):
    both.agree(
        "resize",
        "resize r.raw",
        "resize r.raw 2M",
        "resize -f raw r.raw 3M",
        "resize -f raw r.raw 1M",
        "resize --shrink -f raw r.raw 1M",
        "resize -f raw r.raw +1M",
        "resize -f raw --shrink r.raw -1M",
        "resize -f raw r.raw -10M",
        "resize -f raw r.raw x",
        "resize -f raw --preallocation=foo r.raw 2M",
        "resize -f raw --preallocation=full r.raw 2M",
        "resize -f raw --preallocation=metadata r.raw 3M",
        "resize -f raw --shrink --preallocation=full r.raw 1M",
        "resize -f raw -q r.raw +512",
        "resize -f raw r.raw +0",
        "resize nofile 2M",
        "resize -f raw r.raw 2M 3M",
        "resize -f raw r.raw 7E",
        "resize -f raw r.raw ++1",
        "resize -f raw r.raw +7.99E",
        "resize -f raw r.raw 100",
        "resize -f raw --shrink r.raw 100",
        "resize -f raw --preallocation=falloc r.raw 900T",
    )


def test_compare(both):
    both.agree(
        "compare",
        "compare r.raw",
        "compare r.raw r.raw",
        "compare r.raw s.raw",
        "compare -s r.raw s.raw",
        "compare r.raw d.raw",
        "compare -q r.raw d.raw",
        "compare r.raw nofile",
        "compare nofile r.raw",
        "compare -s r.raw d.raw",
        "compare -f foo r.raw d.raw",
        "compare -F foo r.raw d.raw",
        "compare d.raw d.raw",
        "compare -T foo r.raw s.raw",
        "compare s.raw d.raw",
        "compare u.raw v.raw",
        "compare u.raw u.raw",
        "compare -s u.raw u.raw",
        "compare r.raw s.raw",
        "compare s.raw r.raw",
        "compare a b c",
        "compare --foo",
        "compare --image-opts r.raw d.raw",
        "compare r.raw r.raw -f raw",
    )


def test_measure(both):
    both.agree(
        "measure",
        "measure r.raw",
        "measure --size 1G",
        "measure --size x",
        "measure --size 1G r.raw",
        "measure --size 1000",
        "measure -O foo r.raw",
        "measure -o help",
        "measure -o foo=1 --size 1G",
        "measure -f raw --size 1G",
        "measure --size -1",
        "measure nofile",
        "measure a b",
        "measure --size 9E",
        "measure --output=foo --size 1",
        "measure --output=json --size 1",
        "measure -o size=4 --size 1G",
        "measure -l x r.raw",
    )


def test_dd(both):
    both.agree(
        "dd",
        "dd if=r.raw",
        "dd of=x",
        "dd if=r.raw of=x",
        "dd if=nofile of=x",
        "dd if=r.raw of=x bs=0",
        "dd if=r.raw of=x bs=x",
        "dd if=r.raw of=x count=x",
        "dd if=u.raw of=x count=1 bs=4k",
        "dd if=u.raw of=x skip=1 bs=4k",
        "dd if=u.raw of=x skip=1 bs=40000",
        "dd if=u.raw of=x skip=3 bs=40001 count=6",
        "dd if=u.raw of=x skip=10 bs=1M",
        "dd if=u.raw of=x skip=2 bs=1M count=10",
        "dd if=r.raw of=x skip=10 bs=1M",
        "dd if=r.raw of=x bs=1M skip=1",
        "dd if=r.raw of=x foo=bar",
        "dd if=r.raw of=x foo",
        "dd -f foo if=r.raw of=x",
        "dd -O foo if=r.raw of=x",
        "dd if=r.raw of=x bs=3G",
        "dd if=r.raw of=x count=0",
        "dd if=u.raw of=x count=10G",
        "dd if=u.raw of=x count=10M bs=5k",
        "dd if=r.raw of=x bs=-1",
        "dd --image-opts if=driver=raw,file.filename=r.raw of=x",
        "dd if=r.raw of=/nonexist/x",
        "dd a b",
    )


def test_convert(both):
    both.agree(
        "convert",
        "convert r.raw",
        "convert r.raw -O foo x",
        "convert -O raw r.raw x",
        "info x",
        "convert -p -O raw r.raw x",
        "convert -n r.raw nofile",
        "convert -n r.raw x",
        "convert -n -o size=1 r.raw x",
        "convert -S 1 r.raw x",
        "convert -S x r.raw x",
        "convert -S 1k r.raw x",
        "convert -S 4G r.raw x",
        "convert -m 0 r.raw x",
        "convert -m 17 r.raw x",
        "convert -m x r.raw x",
        "convert -r x r.raw x",
        "convert -t foo r.raw x",
        "convert -T foo r.raw x",
        "convert --target-is-zero r.raw x",
        "convert --target-image-opts r.raw x",
        "convert --target-is-zero -n r.raw x",
        "convert -c r.raw x",
        "convert -c -C r.raw x",
        "convert -C -S 4k r.raw x",
        "convert -C --salvage r.raw x",
        "convert -C u.raw x",
        "convert --bitmaps r.raw x",
        "convert --skip-broken-bitmaps r.raw x",
        "convert -B a.qcow2 r.raw x",
        "convert -l foo r.raw x",
        "convert -l snapshot.id=1 r.raw x",
        "convert -l snapshot.foo=1 r.raw x",
        "convert -o help x y",
        "convert -o help",
        "convert r.raw nofile s.raw y",
        "convert r.raw d.raw y",
        "map --output=json y",
        "convert -n s.raw r.raw",
        "convert -q r.raw /nonexist/a",
        "convert r.raw nbd://localhost/x",
        "convert -O raw -o size=2M r.raw x",
        "info x",
        "convert -O raw -o size=2M,foo=1 r.raw x",
        "convert -s foo r.raw x",
        "convert -r 1M -q r.raw x",
        "convert r.raw r.raw",
        "convert -S 0 r.raw x",
        "map --output=json x",
        "convert -W -m 4 d.raw x",
        "map --output=json x",
        'convert "" x',
        "convert u.raw x",
        "map --output=json x",
        "convert u.raw d.raw u.raw x",
        "map --output=json x",
        "convert -S 64k u.raw x",
        "map --output=json x",
        "convert -S 1k u.raw x",
        "map --output=json x",
        "convert -O raw -o preallocation=full d.raw x",
        "map --output=json x",
        "convert -n u.raw x",
        "create -q x 4M",
        "convert -n --salvage u.raw x",
        "map --output=json x",
        "compare u.raw x",
        "convert --salvage u.raw x",
        "convert -f raw r.raw -C -c x",
    )


def test_copies_are_the_same(both):
    for name, line in (
        ("a", "convert u.raw a"),
        ("b", "convert u.raw d.raw o.raw u.raw b"),
        ("c", "convert -S 0 -W d.raw c"),
        ("d", "convert -C u.raw d"),
        ("e", "dd if=u.raw of=e bs=40000 skip=1"),
        ("f", "dd if=u.raw of=f bs=4k count=1"),
        ("g", "convert -S 64k u.raw g"),
    ):
        both.agree(line, f"map --output=json {name}")
        both.same_files(name)


def test_progress_for_scripts(tmp_path):
    prepare(tmp_path)
    status, output, errors = nbdimg("convert", "-p", "u.raw", "copy", directory=tmp_path)
    assert (status, errors) == (0, "")
    assert output.startswith("    (0.00/100%)")
    assert output.endswith("    (100.00/100%)\n")
