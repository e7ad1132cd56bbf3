"""Good images: where they land, and the state that the vCPU starts in."""

from __future__ import annotations

import struct

import pytest

from tests.unit.loaders.images import Memory, Segment, elf_image, multiboot_header
from vtl0_guest.loaders.target import Target, memory_map
from vtlab.errors import BadImage
from vtlab.v1 import vcpu_pb2
from vtlab.x86 import paging
from vtlab.x86.registers import Cr0, Efer

CODE = b"\xf4" * 16


# ------------------------------------------------------------------------------------------------------------ flat


@pytest.mark.parametrize(("address", "cs", "base", "rip"), [(0x7C00, 0, 0, 0x7C00), (0x20008, 0x2000, 0x20000, 8)])
def test_flat_real_mode(address: int, cs: int, base: int, rip: int) -> None:
    memory = Memory()
    state = memory.load(
        CODE,
        format=vcpu_pb2.IMAGE_FORMAT_FLAT,
        load_address=address,
        entry=address,
        start_mode=vcpu_pb2.START_MODE_REAL,
    )
    assert memory.data[address : address + 16] == CODE
    registers = state.registers
    assert (registers.cs.selector, registers.cs.base, registers.rip) == (cs, base, rip)
    assert registers.cs.base + registers.rip == address
    assert registers.cr0 & Cr0.PE == 0
    assert registers.rflags == 2
    assert state.idtr.limit == 0x3FF


def test_flat_protected_mode() -> None:
    state = Memory().load(
        CODE,
        format=vcpu_pb2.IMAGE_FORMAT_FLAT,
        load_address=0x100000,
        entry=0x100004,
        start_mode=vcpu_pb2.START_MODE_PROTECTED,
    )
    registers = state.registers
    assert (registers.rip, registers.cr0 & (Cr0.PE | Cr0.PG)) == (0x100004, Cr0.PE)
    assert registers.cs.attributes & 0x4000, "32-bit"
    assert registers.cs.limit == registers.ss.limit == 0xFFFFFFFF


def test_flat_long_mode_maps_the_first_4_gib() -> None:
    memory = Memory()
    state = memory.load(
        CODE,
        format=vcpu_pb2.IMAGE_FORMAT_FLAT,
        load_address=0x100000,
        entry=0x100000,
        start_mode=vcpu_pb2.START_MODE_LONG,
    )
    registers = state.registers
    assert registers.efer & Efer.LMA
    assert registers.cs.attributes & 0x2000

    def read(gpa: int, size: int) -> int:
        return int.from_bytes(memory.data[gpa : gpa + size], "little")

    for gva in (0, 0x100123, 0xFEE00030, 0xFFFFFFFF):
        result = paging.walk(
            read, cr0=registers.cr0, cr3=registers.cr3, cr4=registers.cr4, efer=registers.efer, gva=gva,
            access=vcpu_pb2.ACCESS_KIND_WRITE,
        )  # fmt: skip
        assert isinstance(result, paging.Translation)
        assert (result.gpa, result.page_size, result.user) == (gva, 2 << 20, False)
    assert read(state.gdtr.base + registers.cs.selector, 8) == 0x00AF9B000000FFFF
    assert state.gdtr.limit == 23


# ------------------------------------------------------------------------------------------------------------- ELF


@pytest.mark.parametrize("bits", [32, 64])
def test_elf_goes_to_physical_addresses(bits: int) -> None:
    high = 0xC0000000 if bits == 32 else 0xFFFFFFFF80000000
    memory = Memory()
    image = elf_image(
        [
            Segment(high + 0x100000, 0x100000, CODE, 16),
            Segment(high + 0x101000, 0x101000, b"data", 0x2000),
        ],
        entry=high + 0x100008,
        bits=bits,
    )
    state = memory.load(image)
    assert memory.data[0x100000:0x100010] == CODE
    assert memory.data[0x101000:0x103000] == b"data".ljust(0x2000, b"\0"), "what the file lacks is zeroed"
    assert memory.data[0x103000] == 0xEE
    assert state.registers.rip == 0x100008
    assert bool(state.registers.efer & Efer.LMA) == (bits == 64)


def test_elf_entry_that_is_physical_already() -> None:
    image = elf_image([Segment(0xC0100000, 0x100000, CODE, 16)], entry=0x100002)
    assert Memory().load(image).registers.rip == 0x100002


def test_start_mode_can_be_chosen_for_elf() -> None:
    image = elf_image([Segment(0x8000, 0x8000, CODE, 16)], entry=0x8000)
    assert Memory().load(image, start_mode=vcpu_pb2.START_MODE_REAL).registers.cr0 & Cr0.PE == 0


# ------------------------------------------------------------------------------------------------------- multiboot


@pytest.mark.parametrize("bits", [32, 64])
def test_multiboot_elf(bits: int) -> None:
    memory = Memory()
    image = elf_image([Segment(0x100000, 0x100000, CODE, 16)], entry=0x100000, bits=bits, prefix=multiboot_header())
    state = memory.load(image, command_line="heki=1 debug")
    registers = state.registers
    assert (registers.rax, registers.rip) == (0x2BADB002, 0x100000)
    assert registers.cr0 & (Cr0.PE | Cr0.PG) == Cr0.PE
    assert registers.efer == 0
    info = registers.rbx
    assert info < 0x9FC00, "below the legacy hole, where boot loaders put it"
    flags, lower, upper = struct.unpack_from("<3I", memory.data, info)
    assert flags == 0x24D
    assert (lower, upper) == (639, 3 << 10)
    assert memory.text(memory.word(info + 16)) == b"kernel.elf heki=1 debug"
    assert memory.text(memory.word(info + 64)) == b"vtlab"
    assert memory.word(info + 20) == 0


def test_multiboot_memory_map_is_what_firmware_says() -> None:
    memory = Memory()
    state = memory.load(elf_image([Segment(0x100000, 0x100000, CODE, 16)], 0x100000, prefix=multiboot_header()))
    length, at = struct.unpack_from("<II", memory.data, state.registers.rbx + 44)
    entries = []
    while length > 0:
        size, first, count, kind = struct.unpack_from("<IQQI", memory.data, at)
        entries.append((first, count, kind))
        at, length = at + size + 4, length - size - 4
    assert length == 0
    assert entries == memory_map(len(memory.data))


def test_multiboot_modules_are_page_aligned_above_the_kernel() -> None:
    memory = Memory()
    state = memory.load(
        elf_image([Segment(0x100000, 0x100000, CODE, 0x1800)], 0x100000, prefix=multiboot_header()),
        [b"A" * 5000, b"B"],
        modules=[vcpu_pb2.BootModule(path="a", command_line="first"), vcpu_pb2.BootModule(path="b")],
    )
    info = state.registers.rbx
    assert memory.word(info + 20) == 2
    listed = struct.unpack_from("<8I", memory.data, memory.word(info + 24))
    assert listed[:2] == (0x102000, 0x102000 + 5000)
    assert listed[4:6] == (0x104000, 0x104001)
    assert memory.data[0x102000 : 0x102000 + 5000] == b"A" * 5000
    assert memory.data[0x104000] == ord("B")
    assert (memory.text(listed[2]), memory.text(listed[6])) == (b"first", b"")


def test_multiboot_by_header_addresses() -> None:
    """The header is 8 bytes into the load area, the file has 16 bytes before it that are not loaded."""
    memory = Memory()
    header = multiboot_header(0x10003, (0x200008, 0x200000, 0x200100, 0x201000, 0x200040))
    image = b"J" * 16 + b"L" * 8 + header + CODE.rjust(0xE8, b"C") + b"tail"
    state = memory.load(image)
    assert state.registers.rip == 0x200040
    assert memory.data[0x200000:0x200008] == b"L" * 8
    assert memory.data[0x200008:0x200014] == header[:12]
    assert memory.data[0x200100:0x201000] == bytes(0xF00)
    assert memory.data[0x201000] == 0xEE


def test_multiboot_zero_end_loads_the_rest_of_the_file() -> None:
    memory = Memory()
    header = multiboot_header(0x10000, (0x200000, 0x200000, 0, 0, 0x200020))
    memory.load(header + b"rest of it")
    assert memory.data[0x200020:0x20002A] == b"rest of it"
    assert memory.data[0x20002A] == 0xEE


def test_kernel_in_low_memory_keeps_its_place() -> None:
    memory = Memory()
    state = memory.load(elf_image([Segment(0x4000, 0x4000, CODE, 0x90000)], 0x4000, prefix=multiboot_header()))
    assert state.registers.rbx >= 0x100000


def test_header_is_found_only_when_valid_and_aligned() -> None:
    with pytest.raises(BadImage, match="format"):
        Memory().load(b"\0" + multiboot_header())
    with pytest.raises(BadImage, match="format"):
        Memory().load(bytes(8192 - 8) + multiboot_header())
    with pytest.raises(BadImage, match="format"):
        Memory().load(multiboot_header()[:8] + bytes(4))
    header = multiboot_header(0x10000, (0x200000 + 8192 - 32, 0x200000, 0, 0, 0x200000))
    assert Memory().load(bytes(8192 - 32) + header).registers.rip == 0x200000


# -------------------------------------------------------------------------------------------------------- the rest


def test_memory_map_has_no_ram_in_the_holes() -> None:
    for size in (64 << 10, 640 << 10, 1 << 20, 64 << 20, 4 << 30, 6 << 30):
        ram = [(first, first + count) for first, count, kind in memory_map(size) if kind == 1]
        assert all(end <= size for _, end in ram)
        for hole in ((0xA0000, 0x100000), (0xFEC00000, 1 << 32)):
            assert all(end <= hole[0] or first >= hole[1] for first, end in ram)


def test_finding_room() -> None:
    target = Target("x", 1 << 20, lambda _gpa, _data: None)
    target.put(0x8000, b"x" * 0x1000, "a")
    target.put(0xF000, b"x" * 0x800, "b")
    assert target.find_below(0x10000, 0x1000, "c") == 0xE000
    assert target.find_below(0xF000, 0x7000, "c") == 0x1000
    assert target.find_above(0x7800, 0x1000, "c") == 0x9000
    with pytest.raises(BadImage, match="c: no room"):
        target.find_below(0x8000, 0x8001, "c")
    with pytest.raises(BadImage, match="c: no room"):
        target.find_above(0x8000, 0x100000, "c")
