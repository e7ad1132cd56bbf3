"""Linux kernels: where the parts land, what the kernel is told, and bad files."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.loaders.images import Memory
from vtl0_guest.loaders.target import memory_map
from vtlab.errors import BadImage
from vtlab.v1 import vcpu_pb2
from vtlab.x86.registers import Efer

RAM = 16 << 20
CODE = b"\xf4" * 0x1000
PREFERRED = 4 << 20
INITRD = [vcpu_pb2.BootModule(path="initrd")]


def kernel(**changes: tuple[str, int, int]) -> bytes:
    """A kernel of 0x1000 bytes behind four sectors of setup; changes are (layout, offset, value)."""
    image = bytearray(5 * 512 + len(CODE))
    image[5 * 512 :] = CODE
    fields = {
        "setup_sects": ("B", 0x1F1, 4),
        "syssize": ("I", 0x1F4, len(CODE) // 16),
        "boot_flag": ("H", 0x1FE, 0xAA55),
        "jump": ("H", 0x200, 0x66EB),
        "magic": ("I", 0x202, 0x53726448),
        "version": ("H", 0x206, 0x20F),
        "loadflags": ("B", 0x211, 1),
        "initrd_addr_max": ("I", 0x22C, 0x7FFFFFFF),
        "kernel_alignment": ("I", 0x230, 2 << 20),
        "relocatable_kernel": ("B", 0x234, 1),
        "xloadflags": ("H", 0x236, 1),
        "cmdline_size": ("I", 0x238, 2047),
        "pref_address": ("Q", 0x258, PREFERRED),
        "init_size": ("I", 0x260, 1 << 20),
    } | changes
    for layout, offset, value in fields.values():
        struct.pack_into("<" + layout, image, offset, value)
    return bytes(image)


def test_the_kernel_and_all_that_it_is_told() -> None:
    memory = Memory(RAM)
    state = memory.load(kernel(), [b"ramdisk"], command_line="console=ttyS0 quiet", modules=INITRD)
    registers = state.registers
    assert registers.rip == PREFERRED + 0x200
    assert memory.data[PREFERRED : PREFERRED + len(CODE)] == CODE
    assert registers.efer & Efer.LMA
    assert (registers.cs.selector, registers.ds.selector, registers.ss.selector) == (0x10, 0x18, 0x18)
    descriptors = struct.unpack_from("<4Q", memory.data, state.gdtr.base)
    assert descriptors[2:] == (0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
    assert not registers.rflags & 0x200

    zero_page = registers.rsi
    assert zero_page < 0x9FC00
    assert memory.data[zero_page + 0x202 : zero_page + 0x206] == b"HdrS"
    assert memory.data[zero_page + 0x210] == 0xFF
    assert memory.text(memory.word(zero_page + 0x228)) == b"console=ttyS0 quiet"
    address, size = memory.word(zero_page + 0x218), memory.word(zero_page + 0x21C)
    assert bytes(memory.data[address : address + size]) == b"ramdisk"
    assert address % 4096 == 0
    assert address >= PREFERRED + (1 << 20), "not where the kernel unpacks itself"
    count = memory.data[zero_page + 0x1E8]
    table = [struct.unpack_from("<QQI", memory.data, zero_page + 0x2D0 + 20 * number) for number in range(count)]
    assert table == memory_map(RAM)
    assert memory.data[memory.word(zero_page + 0x70) :][:8] == b"RSD PTR "


def test_without_a_ramdisk_its_place_is_zero() -> None:
    memory = Memory(RAM)
    zero_page = memory.load(kernel()).registers.rsi
    assert (memory.word(zero_page + 0x218), memory.word(zero_page + 0x21C)) == (0, 0)


def test_a_kernel_that_does_not_fit_where_it_prefers_is_moved() -> None:
    preferred = ("Q", 0x258, RAM)
    assert Memory(RAM).load(kernel(pref_address=preferred)).registers.rip == (2 << 20) + 0x200
    with pytest.raises(BadImage, match="pref_address"):
        Memory(RAM).load(kernel(pref_address=preferred, relocatable_kernel=("B", 0x234, 0)))


def test_the_ramdisk_stays_below_the_kernels_limit() -> None:
    memory = Memory(RAM)
    state = memory.load(kernel(initrd_addr_max=("I", 0x22C, 0x7FFFFF)), [bytes(5000)], modules=INITRD)
    assert memory.word(state.registers.rsi + 0x218) + 5000 <= 0x800000


@pytest.mark.parametrize(
    ("image", "field"),
    [
        (kernel()[:0x240], "setup header: the file ends"),
        (kernel(version=("H", 0x206, 0x20B)), "version: 2.11"),
        (kernel(loadflags=("B", 0x211, 0)), "loadflags"),
        (kernel(xloadflags=("H", 0x236, 0)), "xloadflags"),
        (kernel(kernel_alignment=("I", 0x230, 0)), "kernel_alignment"),
        (kernel(kernel_alignment=("I", 0x230, 3 << 20)), "kernel_alignment"),
        (kernel(setup_sects=("B", 0x1F1, 64)), "setup_sects"),
        (kernel(syssize=("I", 0x1F4, 0xFFFFFFFF)), "syssize"),
        (kernel(init_size=("I", 0x260, 16)), "init_size"),
        (kernel(init_size=("I", 0x260, 0xFFFFFFFF)), "init_size"),
        (kernel(cmdline_size=("I", 0x238, 3)), "cmdline_size"),
    ],
)
def test_each_fault_is_named(image: bytes, field: str) -> None:
    with pytest.raises(BadImage) as error:
        Memory(RAM).load(image, command_line="quiet")
    assert error.value.subject == "dir/kernel.elf"
    assert field in error.value.detail


@pytest.mark.parametrize(
    ("data", "modules", "text", "match"),
    [
        ([b"a", b"b"], INITRD * 2, "", "one at most"),
        ([b""], INITRD, "", "initrd: is empty"),
        ([bytes(RAM)], INITRD, "", "initrd"),
        ([], [], "a\0b", "zero byte"),
    ],
)
def test_what_goes_with_it(data: list[bytes], modules: list[vcpu_pb2.BootModule], text: str, match: str) -> None:
    with pytest.raises(BadImage, match=match):
        Memory(RAM).load(kernel(), data, command_line=text, modules=modules)


@pytest.mark.parametrize("size", [0, 4096, 1 << 20, 2 << 20])
def test_too_little_ram_is_refused(size: int) -> None:
    with pytest.raises(BadImage):
        Memory(size).load(kernel())


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0x1F1, 0x268), st.sampled_from("BHIQ"), st.integers(0, (1 << 64) - 1)), max_size=5),
    st.integers(1, 0x1C00),
    st.binary(max_size=64),
)
def test_mutated_kernels(changes: list[tuple[int, str, int]], length: int, ramdisk: bytes) -> None:
    data = bytearray(kernel())
    for offset, layout, value in changes:
        struct.pack_into("<" + layout, data, offset, value & ((1 << 8 * struct.calcsize(layout)) - 1))
    for image in (bytes(data), bytes(data[:length])):
        for image_format in (vcpu_pb2.IMAGE_FORMAT_DETECT, vcpu_pb2.IMAGE_FORMAT_BZIMAGE):
            try:
                state = Memory(8 << 20).load(image, [ramdisk], format=image_format, modules=INITRD)
            except BadImage as error:
                assert error.subject  # noqa: PT017
                assert error.detail  # noqa: PT017
            else:
                assert state.registers.rflags == 2
