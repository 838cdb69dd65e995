"""The encryption of a new image: what its options say, and its header."""

from __future__ import annotations

from typing import Protocol

from drivers.block.graph import Graph
from drivers.block.node import Node
from drivers.errors import OptionError
from drivers.format.qcow2.header import CryptMethod
from drivers.format.qcow2.new import NewImage


class NewEncryption(Protocol):
    """`header_bytes`: the room for what write_header() writes; 0 where there is no such header."""

    header_bytes: int

    async def write_header(self, file: Node, offset: int) -> None: ...


def take_encryption(image: NewImage, graph: Graph) -> NewEncryption | None:
    """The encryption that the options ask for, with its secret from `graph`. Raises OptionError."""
    if image.crypt_method is CryptMethod.NONE:
        return None
    raise OptionError("Encrypted images cannot be made yet")


def header_bytes(image: NewImage) -> int:
    """Bytes of the encryption header that the options lead to."""
    return 0 if image.crypt_method is not CryptMethod.LUKS else 0
