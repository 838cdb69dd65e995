"""The `luks` format: the guest's disk, encrypted, behind a LUKS header that holds its keys."""

from __future__ import annotations

import errno
from dataclasses import replace

from drivers.block.area import NodeArea
from drivers.block.graph import OpenContext
from drivers.block.image import (
    CreateContext,
    CreateOption,
    ImageInfo,
    ImageNode,
    Measurement,
    Progress,
)
from drivers.block.inline import read_now, write_now
from drivers.block.limits import Limits
from drivers.block.node import Node, OpenFlags, Preallocation
from drivers.block.pace import Pace
from drivers.block.permission import Permission
from drivers.crypto.cipher import in_turns
from drivers.crypto.luks import volume
from drivers.crypto.luks.layout import SECTOR, Header, header_area
from drivers.crypto.luks.volume import Volume, read_header, unlock
from drivers.errors import OptionError, RequestError
from drivers.objects.encryption import amend_slots, describe, password_of, take_encryption
from drivers.objects.store import ObjectStore
from drivers.options.schema import Options

# What is written is encrypted in a copy, of so many bytes at a time.
_COPY_BYTES = 1 << 20


class LuksNode(ImageNode):
    """The payload of a LUKS volume in `child`, behind the header or, where the header is detached,
    from the child's beginning on."""

    driver_name = "luks"
    supports_fua = True
    create_options = (
        CreateOption("size", "size", "Virtual disk size"),
        CreateOption("key-secret", "string", "ID of the secret that provides the keyslot passphrase"),
        CreateOption("cipher-alg", "string", "Name of encryption cipher algorithm"),
        CreateOption("cipher-mode", "string", "Name of encryption cipher mode"),
        CreateOption("ivgen-alg", "string", "Name of IV generator algorithm"),
        CreateOption("ivgen-hash-alg", "string", "Name of IV generator hash algorithm"),
        CreateOption("hash-alg", "string", "Name of encryption hash algorithm"),
        CreateOption("iter-time", "number", "Time to spend in PBKDF in milliseconds"),
    )

    amend_options = (
        CreateOption("iter-time", "number", "Time to spend in PBKDF in milliseconds"),
        CreateOption("keyslot", "number", "Select a single keyslot to modify explicitly"),
        CreateOption(
            "new-secret", "string", "New secret to set in the matching keyslots. Empty string to erase"
        ),
        CreateOption("old-secret", "string", "Select all keyslots that match this password"),
        CreateOption("state", "string", "Select new state of affected keyslots (active/inactive)"),
    )

    def __init__(
        self,
        child: Node,
        header: Header,
        unlocked: Volume | None,
        objects: ObjectStore,
        *,
        flags: OpenFlags,
        payload_offset: int,
        name: str = "",
    ) -> None:
        """`unlocked` is None where no guest data are to be read or written. `objects` has the secrets
        that amend() is told of. The caller attaches the child."""
        if child.size < payload_offset:
            raise OptionError("The image ends before its LUKS payload begins")
        # The last sector is whole, though the file may end within it.
        size = -(-(child.size - payload_offset) // SECTOR) * SECTOR
        super().__init__(flags=flags, size=size, limits=Limits(request_alignment=SECTOR), name=name)
        self._child = child
        self._header = header
        self._volume = unlocked
        self._objects = objects
        self._pace = Pace()
        self._payload = payload_offset

    @classmethod
    async def open(cls, context: OpenContext, options: Options, /) -> LuksNode:
        child = await context.child(options)
        header_child = await context.child(options, "header") if "header" in options else None
        objects = context.graph.objects
        key_secret = options.string("key-secret", None)
        flags = context.flags
        if child.flags.read_only and flags.auto_read_only:
            flags = replace(flags, read_only=True)
        area, area_bytes = NodeArea(child), None
        if header_child is not None:
            area, area_bytes = NodeArea(header_child), header_child.size
        unlocked = None
        if flags.for_info:
            header = await read_header(area, area_bytes=area_bytes)
        else:
            unlocked = await unlock(area, password_of(key_secret, objects), area_bytes=area_bytes)
            header = unlocked.header
        payload_offset = header.payload_offset if header_child is None else 0
        node = cls(
            child, header, unlocked, objects, flags=flags, payload_offset=payload_offset, name=context.name
        )
        await node.use("file", child)
        if header_child is not None:
            await node.use("header", header_child)
        return node

    def _child_permissions(
        self, role: str, needed: Permission, shared: Permission, /
    ) -> tuple[Permission, Permission]:
        """The keys must stay what they were when they were read."""
        return needed | Permission.CONSISTENT_READ, shared

    # --- requests ---------------------------------------------------------------------------

    def _unlocked(self) -> Volume:
        if self._volume is None:
            raise RequestError(errno.EACCES, "the image was opened without its key")
        return self._volume

    async def _read_into(self, offset: int, buffer: memoryview, /) -> None:
        cipher = self._unlocked().cipher
        # What a file that ends within a sector lacks of it reads as zeroes, before it is decrypted.
        present = min(len(buffer), self._child.size - self._payload - offset)
        if not read_now(self._child, self._payload + offset, buffer[:present]):
            await self._child.read_into(self._payload + offset, buffer[:present])
        if present < len(buffer):
            buffer[present:] = bytes(len(buffer) - present)
        await in_turns(cipher.decrypt, offset // SECTOR, buffer)

    async def _write(self, offset: int, data: memoryview, /, *, fua: bool) -> None:
        cipher = self._unlocked().cipher
        end = self._payload + offset + len(data)
        if end > self._child.size and not self._child.grow(end):
            await self._child.truncate(end)
        for start in range(0, len(data), _COPY_BYTES):
            copy = memoryview(bytearray(data[start : start + _COPY_BYTES]))
            await in_turns(cipher.encrypt, (offset + start) // SECTOR, copy)
            at = self._payload + offset + start
            if fua or not write_now(self._child, at, copy, self._pace):
                await self._child.write(at, copy, fua=fua)

    async def _flush(self) -> None:
        await self._child.flush()

    async def _cache(self, offset: int, length: int, /) -> None:
        await self._child.cache(
            self._payload + offset, min(length, self._child.size - self._payload - offset)
        )

    async def _truncate(self, size: int, /, *, preallocation: Preallocation) -> None:
        """What is added reads as zeroes, and so it has to be written."""
        if size % SECTOR:
            raise RequestError(errno.EINVAL, f"the size must be a multiple of {SECTOR} bytes")
        await self._child.truncate(self._payload + size, preallocation=preallocation)
        zeroes = memoryview(bytes(min(_COPY_BYTES, max(0, size - self.size))))
        for offset in range(self.size, size, _COPY_BYTES):
            await self._write(offset, zeroes[: size - offset], fua=False)

    # --- the image as a whole ---------------------------------------------------------------

    @classmethod
    async def create(cls, context: CreateContext, options: Options, /) -> None:
        size = options.size("size")
        preallocation = options.choice("preallocation", ("off", "falloc", "full"), "off")
        wanted = take_encryption(options)
        password = password_of(wanted.key_secret, context.graph.objects)
        file = await context.create_file(context.filename)
        await file.truncate(header_area(wanted.format) + size, preallocation=Preallocation(preallocation))
        await volume.create(NodeArea(file), wanted.format, password, iter_time=wanted.iter_time)

    @classmethod
    async def measure(cls, options: Options, source: Node | None, /) -> Measurement:
        options.choice("preallocation", ("off", "falloc", "full"), "off")
        wanted = take_encryption(options)
        if wanted.key_secret is None:
            raise OptionError("Parameter 'key-secret' is required for cipher")
        size = options.size("size", None)
        whole = header_area(wanted.format) + (source.size if source is not None else size or 0)
        return Measurement(whole, whole)

    async def info(self) -> ImageInfo:
        return ImageInfo(
            encrypted=True, specific=describe(self._volume.header if self._volume else self._header)
        )

    async def amend(
        self, options: Options, /, *, progress: Progress | None = None, force: bool = False
    ) -> None:
        """With `force`, or "force" among the options, what makes the image unreadable for ever, too."""
        await amend_slots(self._unlocked(), options, self._objects, force=options.boolean("force", force))
