"""Multiboot 1 kernels: header, information structure, machine state.

Source: Multiboot Specification 0.6.96. Differences to it: bit 2 of the header (video mode) is accepted and no video
information given, as QEMU does; and a 64-bit ELF file with a header is loaded by its physical addresses and started in
32-bit protected mode, where QEMU wants it converted to 32 bits first.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from vtl0_guest.loaders import states
from vtl0_guest.loaders.acpi import place_tables
from vtl0_guest.loaders.elf import load_segments
from vtl0_guest.loaders.target import (
    DEVICES_START,
    FIRMWARE_SIZE,
    FIRMWARE_START,
    HIGH_START,
    LOW_END,
    Target,
    memory_map,
)
from vtlab.errors import BadImage
from vtlab.v1 import registers_pb2, vcpu_pb2

HEADER_MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002
LOADER_NAME = b"vtlab"
_SEARCH_SIZE = 8192

_HEADER_ADDRESSES = 1 << 16
# Bits 15:3 are requirements that this loader does not know.
_HEADER_UNKNOWN = 0xFFF8

# Bits of the information structure's flags.
_INFO_MEMORY, _INFO_COMMAND_LINE, _INFO_MODULES, _INFO_MEMORY_MAP, _INFO_LOADER_NAME = 1, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_INFO_SIZE = 88
# Room for the structure: anywhere below this, where boot loaders put it.
_INFO_LIMIT = 0x9F000


class Header(NamedTuple):
    """A header found in a file. Addresses are meaningful only if flags bit 16 is set."""

    offset: int
    flags: int
    header_address: int = 0
    load_address: int = 0
    load_end_address: int = 0
    bss_end_address: int = 0
    entry_address: int = 0


class _Module(NamedTuple):
    start: int
    end: int
    command_line: bytes


def find_header(image: bytes) -> Header | None:
    """The first valid header: 4-byte aligned and wholly inside the first 8 KiB."""
    window = image[:_SEARCH_SIZE]
    magic = struct.pack("<I", HEADER_MAGIC)
    offset = window.find(magic)
    while 0 <= offset <= len(window) - 12:
        _, flags, checksum = struct.unpack_from("<III", window, offset)
        if offset % 4 == 0 and (HEADER_MAGIC + flags + checksum) & 0xFFFF_FFFF == 0:
            if not flags & _HEADER_ADDRESSES:
                return Header(offset, flags)
            if offset + 32 <= len(window):
                return Header(offset, flags, *struct.unpack_from("<5I", window, offset + 12))
        offset = window.find(magic, offset + 1)
    return None


def load_multiboot(
    image: bytes, boot: vcpu_pb2.BootImage, modules: Sequence[bytes], target: Target
) -> registers_pb2.ProcessorState:
    """Loads kernel and modules and starts the kernel with the information structure at EBX."""
    header = find_header(image)
    if header is None:
        raise target.bad("multiboot header: none in the first 8 KiB")
    if header.flags & _HEADER_UNKNOWN:
        raise target.bad(f"multiboot header: flags {header.flags:#x} ask for what this loader does not know")
    if header.flags & _HEADER_ADDRESSES:
        entry = _load_by_addresses(image, header, target)
    else:
        entry = load_segments(image, target).entry
    state = states.protected_mode(target, entry)
    placed = _place_modules(boot, modules, target)
    state.registers.rax = LOADER_MAGIC
    state.registers.rbx = _place_information(boot, placed, target)
    if target.is_free(FIRMWARE_START, FIRMWARE_SIZE):
        place_tables(target, target.vp_count)
    return state


def _load_by_addresses(image: bytes, header: Header, target: Target) -> int:
    """Loads a file that is no ELF by the addresses in its header; returns the entry point."""
    before = header.header_address - header.load_address
    start = header.offset - before
    if before < 0 or start < 0:
        raise target.bad(
            f"multiboot header: load_addr {header.load_address:#x} does not fit header_addr "
            f"{header.header_address:#x} at file offset {header.offset:#x}"
        )
    size = header.load_end_address - header.load_address if header.load_end_address else len(image) - start
    if size < 0 or start + size > len(image):
        raise target.bad(f"multiboot header: load_end_addr {header.load_end_address:#x} is not in the file")
    memory_size = header.bss_end_address - header.load_address if header.bss_end_address else size
    if memory_size < size:
        raise target.bad(f"multiboot header: bss_end_addr {header.bss_end_address:#x} is below the end of the data")
    target.put(header.load_address, image[start : start + size], "multiboot header: load_addr", memory_size)
    if not header.load_address <= header.entry_address < header.load_address + size:
        raise target.bad(f"multiboot header: entry_addr {header.entry_address:#x} is outside the image")
    return header.entry_address


def _text(value: str, subject: str, field: str) -> bytes:
    data = value.encode()
    if b"\0" in data:
        raise BadImage(subject, f"{field}: contains a zero byte")
    return data + b"\0"


def _place_modules(boot: vcpu_pb2.BootImage, modules: Sequence[bytes], target: Target) -> list[_Module]:
    """Modules go above the kernel, each on pages of its own."""
    if len(modules) != len(boot.modules):
        raise target.bad(f"modules: {len(boot.modules)} named, {len(modules)} given")
    placed = []
    for described, data in zip(boot.modules, modules, strict=True):
        if not data:
            raise BadImage(described.path, "is empty")
        address = target.find_above(max(target.highest_end(), HIGH_START), len(data), f"module {described.path}")
        target.put(address, data, f"module {described.path}")
        text = _text(described.command_line, described.path, "command line")
        placed.append(_Module(address, address + len(data), text))
    return placed


def _place_information(boot: vcpu_pb2.BootImage, modules: list[_Module], target: Target) -> int:
    """Writes the information structure and all that it points to as one piece; returns its address.

    The command line starts with the file's name, as QEMU's and GRUB's do.
    """
    line = _text(f"{PurePath(boot.path).name} {boot.command_line}".rstrip(), boot.path, "command line")
    entries = memory_map(target.ram_size)
    memory = b"".join(struct.pack("<IQQI", 20, *entry) for entry in entries)
    list_size = 16 * len(modules)
    texts = [line, LOADER_NAME + b"\0", *(module.command_line for module in modules)]
    size = _INFO_SIZE + len(memory) + list_size + sum(map(len, texts))
    low_is_free = all(first >= _INFO_LIMIT for first, _ in target.taken)
    if low_is_free and size < _INFO_LIMIT:
        base = target.find_below(_INFO_LIMIT, size, "multiboot information")
    else:
        base = target.find_above(max(target.highest_end(), HIGH_START), size, "multiboot information")
    map_at = base + _INFO_SIZE
    list_at = map_at + len(memory)
    text_at = [list_at + list_size]
    for text in texts:
        text_at.append(text_at[-1] + len(text))
    module_list = b"".join(
        struct.pack("<IIII", module.start, module.end, text, 0)
        for module, text in zip(modules, text_at[2:], strict=False)
    )
    flags = _INFO_MEMORY | _INFO_COMMAND_LINE | _INFO_MODULES | _INFO_MEMORY_MAP | _INFO_LOADER_NAME
    lower = min(target.ram_size, LOW_END) >> 10
    upper = max(0, min(target.ram_size, DEVICES_START) - HIGH_START) >> 10
    information = bytearray(_INFO_SIZE)
    struct.pack_into("<7I", information, 0, flags, lower, upper, 0, text_at[0], len(modules), list_at)
    struct.pack_into("<II", information, 44, len(memory), map_at)
    struct.pack_into("<I", information, 64, text_at[1])
    target.put(base, bytes(information) + memory + module_list + b"".join(texts), "multiboot information")
    return base
