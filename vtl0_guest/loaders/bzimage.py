"""Linux kernels (bzImage) by the 64-bit boot protocol: the kernel unpacks itself.

Source: Linux Documentation/arch/x86/boot.rst ("The real-mode kernel header", "64-bit boot protocol") and zero-page.rst
(struct boot_params). The file is the real-mode part, of which only the header is used, and the protected-mode part,
which is entered 0x200 bytes behind its start in long mode with RSI at boot_params.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from vtl0_guest.loaders import states
from vtl0_guest.loaders.acpi import place_tables
from vtl0_guest.loaders.target import HIGH_START, LOW_END, PAGE_SIZE, Target, memory_map
from vtlab.errors import BadImage
from vtlab.v1 import registers_pb2, vcpu_pb2

MAGIC, MAGIC_AT = b"HdrS", 0x202
_BOOT_FLAG, _BOOT_FLAG_AT = b"\x55\xaa", 0x1FE
_HEADER_AT = 0x1F1
# Where a file's own header may end at most; the fields read here end at 0x264.
_HEADER_LIMIT, _HEADER_END = 0x290, 0x264
# The first version that announces 64-bit entry (xloadflags).
_OLDEST = 0x20C
_LOADED_HIGH = 1
_KERNEL_64 = 1
_ENTRY_64 = 0x200
_SECTOR = 512
_MOST_ALIGNMENT = 1 << 30
# Undefined loader; all of its flags and versions.
_LOADER_TYPE = 0xFF
_BOOT_CODE = 0x10

# Offsets in boot_params.
_ACPI_RSDP, _E820_COUNT, _E820_TABLE = 0x70, 0x1E8, 0x2D0
_TYPE_OF_LOADER, _CODE32_START, _RAMDISK, _COMMAND_LINE = 0x210, 0x214, 0x218, 0x228


class Header(NamedTuple):
    """What is used of the setup header."""

    # File offset and bytes of the protected-mode part.
    kernel_at: int
    kernel_size: int
    relocatable: bool
    alignment: int
    preferred: int
    # Bytes that the kernel needs from its load address on while it unpacks itself.
    init_size: int
    initrd_limit: int
    command_line_size: int


def is_bzimage(image: bytes) -> bool:
    """The file says that it is a Linux kernel with a setup header."""
    return image[MAGIC_AT : MAGIC_AT + 4] == MAGIC and image[_BOOT_FLAG_AT : _BOOT_FLAG_AT + 2] == _BOOT_FLAG


def read_header(image: bytes, target: Target) -> Header:
    """Checks the setup header. Raises BadImage naming the field."""
    if not is_bzimage(image):
        raise target.bad('setup header: no "HdrS" at 0x202, or no 0xaa55 at 0x1fe')
    if len(image) < _HEADER_END:
        raise target.bad("setup header: the file ends inside it")
    version, *_ = struct.unpack_from("<H", image, 0x206)
    if version < _OLDEST:
        raise target.bad(f"version: {version >> 8}.{version & 0xFF:02}, 64-bit entry needs 2.12 or later")
    if not image[0x211] & _LOADED_HIGH:
        raise target.bad("loadflags: a kernel that is not loaded high (zImage)")
    initrd_limit, alignment, relocatable = struct.unpack_from("<IIB", image, 0x22C)
    flags, command_line_size = struct.unpack_from("<HI", image, 0x236)
    if not flags & _KERNEL_64:
        raise target.bad(f"xloadflags: {flags:#x}, the kernel has no 64-bit entry point")
    if alignment & (alignment - 1) or not PAGE_SIZE <= alignment <= _MOST_ALIGNMENT:
        raise target.bad(f"kernel_alignment: {alignment:#x} is no power of two from {PAGE_SIZE:#x} on")
    preferred, init_size = struct.unpack_from("<QI", image, 0x258)
    # Zero means four, for the sake of old kernels.
    kernel_at = ((image[_HEADER_AT] or 4) + 1) * _SECTOR
    kernel_size = len(image) - kernel_at
    paragraphs, *_ = struct.unpack_from("<I", image, 0x1F4)
    if kernel_size <= _ENTRY_64:
        raise target.bad(f"setup_sects: {image[_HEADER_AT]}, the file ends at {len(image):#x} before the kernel does")
    if paragraphs * 16 > kernel_size:
        raise target.bad(f"syssize: {paragraphs * 16:#x} bytes of kernel, the file has {kernel_size:#x}")
    if init_size < kernel_size:
        raise target.bad(f"init_size: {init_size:#x} is less than the kernel's {kernel_size:#x} bytes")
    return Header(
        kernel_at, kernel_size, bool(relocatable), alignment, preferred, init_size, initrd_limit, command_line_size
    )


def load_bzimage(
    image: bytes, boot: vcpu_pb2.BootImage, modules: Sequence[bytes], target: Target
) -> registers_pb2.ProcessorState:
    """Loads the kernel where it prefers to be, and the first module as its initial RAM disk."""
    header = read_header(image, target)
    if len(modules) > 1 or len(modules) != len(boot.modules):
        raise target.bad(f"modules: {len(modules)} given, a Linux kernel takes one at most, its initial RAM disk")
    rsdp = place_tables(target, target.vp_count)
    address = _kernel_address(header, target)
    target.take(address, header.init_size, "init_size")
    target.write(address, image[header.kernel_at :])
    # Below 640 KiB, where neither the unpacking kernel nor its random address can reach.
    state = states.long_mode(target, address + _ENTRY_64, limit=LOW_END, code_selector=_BOOT_CODE)
    parameters = bytearray(PAGE_SIZE)
    end = min(MAGIC_AT + image[0x201], _HEADER_LIMIT, len(image))
    parameters[_HEADER_AT:end] = image[_HEADER_AT:end]
    parameters[_TYPE_OF_LOADER] = _LOADER_TYPE
    struct.pack_into("<I", parameters, _CODE32_START, address)
    struct.pack_into("<II", parameters, _RAMDISK, *_place_ramdisk(header, boot, modules, target))
    struct.pack_into("<I", parameters, _COMMAND_LINE, _place_command_line(header, boot, target))
    struct.pack_into("<Q", parameters, _ACPI_RSDP, rsdp)
    entries = memory_map(target.ram_size)
    parameters[_E820_COUNT] = len(entries)
    for number, entry in enumerate(entries):
        struct.pack_into("<QQI", parameters, _E820_TABLE + 20 * number, *entry)
    state.registers.rsi = target.find_below(LOW_END, PAGE_SIZE, "boot_params")
    target.put(state.registers.rsi, bytes(parameters), "boot_params")
    return state


def _kernel_address(header: Header, target: Target) -> int:
    """The preferred address; a kernel that can be moved goes to the first that is high enough if it does not fit."""
    preferred = header.preferred
    if HIGH_START <= preferred <= target.ram_size - header.init_size:
        return preferred
    first = -(-HIGH_START // header.alignment) * header.alignment
    if not header.relocatable or first + header.init_size > target.ram_size:
        raise target.bad(
            f"init_size: {header.init_size:#x} bytes do not fit at pref_address {preferred:#x} in RAM of "
            f"{target.ram_size:#x}"
        )
    return first


def _place_ramdisk(
    header: Header, boot: vcpu_pb2.BootImage, modules: Sequence[bytes], target: Target
) -> tuple[int, int]:
    """(address, bytes), as high as the kernel allows; zeros without one."""
    if not modules:
        return 0, 0
    if not modules[0]:
        raise BadImage(boot.modules[0].path, "is empty")
    address = target.find_below(header.initrd_limit + 1, len(modules[0]), f"initial RAM disk {boot.modules[0].path}")
    if address < HIGH_START:
        raise target.bad(f"initial RAM disk {boot.modules[0].path}: no room for {len(modules[0]):#x} bytes")
    target.put(address, modules[0], "initial RAM disk")
    return address, len(modules[0])


def _place_command_line(header: Header, boot: vcpu_pb2.BootImage, target: Target) -> int:
    data = boot.command_line.encode()
    if b"\0" in data:
        raise target.bad("command line: contains a zero byte")
    if len(data) > header.command_line_size:
        raise target.bad(f"cmdline_size: {header.command_line_size}, the command line has {len(data)} bytes")
    address = target.find_below(LOW_END, len(data) + 1, "command line")
    target.put(address, data + b"\0", "command line")
    return address
