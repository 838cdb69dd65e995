"""Compressed clusters. All of these take their time: call them in a thread (they let others run)."""

from __future__ import annotations

import errno
import zlib

from drivers.errors import RequestError
from drivers.format.qcow2.header import CompressionType

# QEMU writes raw deflate data with a window of 4 KiB.
_WINDOW_BITS = -12


def compress(data: memoryview, kind: CompressionType) -> bytes:
    """`data` compressed; perhaps longer than it was."""
    if kind == CompressionType.ZSTD:
        import zstandard  # only who uses it pays for loading it

        return zstandard.ZstdCompressor().compress(data)
    deflate = zlib.compressobj(level=zlib.Z_DEFAULT_COMPRESSION, wbits=_WINDOW_BITS)
    return deflate.compress(data) + deflate.flush()


def decompress(data: bytes | bytearray, size: int, kind: CompressionType) -> bytes:
    """The `size` bytes that `data`, with whatever follows them, was made of."""
    try:
        if kind == CompressionType.ZSTD:
            out = _decompress_zstd(data, size)
        else:
            out = zlib.decompressobj(_WINDOW_BITS).decompress(data, size)
    except Exception as error:  # zlib.error, ZstdError
        raise RequestError(errno.EIO, f"a compressed cluster is damaged: {error}") from None
    if len(out) != size:
        raise RequestError(errno.EIO, "a compressed cluster is damaged: it is too short")
    return out


def _decompress_zstd(data: bytes | bytearray, size: int) -> bytes:
    import zstandard

    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=False) as reader:
        return reader.read(size)
