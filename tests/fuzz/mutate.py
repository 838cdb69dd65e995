"""Good images gone wrong: some of the format's fields changed, bytes flipped, the file cut.

A format adds only its field map; see tests/fuzz/qcow2.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.golden.unpack import Golden, golden


@dataclass(frozen=True)
class Field:
    """`size` bytes at `offset` of the file. Fields of one `group` share the chance to be chosen: there
    are far more table entries than header fields. `text` is changed by its bytes."""

    group: str
    name: str
    offset: int
    size: int
    order: Literal["big", "little"] = "big"
    text: bool = False


@dataclass(frozen=True)
class Format:
    """`fields` finds them in a good image. `limits`: numbers at which something of the format ends.
    `mask`: the bits of a table's entry that are an offset; the others are flags."""

    name: str
    fields: Callable[[bytes], Sequence[Field]]
    limits: Sequence[int]
    mask: int

    def bases(self) -> dict[str, Golden]:
        return golden(self.name)


@dataclass(frozen=True)
class Mutation:
    where: str
    before: bytes
    after: bytes

    def __str__(self) -> str:
        return f"{self.where}: {self.before[:24].hex() or '-'} -> {self.after[:24].hex() or '-'}"


class Case:
    """One image, made from `seed` and `number` alone."""

    def __init__(self, image_format: Format, seed: int, number: int) -> None:
        self.format = image_format
        self.name = f"{image_format.name}/{seed}/{number}"
        bases = image_format.bases()
        self.base = bases[random.Random(self.name).choice(list(bases))]
        self.mutations: list[Mutation] = []

    def __str__(self) -> str:
        return f"{self.base.name}, " + "; ".join(map(str, self.mutations))

    def build(self, where: Path) -> Path:
        """Lay the image, and whatever goes with it, into the directory; the same each time."""
        self.random = random.Random(f"{self.name}/build")
        self.mutations = []
        path = self.base.unpack(where)
        # Mostly the image itself goes wrong, now and then a backing file of the same format.
        layers = [name for name in self.base.files if name.endswith(path.suffix)]
        victim = where / (self.random.choice(layers) if self.random.random() < 0.2 else path.name)
        data = bytearray(victim.read_bytes())
        fields = self.format.fields(bytes(data))
        for _ in range(self.random.choice((1, 1, 1, 1, 2, 3))):
            self._mutate(data, fields)
        victim.write_bytes(data)
        return path

    def _mutate(self, data: bytearray, fields: Sequence[Field]) -> None:
        roll = self.random.random()
        if roll < 0.9 or not data:
            groups = sorted({field.group for field in fields})
            group = self.random.choice(groups)
            field = self.random.choice([field for field in fields if field.group == group])
            self._replace(data, field.name, field.offset, self._value(data, field, fields))
        elif roll < 0.95:
            at = self.random.randrange(min(len(data), 1 << self.random.randrange(8, 24)))
            flipped = data[at] ^ (1 << self.random.randrange(8))
            self._replace(data, f"byte {at}", at, bytes((flipped,)))
        else:
            length = self.random.choice((0, 1, 71, 512, len(data) // 2, len(data) - 1, len(data) - 512))
            length = max(0, min(length, len(data)))
            self.mutations.append(Mutation(f"cut to {length}", b"", b""))
            del data[length:]

    def _replace(self, data: bytearray, name: str, offset: int, value: bytes) -> None:
        self.mutations.append(Mutation(name, bytes(data[offset : offset + len(value)]), value))
        end = min(len(data), offset + len(value))
        data[offset:end] = value[: max(0, end - offset)]

    def _value(self, data: bytearray, field: Field, fields: Sequence[Field]) -> bytes:
        old = bytes(data[field.offset : field.offset + field.size])
        if field.text:
            at = self.random.randrange(len(old)) if old else 0
            # No separator: a name that leads out of the directory is no mistake of ours.
            byte = self.random.choice([*range(1, 47), *range(48, 256), 0])
            return old[:at] + bytes((byte,)) + old[at + 1 :]
        number = self.random.choice(list(self._numbers(data, field, fields)))
        return (number & ((1 << 8 * field.size) - 1)).to_bytes(field.size, field.order)

    def _numbers(self, data: bytearray, field: Field, fields: Sequence[Field]) -> Iterator[int]:
        """What may stand there, each equally likely."""
        bits = 8 * field.size
        old = int.from_bytes(data[field.offset : field.offset + field.size], field.order)
        yield from (0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1)
        yield from (old + 1, old - 1, old * 2, old // 2, ~old, old ^ (1 << self.random.randrange(bits)))
        yield self.random.getrandbits(bits)
        yield self.random.getrandbits(self.random.randrange(1, bits + 1))
        limit = self.random.choice(self.format.limits)
        yield from (limit - 1, limit, limit + 1)
        other = self.random.choice(fields)
        yield int.from_bytes(data[other.offset : other.offset + other.size], other.order)
        if field.size < 8:
            return
        # An offset that leads to itself, to the header, into another structure, behind the end.
        mask = self.format.mask
        flags = old & ~mask
        places = (field.offset, 0, other.offset, len(data), len(data) - 1, 1 << 55, 1 << 62)
        for place in places:
            yield flags | (place & mask)
            yield place
        yield (self.random.getrandbits(64) & ~mask) | (old & mask)
        yield flags | ((old + self.random.choice((1, 512, -512, 4096))) & mask)
