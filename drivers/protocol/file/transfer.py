"""A file through the host's page cache. What blocks is for threads."""

from __future__ import annotations

import os

from drivers.block.transfer import read_full, write_full


class BufferedFile:
    """Input and output through the host's page cache."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, offset: int, buffer: memoryview) -> None:
        read_full(self.fd, offset, buffer)

    def write(self, offset: int, data: memoryview, flags: int = 0) -> None:
        write_full(self.fd, offset, data, flags)

    def close(self) -> None:
        os.close(self.fd)
