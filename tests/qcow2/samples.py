"""Small qcow2 images with something of everything, made by qemu-img and qemu-io."""

from __future__ import annotations

from pathlib import Path

from tests.qcow2.images import qemu_img, qemu_io

# Name: (options of create, what is done).
SAMPLES: dict[str, str] = {
    "plain": "",
    "small": "cluster_size=512",
    "old": "compat=0.10,cluster_size=4k",
    "one-bit": "refcount_bits=1,cluster_size=1k",
    "four-bits": "refcount_bits=4,cluster_size=32k",
    "wide": "refcount_bits=64,cluster_size=2k",
    "extended": "extended_l2=on,cluster_size=16k",
    "zstd": "compression_type=zstd,cluster_size=4k",
}


def make_sample(name: str, path: Path, *, for_repair: bool = False) -> None:
    """Data, zeroes of all kinds, compressed clusters, snapshots and bitmaps.

    `for_repair`: never both snapshots and bitmaps. qemu-img 7.2 drops the snapshots of an image
    with bitmaps when it opens it for a repair, so it cannot tell what is right there.
    """
    options = SAMPLES[name]
    qemu_img("create", "-q", "-f", "qcow2", *(("-o", options) if options else ()), path, "1M")
    zero = "write -z 128k 20k" if "0.10" not in options else "write -P 0 128k 20k"
    qemu_io(path, "write -P 1 0 90k", "write -P 2 200k 8k", zero, "write -P 3 700k 40k")
    qemu_io(path, "write -c -P 4 448k 64k", "write -c -P 5 512k 64k", "discard 704k 8k")
    if name != "one-bit":
        qemu_img("snapshot", "-c", "first", path)
        qemu_io(path, "write -P 6 60k 50k", "write -P 7 900k 1k")
        qemu_img("snapshot", "-c", "second", path)
        qemu_io(path, "write -P 8 0 10k", "write -c -P 9 576k 64k")
    if "0.10" not in options and not (for_repair and name != "one-bit"):
        qemu_img("bitmap", "--add", "-g", "512", path, "dirt")
        qemu_img("bitmap", "--add", "-g", "64k", path, "more")
        qemu_io(path, "write -P 10 300k 3k", "write -z 64k 64k")
