"""Encrypted qcow2 images: opened with the secret that the options name, and made.

See QEMU's docs/interop/qcow2.txt, "Full disk encryption header pointer" and "Encryption".
"""

from __future__ import annotations

from typing import Protocol

from drivers.block.area import NodeArea
from drivers.block.graph import Graph
from drivers.block.node import Node, OpenFlags
from drivers.crypto.legacy import aes_cipher
from drivers.crypto.luks import volume
from drivers.crypto.luks.layout import header_area
from drivers.errors import ImageError, OptionError
from drivers.format.qcow2.header import CryptMethod
from drivers.format.qcow2.image import Image
from drivers.format.qcow2.new import NewImage
from drivers.objects import encryption as objects_encryption
from drivers.objects.encryption import password_of
from drivers.objects.store import ObjectStore
from drivers.options.schema import Options

_FORMATS = {CryptMethod.AES: "aes", CryptMethod.LUKS: "luks"}


# --- opening ------------------------------------------------------------------------------------


async def unlock(image: Image, options: Options, objects: ObjectStore, flags: OpenFlags) -> None:
    """Give an encrypted image its cipher, and where it is LUKS's the volume with its key slots; the
    option `encrypt` names the secret. Where `flags` say that guest data are of no interest the image
    may stay locked. Raises OptionError and ImageError."""
    file, header = image.file.node, image.header
    encrypt = Options(options.subtree("encrypt"), owner=options.owner)
    wanted, key_secret = encrypt.string("format", None), encrypt.string("key-secret", None)
    method = CryptMethod(header.crypt_method)
    if method is CryptMethod.NONE:
        if wanted is not None:
            raise OptionError(f"No encryption in image header, but options specified format '{wanted}'")
        # A secret alone claims nothing; it is left unused, as by QEMU.
        if left := encrypt.left():
            raise OptionError(f"Block format 'qcow2' does not support the option 'encrypt.{left}'")
        return
    if wanted not in (None, _FORMATS[method]):
        raise OptionError(
            f"Header reported '{_FORMATS[method]}' encryption format but options specify '{wanted}'"
        )
    image.locked = flags.for_info or (flags.for_check and not key_secret)
    password = b"" if image.locked else password_of(key_secret, objects, prefix="encrypt.")
    if left := encrypt.left():
        raise OptionError(f"Parameter '{left}' is unexpected")
    image.crypt_by_guest = method is CryptMethod.AES
    if method is CryptMethod.AES:
        image.crypt = None if image.locked else aes_cipher(password)
        return
    if header.encryption is None:
        raise ImageError("LUKS encryption without the header extension that says where its header is")
    length = header.encryption.length
    area = NodeArea(file, header.encryption.offset, length)
    if image.locked:
        image.luks = await volume.read_header(area, area_bytes=length)
        return
    image.volume = await volume.unlock(area, password, area_bytes=length)
    image.crypt, image.luks = image.volume.cipher, image.volume.header


# --- creating -----------------------------------------------------------------------------------


class NewEncryption(Protocol):
    """`header_bytes`: the room for what write_header() writes; 0 where there is no such header."""

    header_bytes: int

    async def write_header(self, file: Node, offset: int) -> None: ...


class _NewAes:
    header_bytes = 0

    async def write_header(self, file: Node, offset: int) -> None:
        raise AssertionError


class _NewLuks:
    def __init__(self, wanted: objects_encryption.NewEncryption, password: bytes) -> None:
        self._wanted = wanted
        self._password = password
        self.header_bytes = header_area(wanted.format)

    async def write_header(self, file: Node, offset: int) -> None:
        area = NodeArea(file, offset, self.header_bytes)
        wanted = self._wanted
        await volume.create(area, wanted.format, self._password, iter_time=wanted.iter_time)


def take_encryption(image: NewImage, graph: Graph) -> NewEncryption | None:
    """The encryption that the options ask for, with its secret from `graph`. Raises OptionError."""
    if image.crypt_method is CryptMethod.NONE:
        return None
    wanted = _take(image)
    password = password_of(wanted.key_secret, graph.objects, prefix="encrypt.")
    return _NewAes() if image.crypt_method is CryptMethod.AES else _NewLuks(wanted, password)


def header_bytes(image: NewImage) -> int:
    """Bytes of the encryption header that the options lead to."""
    return header_area(_take(image).format) if image.crypt_method is CryptMethod.LUKS else 0


def _take(image: NewImage) -> objects_encryption.NewEncryption:
    options = Options(image.encrypt, owner="qcow2")
    if image.crypt_method is CryptMethod.LUKS:
        wanted = objects_encryption.take_encryption(options)
    else:
        wanted = objects_encryption.NewEncryption(key_secret=options.string("key-secret", None))
    if left := options.left():
        raise OptionError(f"Parameter 'encrypt.{left}' is unexpected")
    return wanted
