"""Images made by hand, and memory to load them into."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vtl0_guest.loaders import load
from vtlab.v1 import registers_pb2, vcpu_pb2

RAM_SIZE = 4 << 20


class Segment(NamedTuple):
    virtual: int
    physical: int
    data: bytes
    memory_size: int


def elf_image(
    segments: list[Segment], entry: int, bits: int = 32, prefix: bytes = b"", kind: int = 2, machine: int | None = None
) -> bytes:
    """An ELF file: header, program headers, `prefix`, then the segments' data."""
    machine = machine if machine is not None else (3 if bits == 32 else 62)
    header_size, entry_size = (52, 32) if bits == 32 else (64, 56)
    ident = b"\x7fELF" + bytes([1 if bits == 32 else 2, 1, 1]) + bytes(9)
    layout = "<HHIIIIIHHHHHH" if bits == 32 else "<HHIQQQIHHHHHH"
    header = ident + struct.pack(
        layout, kind, machine, 1, entry, header_size, 0, 0, header_size, entry_size, len(segments), 0, 0, 0
    )
    offset = header_size + entry_size * len(segments) + len(prefix)
    table, body = b"", b""
    for segment in segments:
        at, size = offset + len(body), len(segment.data)
        if bits == 32:
            table += struct.pack("<8I", 1, at, segment.virtual, segment.physical, size, segment.memory_size, 7, 4096)
        else:
            table += struct.pack(
                "<IIQQQQQQ", 1, 7, at, segment.virtual, segment.physical, size, segment.memory_size, 4096
            )
        body += segment.data
    return header + table + prefix + body


def multiboot_header(flags: int = 3, addresses: tuple[int, ...] = ()) -> bytes:
    magic = 0x1BADB002
    return struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


class Memory:
    """RAM of a machine that is being loaded; a write outside it fails the test."""

    def __init__(self, size: int = RAM_SIZE, fill: int = 0xEE) -> None:
        self.data = bytearray([fill]) * size

    def write(self, gpa: int, data: bytes) -> None:
        assert 0 <= gpa <= gpa + len(data) <= len(self.data)
        self.data[gpa : gpa + len(data)] = data

    def load(
        self, image: bytes, module_data: list[bytes] | None = None, /, **boot: object
    ) -> registers_pb2.ProcessorState:
        boot.setdefault("format", vcpu_pb2.IMAGE_FORMAT_DETECT)
        described = vcpu_pb2.BootImage(path="dir/kernel.elf", **boot)  # type: ignore[arg-type]
        return load(image, described, module_data or [], self.write, len(self.data))

    def word(self, address: int) -> int:
        return int(struct.unpack_from("<I", self.data, address)[0])

    def text(self, address: int) -> bytes:
        return bytes(self.data[address : self.data.index(0, address)])
