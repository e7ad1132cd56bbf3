"""ELF images: PT_LOAD segments by physical address, the entry point translated to a physical one.

Source: System V ABI, chapters "Object files" and "Program loading"; the layouts are pyelftools'. The section table is
not needed to boot and is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.common.utils import struct_parse
from elftools.elf.structs import ELFStructs

from vtl0_guest.loaders import states
from vtl0_guest.loaders.flat import START_MODES
from vtl0_guest.loaders.target import Target
from vtlab.v1 import registers_pb2, vcpu_pb2

MAGIC = b"\x7fELF"
_CLASSES = {1: 32, 2: 64}
_MACHINES = ("EM_386", "EM_X86_64")
_MOST_SEGMENTS = 512


class ElfFacts(NamedTuple):
    """What a loaded ELF image leaves to its caller."""

    bits: int
    # Physical address of the first instruction.
    entry: int


class _Segment(NamedTuple):
    number: int
    offset: int
    virtual: int
    physical: int
    file_size: int
    memory_size: int


def load_elf(
    image: bytes, boot: vcpu_pb2.BootImage, _modules: Sequence[bytes], target: Target
) -> registers_pb2.ProcessorState:
    """Loads the image; starts 32-bit ones in protected mode and 64-bit ones in long mode unless boot says otherwise."""
    facts = load_segments(image, target)
    usual = states.protected_mode if facts.bits == 32 else states.long_mode
    return START_MODES.get(boot.start_mode, usual)(target, facts.entry)


def load_segments(image: bytes, target: Target) -> ElfFacts:
    """Loads every PT_LOAD segment at its physical address. Raises BadImage."""
    bits, structs = _identify(image, target)
    header = _parse(structs.Elf_Ehdr, image, 0, "ELF header", target)
    if header.e_type != "ET_EXEC":
        raise target.bad(f"e_type: {header.e_type}, only ET_EXEC can be booted")
    if header.e_machine not in _MACHINES:
        raise target.bad(f"e_machine: {header.e_machine}, expected one of {', '.join(_MACHINES)}")
    segments = _segments(image, structs, header, target)
    for segment in segments:
        data = image[segment.offset : segment.offset + segment.file_size]
        target.put(segment.physical, data, f"segment {segment.number}", segment.memory_size)
    return ElfFacts(bits, _physical_entry(header.e_entry, segments, target))


def _identify(image: bytes, target: Target) -> tuple[int, Any]:
    """(32 or 64, the layouts of that class)."""
    if image[:4] != MAGIC:
        raise target.bad("e_ident: is not an ELF file")
    bits = _CLASSES.get(image[4]) if len(image) > 6 else None
    if bits is None:
        raise target.bad("e_ident: neither a 32-bit nor a 64-bit ELF file")
    if image[5] != 1:
        raise target.bad("e_ident: is not little-endian")
    structs = ELFStructs(little_endian=True, elfclass=bits)
    structs.create_basic_structs()
    structs.create_advanced_structs()
    return bits, structs


def _parse(layout: Any, image: bytes, offset: int, field: str, target: Target) -> Any:
    try:
        return struct_parse(layout, BytesIO(image), offset)
    except (ELFError, OverflowError):  # an offset from 2**63 up is no position of a file at all
        raise target.bad(f"{field}: the file ends inside it") from None


def _segments(image: bytes, structs: Any, header: Any, target: Target) -> list[_Segment]:
    """The PT_LOAD segments with something to load, each checked against the file."""
    count, size = header.e_phnum, structs.Elf_Phdr.sizeof()
    if count > _MOST_SEGMENTS:
        raise target.bad(f"e_phnum: {count} segments, at most {_MOST_SEGMENTS} are loaded")
    if count and header.e_phentsize < size:
        raise target.bad(f"e_phentsize: {header.e_phentsize}, expected {size}")
    found = []
    for number in range(count):
        field = f"segment {number}"
        entry = _parse(structs.Elf_Phdr, image, header.e_phoff + number * header.e_phentsize, field, target)
        if entry.p_type != "PT_LOAD" or not entry.p_memsz:
            continue
        if entry.p_filesz > entry.p_memsz:
            raise target.bad(f"{field}: p_filesz {entry.p_filesz:#x} is larger than p_memsz {entry.p_memsz:#x}")
        end = entry.p_offset + entry.p_filesz
        if end > len(image):
            raise target.bad(f"{field}: ends at {end:#x}, the file at {len(image):#x}")
        found.append(_Segment(number, entry.p_offset, entry.p_vaddr, entry.p_paddr, entry.p_filesz, entry.p_memsz))
    if not found:
        raise target.bad("e_phnum: no segment to load")
    by_address = sorted(found, key=lambda segment: segment.physical)
    for lower, upper in pairwise(by_address):
        if lower.physical + lower.memory_size > upper.physical:
            raise target.bad(f"segment {upper.number}: overlaps segment {lower.number} in physical memory")
    return found


def _physical_entry(entry: int, segments: list[_Segment], target: Target) -> int:
    """An entry point that no segment holds by virtual address is taken as physical if one holds it so."""
    for segment in segments:
        if segment.virtual <= entry < segment.virtual + segment.memory_size:
            return entry - segment.virtual + segment.physical
    for segment in segments:
        if segment.physical <= entry < segment.physical + segment.memory_size:
            return entry
    raise target.bad(f"e_entry: {entry:#x} is in no segment")
