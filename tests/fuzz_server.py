"""A fuzzer that knows the protocol's fields: good conversations of a client with some fields, bytes or
cuts gone wrong. Seeded, so that a case can be repeated.

    python -m tests.fuzz_server --seed 1 --cases 100000 [--first 4711]

Whatever comes, the server must neither end nor complain, and in the end serve a good client right.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import select
import socket
import tempfile
from pathlib import Path

from drivers.wire.nbd import messages
from drivers.wire.nbd.constants import (
    EXTENDED_REQUEST_MAGIC,
    OPTION_MAGIC,
    REQUEST_MAGIC,
    Command,
    Option,
)
from tests.hostile.client import Client, counted
from tests.hostile.conftest import SIZE, Address, Served, unix_listener

# Numbers at which something ends.
EDGES = [0, 1, 2, 3, 7, 8, 255, 511, 512, 4095, 4096, 4097, 65535, 65536, 65537, SIZE - 1, SIZE, SIZE + 1]
EDGES += [(1 << bits) + step for bits in (15, 16, 25, 31, 32, 33, 62, 63, 64) for step in (-1, 0, 1)]


class Case:
    """One conversation, made from `seed` and `number` alone."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        # Most fields of most cases are as they should be, or nothing deep would be reached.
        self.wrong = self.random.choice([0.0, 0.005, 0.02, 0.1])
        self.extended = self.random.random() < 0.4

    def field(self, value: int, bits: int) -> int:
        """`value`, or something else that fits its field."""
        if self.random.random() >= self.wrong:
            return value
        mask = (1 << bits) - 1
        flipped = value ^ (1 << self.random.randrange(bits))
        others = [self.random.choice(EDGES), self.random.getrandbits(bits), flipped, value + 1]
        return self.random.choice(others) & mask

    def blob(self, longest: int = 64) -> bytes:
        return self.random.randbytes(self.random.randrange(longest))

    def option(self, number: int, payload: bytes) -> bytes:
        if self.random.random() < self.wrong:
            payload = self.random.choice([payload[:-1], payload + b"\0", self.blob(), b""])
        return (
            messages.OPTION.pack(
                self.field(OPTION_MAGIC, 64), self.field(number, 32), self.field(len(payload), 32)
            )
            + payload
        )

    def string(self, text: bytes) -> bytes:
        return messages.U32.pack(self.field(len(text), 32)) + text

    def handshake(self) -> bytes:
        name = self.random.choice([b""] * 9 + [b"other"])
        queries = self.random.choice([[b"base:allocation"], [], [b"base:"], [b"base:allocation", b"x:y"]])
        context = (
            self.string(name)
            + messages.U32.pack(self.field(len(queries), 32))
            + b"".join(map(self.string, queries))
        )
        infos = [self.random.randrange(5) for _ in range(self.random.randrange(4))]
        go = (
            self.string(name)
            + messages.U16.pack(self.field(len(infos), 16))
            + b"".join(map(messages.U16.pack, infos))
        )
        style = Option.EXTENDED_HEADERS if self.extended else Option.STRUCTURED_REPLY
        options = [self.option(style, b"")]
        optional = [
            (Option.LIST, b""), (Option.SET_META_CONTEXT, context), (Option.LIST_META_CONTEXT, context),
            (Option.INFO, go), (Option.STARTTLS, b""), (99, self.blob()),
        ]  # fmt: skip
        options += [self.option(*self.random.choice(optional)) for _ in range(self.random.randrange(5))]
        options.append(
            self.option(Option.EXPORT_NAME, name)
            if not self.extended and self.random.random() < 0.2
            else self.option(Option.GO, counted(name) + go[4 + len(name) :])
        )
        return messages.CLIENT_FLAGS.pack(self.field(3, 32)) + b"".join(options)

    def request(self) -> bytes:
        command = self.random.choice([*Command])
        length = self.random.choice([0, 1, 512, 4096, 65537, 200_000])
        offset = self.random.randrange(0, SIZE - length)
        payload = bytes(length) if command == Command.WRITE else b""
        flags = self.random.choice([0, 0, 0, 1, 2, 4, 8, 16])
        magic, layout, bits = REQUEST_MAGIC, messages.REQUEST, 32
        if self.extended:
            magic, layout, bits = EXTENDED_REQUEST_MAGIC, messages.EXTENDED_REQUEST, 64
            if command == Command.WRITE:
                flags |= 32
            elif command == Command.BLOCK_STATUS and self.random.random() < 0.5:
                payload = messages.OFFSET.pack(self.field(length, 64)) + messages.U32.pack(self.field(1, 32))
                flags, length = flags | 32, len(payload)
        header = layout.pack(
            self.field(magic, 32),
            self.field(flags, 16),
            self.field(command, 16),
            self.random.getrandbits(64),
            self.field(offset, 64),
            self.field(length, bits),
        )
        return header + payload

    def stream(self) -> bytes:
        whole = self.handshake() + b"".join(self.request() for _ in range(self.random.randrange(12)))
        if self.random.random() < self.wrong:
            at = self.random.randrange(len(whole))
            whole = self.random.choice([whole[:at], whole[at:], whole[:at] + self.blob() + whole[at:]])
        return whole


def converse(address: Address, case: Case) -> None:
    """Say it all, in pieces, and drop what comes back, as far as it comes at once."""
    with contextlib.suppress(OSError), Client(address) as client:
        stream = memoryview(case.stream())
        client.socket.setblocking(False)
        while stream:
            piece = stream[: case.random.choice([1, 17, 1000, 100_000, 1 << 20])]
            readable, writable, _ = select.select([client.socket], [client.socket], [], 5)
            if readable and not client.socket.recv(1 << 20):
                return
            if writable:
                stream = stream[client.socket.send(piece) :]
            assert readable or writable, "the server neither reads nor answers"
        if case.random.random() < 0.8:
            # What was asked is answered to the end.
            client.socket.settimeout(20)
            client.socket.shutdown(socket.SHUT_WR)
            while client.socket.recv(1 << 20):
                pass


def fuzz(server: Served, seed: int, cases: int, first: int = 0) -> None:
    server.check()
    descriptors, memory = server.descriptors(), server.memory()
    for number in range(first, first + cases):
        try:
            converse(server.address, Case(seed, number))
            if not number % 100:
                server.check()
        except BaseException:
            print(f"case {number} of seed {seed}")
            raise
    server.check()
    server.settle(descriptors)
    assert server.memory() - memory < 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "disk"
        with image.open("wb") as file:
            file.truncate(SIZE)
        server = Served(
            "-t", "-e", "0", "-f", "raw", str(image), listener=unix_listener(Path(directory) / "s")
        )
        try:
            fuzz(server, given.seed, given.cases, given.first)
            assert server.end() == ""
        finally:
            if server.process.returncode is None:
                server.process.kill()
                server.process.communicate()


if __name__ == "__main__":
    main()
