"""A signed kernel image for kexec and kdump: what it says, what it puts into memory, and the state it starts in. Pure.

Layouts are in vtlab.services (KexecType). The command line and the version are under the signature: a kernel that is
told not to guard itself is another kernel. Source of what a kernel finds: Multiboot Specification 0.6.96, section 3.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from vtl1_monitor.policy.image import read_image
from vtlab.errors import BadImage
from vtlab.ram import PAGE_SIZE
from vtlab.services import (
    KEXEC_HEADER,
    KEXEC_KIMAGE,
    KEXEC_MAGIC,
    KEXEC_MODULE,
    KEXEC_MODULES,
    KexecEntry,
)
from vtlab.v1 import registers_pb2
from vtlab.x86 import initial

LOW_END = 0x10_0000
"""Kernels lie above 1 MiB; the information structure is below."""
INFORMATION = 0x9000
INFORMATION_SIZE = 2 * PAGE_SIZE
_LOADER_MAGIC = 0x2BADB002
_HAS_MEMORY, _HAS_COMMAND_LINE, _HAS_MODULES = 1, 1 << 2, 1 << 3
_STRUCTURE_SIZE = 88
_LOWER_MEMORY = 639  # KiB below the firmware's area
_MAX_COMMAND_LINE = 1024
_ENTRY_LIMIT = 1 << 32


class BadKernel(Exception):
    """The image is not one that can be started. The text says why."""


class KexecModule(NamedTuple):
    """First byte, byte after the last, command line without NUL."""

    start: int
    end: int
    command_line: bytes


class Kernel(NamedTuple):
    """Attributes: `offset` of the ELF file in the signed one; `parts` as BootImage.loaded; `entry` is physical."""

    version: int
    command_line: bytes
    offset: int
    parts: list[tuple[int, int, bytes]]
    entry: int

    @property
    def first(self) -> int:
        """Page-aligned address of the lowest byte."""
        return min(gpa for gpa, _, _ in self.parts) & -PAGE_SIZE

    @property
    def end(self) -> int:
        """Page-aligned address behind the highest byte."""
        return -(-max(gpa + size for gpa, size, _ in self.parts) // PAGE_SIZE) * PAGE_SIZE

    def image(self) -> bytes:
        """What lies from `first` to `end`."""
        memory = bytearray(self.end - self.first)
        for gpa, _, data in self.parts:
            memory[gpa - self.first : gpa - self.first + len(data)] = data
        return bytes(memory)


def read_kernel(data: bytes, ram_size: int) -> Kernel:
    """Takes an image apart, its signature removed and verified. Raises BadKernel."""
    if len(data) < KEXEC_HEADER.size:
        raise BadKernel("kernel image is truncated")
    magic, version, entry_mode, line_size = KEXEC_HEADER.unpack_from(data)
    if magic != KEXEC_MAGIC:
        raise BadKernel("no kernel image for kexec")
    if entry_mode != KexecEntry.MULTIBOOT:
        raise BadKernel(f"entry {entry_mode} is not known")
    line = data[KEXEC_HEADER.size : KEXEC_HEADER.size + line_size].rstrip(b"\0")
    offset = KEXEC_HEADER.size + -(-line_size // 8) * 8
    if line_size > _MAX_COMMAND_LINE or b"\0" in line:
        raise BadKernel("command line is too long or has a zero byte")
    try:
        elf = read_image(data[offset:], "next kernel")
    except BadImage as error:
        raise BadKernel(str(error)) from None
    parts = [part for part in elf.loaded if part[1]]
    if not elf.is_elf or not parts:
        raise BadKernel("kernel is no ELF file that loads anything")
    kernel = Kernel(version, line, offset, parts, int.from_bytes(data[offset + 24 : offset + 32], "little"))
    if kernel.first < LOW_END or kernel.end > min(ram_size, _ENTRY_LIMIT):
        raise BadKernel(f"kernel at {kernel.first:#x}-{kernel.end:#x} is not in RAM above 1 MiB")
    if not any(gpa <= kernel.entry < gpa + len(content) for gpa, _, content in parts):
        raise BadKernel(f"entry {kernel.entry:#x} is not in what is loaded")
    return kernel


def read_modules(data: bytes) -> tuple[KexecModule, ...]:
    """The list of a KIMAGE page. Raises BadKernel."""
    if len(data) < KEXEC_KIMAGE.size:
        raise BadKernel("list of modules is truncated")
    (count,) = KEXEC_KIMAGE.unpack_from(data)
    end = KEXEC_KIMAGE.size + count * KEXEC_MODULE.size
    if count > KEXEC_MODULES or end > len(data):
        raise BadKernel(f"{count} modules")
    return tuple(
        KexecModule(start, stop, name.partition(b"\0")[0])
        for start, stop, name in KEXEC_MODULE.iter_unpack(data[KEXEC_KIMAGE.size : end])
    )


def information(command_line: bytes, modules: Sequence[KexecModule], ram_size: int) -> bytes:
    """The multiboot information structure and what it points to, for the address INFORMATION."""
    texts = [command_line + b"\0", *(module.command_line + b"\0" for module in modules)]
    list_at = INFORMATION + _STRUCTURE_SIZE
    at = list_at + 16 * len(modules)
    places = [at + sum(map(len, texts[:number])) for number in range(len(texts))]
    upper = (min(ram_size, _ENTRY_LIMIT) - LOW_END) >> 10
    flags = _HAS_MEMORY | _HAS_COMMAND_LINE | _HAS_MODULES
    structure = struct.pack("<7I", flags, _LOWER_MEMORY, upper, 0, places[0], len(modules), list_at)
    entries = b"".join(
        struct.pack("<4I", module.start, module.end, place, 0)
        for module, place in zip(modules, places[1:], strict=True)
    )
    return structure.ljust(_STRUCTURE_SIZE, b"\0") + entries + b"".join(texts)


def entry_state(entry: int) -> registers_pb2.ProcessorState:
    """Multiboot's machine state: flat 32-bit segments, no paging, EAX and EBX."""
    state = initial.protected_mode(entry)
    state.registers.rax, state.registers.rbx = _LOADER_MAGIC, INFORMATION
    return state
