"""A kernel module's file: its appended signature, and the bytes that its sections must have where they are loaded.

Sources: Linux Documentation/admin-guide/module-signing.rst, include/linux/module_signature.h; psABI x86-64 for
relocations. The file comes from VTL0 and is hostile until its signature holds; it is read from sealed memory only.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection

from vtlab.services import MODULE_SIGNATURE, MODULE_SIGNATURE_MAGIC, PKEY_ID_PKCS7, ModuleType

SECTION_OF: dict[ModuleType, str] = {
    ModuleType.TEXT: ".text",
    ModuleType.INIT_TEXT: ".init.text",
    ModuleType.RODATA: ".rodata",
    ModuleType.INIT_RODATA: ".init.rodata",
    ModuleType.DATA: ".data",
    ModuleType.RO_AFTER_INIT: ".data..ro_after_init",
    ModuleType.INIT_DATA: ".init.data",
}
"""Types whose memory a module may have; `ELF` is the file itself."""

COMPARED = (ModuleType.TEXT, ModuleType.INIT_TEXT, ModuleType.RODATA, ModuleType.INIT_RODATA)
"""Types whose loaded bytes must be those of the relocated section."""


class BadModule(Exception):
    """The file is not a module, or what was loaded is not this file. The text says what."""


class Signed(NamedTuple):
    """A module file taken apart."""

    module: bytes
    signature: bytes


def split(data: bytes) -> Signed:
    """Separates the signature. Raises BadModule if there is none in Linux's layout."""
    if not data.endswith(MODULE_SIGNATURE_MAGIC):
        raise BadModule("module is not signed")
    body = data[: -len(MODULE_SIGNATURE_MAGIC)]
    if len(body) < MODULE_SIGNATURE.size:
        raise BadModule("module signature is truncated")
    algo, digest, id_type, signer, key_id, length = MODULE_SIGNATURE.unpack(body[-MODULE_SIGNATURE.size :])
    if id_type != PKEY_ID_PKCS7 or algo or digest or signer or key_id:
        raise BadModule(f"module signature of type {id_type} is not PKCS#7")
    body = body[: -MODULE_SIGNATURE.size]
    if not 0 < length < len(body):
        raise BadModule(f"module signature of {length} bytes in {len(body)}")
    return Signed(body[:-length], body[-length:])


# Relocation -> (size in bytes, PC-relative, signed). psABI x86-64, table 4.9.
_RELOCATIONS: dict[int, tuple[int, bool, bool]] = {
    1: (8, False, False),  # R_X86_64_64
    2: (4, True, True),  # R_X86_64_PC32
    4: (4, True, True),  # R_X86_64_PLT32
    10: (4, False, False),  # R_X86_64_32
    11: (4, False, True),  # R_X86_64_32S
}

GlobalValue = Callable[[str], int | None]


def expected_sections(
    module: bytes, addresses: Mapping[ModuleType, int], kernel: GlobalValue
) -> dict[ModuleType, bytes]:
    """The bytes of the compared sections, relocated.

    Args:
        module: the verified file without its signature.
        addresses: guest-virtual address of each type that is loaded.
        kernel: value of a global symbol of the kernel.

    Raises:
        BadModule: not an x86-64 ELF file, an unknown relocation or symbol, a value that does not fit.
    """
    try:
        return _Relocator(ELFFile(io.BytesIO(module)), addresses, kernel).sections()
    except (
        ELFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        OverflowError,
        struct.error,
    ) as error:
        raise BadModule(f"module cannot be read: {error}") from None


class _Relocator:
    def __init__(self, elf: Any, addresses: Mapping[ModuleType, int], kernel: GlobalValue) -> None:
        if elf.elfclass != 64 or elf["e_machine"] != "EM_X86_64" or not elf.little_endian:
            raise BadModule("module is no ELF file for x86-64")
        self._elf = elf
        self._kernel = kernel
        self._types = {name: kind for kind, name in SECTION_OF.items()}
        self._addresses = addresses

    def sections(self) -> dict[ModuleType, bytes]:
        result = {}
        for index, section in enumerate(self._elf.iter_sections()):
            kind = self._types.get(section.name)
            if kind not in COMPARED or not section["sh_size"]:
                continue
            if kind in result:
                raise BadModule(f"module has two sections {section.name}")
            if kind not in self._addresses:
                raise BadModule(f"section {section.name} is not among the ranges")
            result[kind] = self._relocated(index, section, self._addresses[kind])
        return result

    def _relocated(self, index: int, section: Any, address: int) -> bytes:
        data = bytearray(section.data())
        for table in self._elf.iter_sections():
            if isinstance(table, RelocationSection) and table["sh_info"] == index:
                if not table.is_RELA():
                    raise BadModule(f"section {table.name}: only RELA relocations are known")
                symbols = self._elf.get_section(table["sh_link"])
                for entry in table.iter_relocations():
                    self._apply(data, address, entry, symbols)
        return bytes(data)

    def _apply(self, data: bytearray, address: int, entry: Any, symbols: Any) -> None:
        known = _RELOCATIONS.get(entry["r_info_type"])
        if known is None:
            raise BadModule(f"relocation type {entry['r_info_type']} is not known")
        size, relative, signed = known
        offset = entry["r_offset"]
        if not 0 <= offset <= len(data) - size:
            raise BadModule(f"relocation at {offset:#x} is outside its section")
        value = self._symbol(symbols.get_symbol(entry["r_info_sym"])) + entry["r_addend"]
        value -= address + offset if relative else 0
        wrapped = (value + (1 << 63)) % (1 << 64) - (1 << 63)
        if not signed:
            wrapped %= 1 << 64
        try:
            data[offset : offset + size] = wrapped.to_bytes(size, "little", signed=signed)
        except OverflowError:
            raise BadModule(f"relocation at {offset:#x} does not fit {size} bytes") from None

    def _symbol(self, symbol: Any) -> int:
        index = symbol["st_shndx"]
        if index == "SHN_ABS":
            return int(symbol["st_value"])
        if index == "SHN_UNDEF":
            value = self._kernel(symbol.name)
            if value is None:
                raise BadModule(f"symbol {symbol.name} is not in the kernel")
            return value
        section = self._elf.get_section(index)
        kind = self._types.get(section.name)
        if kind is None or kind not in self._addresses:
            raise BadModule(f"symbol {symbol.name} is in section {section.name}, which is not loaded")
        return int(self._addresses[kind]) + int(symbol["st_value"])
