"""Copying between host files, and comparing them: no node is asked, nothing is awaited."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from drivers.block.extents import Span
from nbdclient.image.zeroes import data_runs

# Stays in the processor's cache between the reading, the looking and the writing.
BUFFER = 256 << 10
_ZEROES = bytes(BUFFER)
_CANNOT_OFFLOAD = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)


class CopyError(Exception):
    """`position` bytes into the copy reading or writing failed; or, comparing, "first" or "second"."""

    def __init__(self, doing: str, position: int, error: OSError) -> None:
        super().__init__(doing, position)
        self.doing = doing
        self.position = position
        self.error = error


def pairs(sources: Sequence[Span], targets: Sequence[Span]) -> Iterator[tuple[int, int, int, int, int]]:
    """(source fd, its offset, target fd, its offset, length) of the pieces that are whole in both."""
    ahead = iter(targets)
    target_fd, target_offset, room = -1, 0, 0
    for source_fd, source_offset, length in sources:
        while length:
            if not room:
                target_fd, target_offset, room = next(ahead)
            piece = min(length, room)
            yield source_fd, source_offset, target_fd, target_offset, piece
            source_offset += piece
            target_offset += piece
            length -= piece
            room -= piece


def copy_detecting(
    sources: Sequence[Span], targets: Sequence[Span], *, granule: int, minimum: int, phase: int
) -> list[tuple[int, int]]:
    """Copy what is not zero; (offset in the copy, length) of what is and was left out. `phase` is the
    copy's own offset in the target. Raises CopyError."""
    zeroes: list[tuple[int, int]] = []
    step = max(BUFFER, granule)
    buffer = bytearray(step)
    view = memoryview(buffer)
    position = 0
    for source_fd, source_offset, target_fd, target_offset, length in pairs(sources, targets):
        if source_fd < 0:
            zeroes.append((position, length))
            position += length
            continue
        end = position + length
        while position < end:
            # The steps end with granules, so that none is looked at in halves.
            size = min(step - (phase + position) % granule, end - position)
            read(source_fd, source_offset, view[:size], position)
            done = 0
            runs = data_runs(buffer, size, granule=granule, minimum=minimum, phase=phase + position)
            for run_start, run_end in runs:
                if run_start > done:
                    zeroes.append((position + done, run_start - done))
                _write(target_fd, target_offset + run_start, view[run_start:run_end], position + run_start)
                done = run_end
            if done < size:
                zeroes.append((position + done, size - done))
            position += size
            source_offset += size
            target_offset += size
    return zeroes


def copy_all(sources: Sequence[Span], targets: Sequence[Span]) -> None:
    """Copy everything, in the kernel where it can. Raises CopyError."""
    position = 0
    for source_fd, source_offset, target_fd, target_offset, length in pairs(sources, targets):
        if source_fd < 0 or not _offload(source_fd, source_offset, target_fd, target_offset, length):
            _through_buffer(source_fd, source_offset, target_fd, target_offset, length, position)
        position += length


def first_difference(first: Sequence[Span], second: Sequence[Span], *, multiple: int) -> int | None:
    """The offset, a multiple of `multiple`, of the first part that differs. Raises CopyError."""
    position = 0
    for fd, offset, other_fd, other_offset, length in pairs(first, second):
        for done in range(0, length, BUFFER):
            size = min(BUFFER, length - done)
            left = _bytes_of("first", fd, offset + done, size, position + done)
            right = _bytes_of("second", other_fd, other_offset + done, size, position + done)
            if left != right:
                return position + done + differing(left, right, multiple)
        position += length
    return None


def differing(left: bytes | bytearray, right: bytes | bytearray, multiple: int) -> int:
    """The offset of the first `multiple` bytes in which the two, which do differ, do so."""
    low, size = 0, len(left)
    while size > multiple:
        half = -(-size // 2 // multiple) * multiple
        if left[low : low + half] == right[low : low + half]:
            low, size = low + half, size - half
        else:
            size = half
    return low


def _bytes_of(which: str, fd: int, offset: int, length: int, position: int) -> bytes:
    if fd < 0:
        return _ZEROES[:length]
    try:
        data = os.pread(fd, length, offset)
        while data and len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                break
            data += more
    except OSError as error:
        raise CopyError(which, position, error) from None
    return data.ljust(length, b"\0")  # behind the end of the file


def _offload(source_fd: int, source_offset: int, target_fd: int, target_offset: int, length: int) -> bool:
    while length:
        try:
            done = os.copy_file_range(source_fd, target_fd, length, source_offset, target_offset)
        except OSError as error:
            if error.errno in _CANNOT_OFFLOAD:
                return False
            raise CopyError("writing", 0, error) from None
        if not done:
            return False  # the source ends early: what is missing reads as zeroes
        source_offset += done
        target_offset += done
        length -= done
    return True


def _through_buffer(
    source_fd: int, source_offset: int, target_fd: int, target_offset: int, length: int, position: int
) -> None:
    view = memoryview(bytearray(min(BUFFER, length)))
    for done in range(0, length, BUFFER):
        part = view[: min(BUFFER, length - done)]
        read(source_fd, source_offset + done, part, position + done)
        _write(target_fd, target_offset + done, part, position + done)


def read(fd: int, offset: int, buffer: memoryview, position: int) -> None:
    """Fill `buffer`, which is for `position` in the copy. Raises CopyError."""
    while buffer:
        try:
            got = os.preadv(fd, [buffer], offset) if fd >= 0 else 0
        except OSError as error:
            raise CopyError("reading", position, error) from None
        if not got:
            buffer[:] = bytes(len(buffer))
            return
        buffer = buffer[got:]
        offset += got
        position += got


def write_spans(spans: Sequence[Span], data: memoryview) -> None:
    """Raises OSError."""
    for fd, offset, length in spans:
        part, data = data[:length], data[length:]
        while part:
            put = os.pwrite(fd, part, offset)
            part = part[put:]
            offset += put


def _write(fd: int, offset: int, data: memoryview, position: int) -> None:
    while data:
        try:
            put = os.pwrite(fd, data, offset)
        except OSError as error:
            raise CopyError("writing", position, error) from None
        data = data[put:]
        offset += put
        position += put
