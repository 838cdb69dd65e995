"""Makes the images of this directory with the real qemu-img and qemu-io, and manifest.json.

    python tests/golden/qcow2/make.py [NAME...]

The manifest keeps for each image the very commands, what the guest sees (size, SHA-256) and
`qemu-img map`; likewise its internal snapshots and stored bitmaps. Needs qemu-utils, libnbd-bin.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECRET = "correct horse"


def create(options: str, size: str, name: str = "disk.qcow2", extra: str = "") -> str:
    return f"qemu-img create -q -f qcow2 {extra} {f'-o {options}' if options else ''} {name} {size}"


def io(*commands: str, name: str = "disk.qcow2", image_format: str = "qcow2", options: str = "") -> str:
    words = " ".join(f"-c '{command}'" for command in commands)
    return f"qemu-io {options or f'-f {image_format}'} {words} {name}"


def texts(lines: int, name: str = "text.raw", size: str = "1M") -> str:
    """A raw file of text, which compresses to about a quarter."""
    return f"seq -f 'line %06g of the text' 1 {lines} > {name} && truncate -s {size} {name}"


def plain(options: str, cluster: int, size: int) -> list[str]:
    """Data in some clusters: whole ones, parts, across two, the last; zeroes and holes between."""
    return [
        create(options, str(size)),
        io(
            f"write -P 1 0 {cluster}",
            f"write -P 2 {2 * cluster + 100} 300",
            f"write -P 3 {4 * cluster - 256} 512",
            f"write -P 4 {size - 512} 512",
            f"write -z {cluster} {cluster}",
        ),
    ]


SUBCLUSTERS = [
    create("extended_l2=on,cluster_size=64k", "1M"),
    io(
        "write -P 1 0 2k",  # one subcluster, the first
        "write -P 2 62k 2k",  # and the last of the same cluster
        "write -P 3 64k 64k",  # all of them
        "write -z 128k 2k",  # zeroes without a place
        "write -z 192k 64k",  # all zeroes, no place
        "write -P 4 256k 64k",
        "write -z 260k 4k",  # zeroes with a place
        "discard 270k 6k",
        "write -P 5 321k 1k",  # part of a subcluster
        "write -P 6 383k 2k",  # across two clusters
        "write -c -P 7 448k 64k",  # compressed
        "write -P 8 514k 10k",
        "write -z -u 516k 4k",
    ),
]

ENCRYPTED = f"--object secret,id=sec0,data='{SECRET}'"
OPENED = "--image-opts driver=qcow2,encrypt.key-secret=sec0,file.filename=disk.qcow2"
# What is encrypted does not compress: little is written.
LUKS = (
    "encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10,"
    "encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64"
)


def encrypted(options: str) -> list[str]:
    return [
        create(options, "256k", extra=ENCRYPTED),
        f"qemu-io {ENCRYPTED} -c 'write -P 1 0 2k' -c 'write -P 2 70k 1k' -c 'write -z 128k 4k' {OPENED}",
    ]


def backed(base: list[str], base_format: str, size: str, options: str = "") -> list[str]:
    return [
        *base,
        create(options, size, extra=f"-b base.{base_format} -F {base_format}"),
        io("write -P 1 64k 64k", "write -P 2 200k 1000", "write -z 256k 64k", "discard 320k 64k"),
    ]


RAW_BASE = [texts(3000, "base.raw", "700k")]
QCOW2_BASE = [
    create("cluster_size=4k", "600k", "base.qcow2"),
    io("write -P 20 0 100k", "write -P 21 250k 300k", "write -z 400k 8k", name="base.qcow2"),
]

IMAGES: dict[str, list[str]] = {
    "v2": plain("compat=0.10", 65536, 1 << 20),
    "v3": plain("compat=1.1", 65536, 1 << 20),
    "cluster-512": plain("cluster_size=512", 512, 300 << 10),
    "cluster-4k": plain("cluster_size=4k", 4096, 5 << 20),
    "cluster-2m": plain("cluster_size=2M", 2 << 20, 10 << 20),
    "odd-size": [create("", str((1 << 20) + 512)), io("write -P 1 1048064 1024")],
    "empty": [create("", "0")],
    "large": [create("", "4T"), io("write -P 1 3T 64k", "write -P 2 0 512")],
    "subclusters": SUBCLUSTERS,
    "subclusters-2m": [
        create("extended_l2=on,cluster_size=2M", "8M"),
        io("write -P 1 0 64k", "write -P 2 4M 2M", "write -z 4224k 128k", "write -z 6M 64k"),
    ],
    "subclusters-backing": [
        *RAW_BASE,
        create("extended_l2=on,cluster_size=16k", "800k", extra="-b base.raw -F raw"),
        io("write -P 1 1k 512", "write -z 16k 1k", "discard 32k 16k", "write -P 2 690k 20k"),
    ],
    "zlib": [
        texts(2500, size="300k"),
        "qemu-img convert -c -f raw -O qcow2 text.raw disk.qcow2",
        io("write -P 1 64k 64k", "write -P 2 130k 512"),
        "rm text.raw",
    ],
    "zstd": [
        texts(2500, size="300k"),
        "qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd text.raw disk.qcow2",
        io("write -P 1 64k 64k"),
        "rm text.raw",
    ],
    "zlib-4k": [
        texts(2500, size="100k"),
        "qemu-img convert -c -f raw -O qcow2 -o cluster_size=4k text.raw disk.qcow2",
        "rm text.raw",
    ],
    "zstd-2m": [
        texts(2500, size="3M"),
        "qemu-img convert -c -f raw -O qcow2 -o cluster_size=2M,compression_type=zstd text.raw disk.qcow2",
        "rm text.raw",
    ],
    "zlib-subclusters": [
        texts(2000, size="300k"),
        "qemu-img convert -c -f raw -O qcow2 -o extended_l2=on text.raw disk.qcow2",
        io("write -P 1 64k 2k"),
        "rm text.raw",
    ],
    "zero-plain": [create("", "512k"), io("write -P 1 0 256k", "write -z -u 64k 64k", "write -z 300k 100k")],
    "zero-preallocated": [create("", "512k"), io("write -P 1 0 256k", "write -z 64k 64k")],
    "zero-v2": [
        create("compat=0.10", "512k"),
        io("write -P 1 0 256k", "write -z 64k 64k", "discard 128k 64k"),
    ],
    "discarded": [create("", "512k"), io("write -P 1 0 512k", "discard 64k 128k", "write -P 2 100k 4k")],
    "preallocated-metadata": [create("preallocation=metadata", "1M"), io("write -P 1 0 64k")],
    "preallocated-falloc": [create("preallocation=falloc,cluster_size=4k", "256k"), io("write -P 1 0 8k")],
    "backing-raw": backed(RAW_BASE, "raw", "700k"),
    "backing-raw-shorter": backed(RAW_BASE, "raw", "1M"),
    "backing-raw-longer": backed(RAW_BASE, "raw", "500k"),
    "backing-qcow2": backed(QCOW2_BASE, "qcow2", "600k"),
    "backing-qcow2-shorter": backed(QCOW2_BASE, "qcow2", "900k", "cluster_size=16k"),
    "backing-qcow2-longer": backed(QCOW2_BASE, "qcow2", "500k", "compat=0.10"),
    "backing-chain": [
        texts(500, "bottom.raw", "128k"),
        create("cluster_size=8k", "300k", "middle.qcow2", "-b bottom.raw -F raw"),
        io("write -P 30 16k 16k", "write -z 40k 8k", "write -P 31 256k 8k", name="middle.qcow2"),
        create("", "200k", "base.qcow2", "-b middle.qcow2 -F qcow2"),
        io("write -P 40 64k 1k", name="base.qcow2"),
        create("cluster_size=4k", "400k", extra="-b base.qcow2 -F qcow2"),
        io("write -P 50 12k 4k", "write -P 51 198k 4k"),
    ],
    "data-file": [
        create("data_file=disk.data", "512k"),
        io("write -P 1 0 64k", "write -P 2 200k 1k", "write -z 256k 64k"),
    ],
    "data-file-raw": [
        create("data_file=disk.data,data_file_raw=on", "512k"),
        io("write -P 1 0 64k", "write -P 2 200k 1k", "write -z 256k 64k"),
    ],
    **{
        f"refcount-{bits}": [
            create(f"refcount_bits={bits},cluster_size=4k", "512k"),
            io("write -P 1 0 128k", "write -P 2 300k 4k"),
            *(["qemu-img snapshot -c one disk.qcow2", io("write -P 3 0 4k")] if bits > 1 else []),
        ]
        for bits in (1, 2, 4, 8, 16, 32, 64)
    },
    "lazy-clean": [create("lazy_refcounts=on", "512k"), io("write -P 1 0 64k")],
    "lazy-dirty": [
        create("lazy_refcounts=on", "512k"),
        "qemu-io -f qcow2 -c 'write -P 1 0 128k' -c flush -c abort disk.qcow2 2>/dev/null; true",
    ],
    "snapshots": [
        create("cluster_size=4k", "256k"),
        io("write -P 1 0 64k"),
        "qemu-img snapshot -c first disk.qcow2",
        io("write -P 2 32k 64k", "discard 0 8k"),
        "qemu-img resize -q disk.qcow2 512k",
        io("write -P 3 400k 8k"),
        "qemu-img snapshot -c second disk.qcow2",
        "qemu-img resize -q --shrink disk.qcow2 128k",
        "qemu-img snapshot -c 'the third' disk.qcow2",
        io("write -P 4 0 1k"),
    ],
    "snapshots-v2": [
        create("compat=0.10", "256k"),
        io("write -P 1 0 64k"),
        "qemu-img snapshot -c first disk.qcow2",
        io("write -P 2 32k 64k"),
        "qemu-img snapshot -c second disk.qcow2",
        "qemu-img snapshot -d first disk.qcow2",
        io("write -P 3 128k 1k"),
    ],
    "snapshots-subclusters": [
        create("extended_l2=on,cluster_size=16k", "256k"),
        io("write -P 1 0 10k"),
        "qemu-img snapshot -c first disk.qcow2",
        io("write -P 2 1k 1k"),
    ],
    "bitmaps": [
        create("", "1M"),
        "qemu-img bitmap --add disk.qcow2 enabled",
        "qemu-img bitmap --add -g 512 disk.qcow2 fine",
        "qemu-img bitmap --add --disable disk.qcow2 disabled",
        io("write -P 1 0 64k", "write -P 2 200k 1k"),
        "qemu-img bitmap --disable disk.qcow2 fine",
        "qemu-img bitmap --merge enabled disk.qcow2 disabled",
        io("write -P 3 512k 64k", "write -z 700k 1k"),
        "qemu-img bitmap --add disk.qcow2 clean",
    ],
    "bitmaps-full": [
        create("cluster_size=4k", "8M"),
        "qemu-img bitmap --add -g 512 disk.qcow2 full",
        io("write -z 0 8M"),
    ],
    "bitmaps-in-use": [
        create("", "1M"),
        "qemu-img bitmap --add disk.qcow2 left",
        "qemu-img bitmap --add --disable disk.qcow2 right",
        "qemu-io -f qcow2 -c 'write -P 9 0 64k' -c flush -c abort disk.qcow2 2>/dev/null; true",
    ],
    "encrypted-aes": encrypted("encrypt.format=aes,encrypt.key-secret=sec0,cluster_size=4k"),
    "encrypted-luks": encrypted(LUKS + ",cluster_size=4k"),
}  # fmt: skip


def shell(command: str, directory: Path) -> str:
    """Run one of the commands. LUKS needs several tries: qemu-img refuses where it cannot measure
    how fast the machine is, as some are too fast for a short iter-time."""
    for _ in range(200):
        done = subprocess.run(command, shell=True, cwd=directory, capture_output=True, text=True)
        if "accurate CPU usage" not in done.stderr:
            break
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")
    return done.stdout


def opened(name: str) -> str:
    """How qemu-img is told to open the image."""
    if not name.startswith("encrypted"):
        return "-f qcow2 disk.qcow2"
    return f"{ENCRYPTED} {OPENED}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def guest(name: str, directory: Path, options: str = "") -> dict[str, Any]:
    words = "-U" if name.startswith("encrypted") else f"-U {options}"
    shell(f"qemu-img convert {words} -O raw {opened(name)} guest.raw", directory)
    found = {"size": (directory / "guest.raw").stat().st_size, "sha256": digest(directory / "guest.raw")}
    (directory / "guest.raw").unlink()
    return found


def bitmaps(directory: Path, info: dict[str, Any]) -> dict[str, Any]:
    """The stored bitmaps: flags, granularity and the dirty ranges where they can be told."""
    out: dict[str, Any] = {}
    for entry in info.get("format-specific", {}).get("data", {}).get("bitmaps", []):
        row = out[entry["name"]] = {
            "granularity": entry["granularity"],
            "enabled": "auto" in entry["flags"],
            "inconsistent": "in-use" in entry["flags"],
        }
        if not row["inconsistent"]:
            row["dirty"] = dirty(directory, entry["name"])
    return out


def dirty(directory: Path, bitmap: str) -> list[list[int]]:
    command = ["qemu-nbd", "-r", "-f", "qcow2", "-k", str(directory / "s"), "-B", bitmap, "disk.qcow2"]
    with subprocess.Popen(command, cwd=directory) as server:
        try:
            while not (directory / "s").exists():
                time.sleep(0.01)
            found = shell(
                f"nbdinfo --json --map=qemu:dirty-bitmap:{bitmap} 'nbd+unix:///?socket=s'", directory
            )
        finally:
            server.terminate()
    with contextlib.suppress(FileNotFoundError):
        (directory / "s").unlink()
    return [[row["offset"], row["length"]] for row in json.loads(found) if row["type"] & 1]


def make(name: str, commands: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for command in commands:
            shell(command, directory)
        files = sorted(path.name for path in directory.iterdir())
        for file in files:
            packed = gzip.compress((directory / file).read_bytes(), 9, mtime=0)
            (HERE / f"{name}.{file}.gz").write_bytes(packed)
        described = opened(name)
        info = json.loads(shell(f"qemu-img info -U --output=json {described}", directory))
        row: dict[str, Any] = {"commands": commands, "files": files}
        if name.startswith("encrypted"):
            row["secret"] = SECRET
        if info["virtual-size"] > 1 << 30:
            row["size"] = info["virtual-size"]  # its content is told by the map
        else:
            row |= guest(name, directory)
        row["map"] = [
            [e["start"], e["length"], e["depth"], e["present"], e["zero"], e["data"], e.get("offset")]
            for e in json.loads(shell(f"qemu-img map -U --output=json {described}", directory))
        ]
        if snapshots := info.get("snapshots"):
            row["snapshots"] = {
                entry["name"]: {"id": entry["id"], **guest(name, directory, f"-l '{entry['name']}'")}
                for entry in snapshots
            }
        if stored := bitmaps(directory, info):
            row["bitmaps"] = stored
        return row


def main() -> None:
    path = HERE / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    names = sys.argv[1:] or list(IMAGES)
    if not sys.argv[1:]:
        manifest = {}
        for old in HERE.glob("*.gz"):
            old.unlink()
    for name in names:
        manifest[name] = make(name, IMAGES[name])
    lines = [f"{json.dumps(name)}: {json.dumps(manifest[name])}" for name in IMAGES if name in manifest]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
