"""The qcow2 header: qemu-img's images survive parsing and building; wrong fields are named."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.errors import ImageError
from drivers.format.qcow2.header import (
    BitmapsExtension,
    CompressionType,
    EncryptionHeader,
    Header,
    parse_header,
)
from tests.qcow2.images import qemu_img

MIB = 1 << 20

OPTIONS = [
    "compat=0.10",
    "compat=1.1",
    *(f"cluster_size={1 << bits}" for bits in range(9, 22)),
    *(f"refcount_bits={1 << order}" for order in range(7)),
    "lazy_refcounts=on",
    "extended_l2=on",
    "compression_type=zstd",
    "data_file=data",
    "data_file=data,data_file_raw=on",
    "backing_file=base,backing_fmt=raw",
    "compat=0.10,backing_file=json:{},backing_fmt=qcow2",
    "backing_file=a/very/long/name,backing_fmt=raw,cluster_size=1024",
    "preallocation=metadata",
]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("options", OPTIONS)
def test_headers_of_qemu_img_are_built_again(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-o", options, "image", "1M")
    data = (tmp_path / "image").read_bytes()
    header = parse_header(data)
    built = header.build()
    assert data[: header.cluster_size] == built.ljust(header.cluster_size, b"\0")
    assert parse_header(built) == header


@pytest.mark.peer("qemu-img")
def test_headers_with_bitmaps_and_snapshots_are_built_again(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("snapshot", "-c", "one", path)
    qemu_img("bitmap", "--add", path, "dirt")
    data = path.read_bytes()
    header = parse_header(data)
    assert header.snapshot_count == 1
    assert header.bitmaps is not None
    assert header.bitmaps.count == 1
    built = header.build()
    assert data[: len(built)] == built


def _header(**changes: Any) -> Header:
    fields: dict[str, Any] = {
        "version": 3,
        "cluster_bits": 16,
        "size": MIB,
        "l1_size": 1,
        "l1_table_offset": 3 << 16,
        "refcount_table_offset": 1 << 16,
        "refcount_table_clusters": 1,
        **changes,
    }
    return Header(**fields)


_names = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=200
)
_headers = st.builds(
    _header,
    cluster_bits=st.integers(14, 21),
    snapshot_count=st.just(0),
    incompatible=st.sampled_from([0, 1, 2, 4, 16, 23]),
    compatible=st.integers(0, (1 << 64) - 1),
    autoclear=st.integers(0, (1 << 64) - 1).map(lambda bits: bits | 1),
    refcount_order=st.integers(0, 6),
    l1_table_offset=st.just(3 << 21),
    refcount_table_offset=st.just(1 << 21),
    backing_name=st.none() | _names,
    backing_format=st.sampled_from([None, "raw", "qcow2"]),
    data_file_name=st.none() | _names,
    bitmaps=st.none()
    | st.builds(BitmapsExtension, st.integers(1, 65535), st.integers(1, 9999), st.just(5 << 21)),
    encryption=st.none() | st.builds(EncryptionHeader, st.just(7 << 21), st.integers(1, MIB)),
    extensions=st.lists(st.tuples(st.integers(1, 9999), st.binary(max_size=99)), max_size=4).map(tuple),
)


@given(_headers)
def test_what_is_built_is_parsed(header: Header) -> None:
    parsed = parse_header(header.build())
    # The table of names, and the bytes behind the known fields, come with the building.
    assert parsed == Header(
        **{**vars(header), "feature_names": parsed.feature_names, "unknown_fields": parsed.unknown_fields}
    )
    assert parsed.build() == header.build()


# Offset, struct format, value, what the message tells.
BAD_FIELDS: list[tuple[int, str, int, str]] = [
    (0, ">I", 0x514649FC, "not in qcow2 format"),
    (4, ">I", 1, "version 1"),
    (4, ">I", 4, "version 4"),
    (8, ">Q", 1 << 40, "backing file offset"),
    (20, ">I", 8, "cluster size"),
    (20, ">I", 22, "cluster size"),
    (20, ">I", 0xFFFFFFFF, "cluster size"),
    (24, ">Q", 1 << 63, "too big"),
    (24, ">Q", 1 << 60, "too big"),
    (24, ">Q", 1 << 40, "L1 table is too small"),
    (32, ">I", 3, "encryption method 3"),
    (36, ">I", 0, "L1 table is too small"),
    (36, ">I", 1 << 30, "L1 table too large"),
    (40, ">Q", 0x30200, "L1 table offset"),
    (40, ">Q", 1 << 62, "L1 table offset"),
    (40, ">Q", 0, "L1 table offset"),
    (48, ">Q", 0x10200, "Reference count table offset"),
    (48, ">Q", (1 << 64) - 65536, "Reference count table offset"),
    (56, ">I", 0, "reference count table"),
    (56, ">I", 129, "Reference count table too large"),
    (60, ">I", 65537, "Snapshot table too large"),
    (60, ">I", 1, "Snapshot table offset"),
    (72, ">Q", 1 << 63, "Unknown incompatible feature: 8000000000000000"),
    (72, ">Q", 1 << 3, "Compression type incompatible feature bit"),
    (96, ">I", 7, "Reference count entry width"),
    (100, ">I", 72, "header too short"),
    (100, ">I", 1 << 20, "header exceeds cluster size"),
    (104, ">B", 1, "Compression type incompatible feature bit"),
    (116, ">I", 1 << 30, "Header extension too large"),
]


@pytest.mark.parametrize(("at", "layout", "value", "message"), BAD_FIELDS)
def test_a_wrong_field_is_named(at: int, layout: str, value: int, message: str) -> None:
    data = bytearray(_header().build())
    struct.pack_into(layout, data, at, value)
    with pytest.raises(ImageError, match=message):
        parse_header(bytes(data))


def test_an_unknown_compression_type() -> None:
    data = bytearray(_header(incompatible=8, compression_type=CompressionType.ZSTD).build())
    assert parse_header(bytes(data)).compression_type is CompressionType.ZSTD
    data[104] = 2
    with pytest.raises(ImageError, match="unknown compression type: 2"):
        parse_header(bytes(data))


def test_an_unknown_feature_has_the_name_that_the_image_gives_it() -> None:
    row = struct.pack(">BB46s", 0, 9, b"time travel")
    plain = _header(cluster_bits=12, l1_table_offset=3 << 12, refcount_table_offset=1 << 12, size=4096)
    extension = struct.pack(">II", 0x6803F857, len(row)) + row
    data = bytearray(plain.build()[:112] + extension + bytes(8))
    struct.pack_into(">Q", data, 72, 1 << 9 | 1 << 10)
    with pytest.raises(ImageError, match=r"time travel, Unknown incompatible feature: 400$"):
        parse_header(bytes(data))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (struct.pack(">BB", 0, 9) + b"cut", "feature.*: cut$"),
        (struct.pack(">BB46sBB46s", 1, 9, b"another kind", 0, 9, b"here"), "feature.*: here$"),
        (
            struct.pack(">BB46sBB46s", 0, 8, b"", 0, 9, b"behind"),
            "feature.*: Unknown incompatible feature: 200$",
        ),
    ],
)
def test_the_table_of_names_ends_with_its_bytes_or_an_empty_name(table: bytes, message: str) -> None:
    plain = _header(cluster_bits=12, l1_table_offset=3 << 12, refcount_table_offset=1 << 12, size=4096)
    padded = table + bytes(-len(table) % 8)
    data = bytearray(plain.build()[:112] + struct.pack(">II", 0x6803F857, len(table)) + padded + bytes(8))
    struct.pack_into(">Q", data, 72, 1 << 9)
    with pytest.raises(ImageError, match=message):
        parse_header(bytes(data))


def test_of_two_extensions_the_last_one_counts_and_is_kept() -> None:
    data = _header(cluster_bits=12, l1_table_offset=3 << 12, refcount_table_offset=1 << 12, size=4096).build()
    formats = [
        struct.pack(">II", 0xE2792ACA, len(name)) + name.ljust(8, b"\0") for name in (b"raw", b"qcow2")
    ]
    header = parse_header(data[:112] + b"".join(formats) + bytes(8))
    assert header.backing_format == "qcow2"
    assert header.build().count(struct.pack(">I", 0xE2792ACA)) == 1


def test_small_clusters_with_extended_l2_are_refused() -> None:
    data = _header(cluster_bits=13, l1_table_offset=3 << 13, refcount_table_offset=1 << 13, incompatible=16)
    with pytest.raises(ImageError, match="cluster sizes of at least 16384"):
        parse_header(data.build())


def test_a_check_takes_what_it_can_repair() -> None:
    data = _header(snapshot_count=65537, snapshots_offset=5).build()
    assert parse_header(data, for_check=True).snapshot_count == 65537
    with pytest.raises(ImageError, match="Snapshot table"):
        parse_header(data)


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ImageError, match="does not fit"):
        _header(cluster_bits=9, backing_name="x" * 500).build()


@given(st.data())
def test_no_bytes_but_an_image_error_or_a_header(data: st.DataObject) -> None:
    raw = bytearray(_header(backing_name="base", backing_format="raw", autoclear=1).build())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        header = parse_header(bytes(raw))
    except ImageError as error:
        assert str(error)
    else:
        assert 512 <= header.cluster_size <= 2 * MIB
        assert header.l1_size * 8 <= 32 * MIB
