"""Bad images: each is refused by name, and nothing but BadImage ever comes out."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.loaders.images import RAM_SIZE, Memory, Segment, elf_image, multiboot_header
from vtlab.errors import BadImage
from vtlab.v1 import vcpu_pb2

CODE = b"\xf4" * 16
ELF = vcpu_pb2.IMAGE_FORMAT_ELF
FLAT = vcpu_pb2.IMAGE_FORMAT_FLAT
REAL = vcpu_pb2.START_MODE_REAL


def simple(
    bits: int = 32,
    prefix: bytes = b"",
    physical: int = 0x100000,
    memory_size: int = 16,
    entry: int = 0x100000,
    kind: int = 2,
    machine: int | None = None,
) -> bytes:
    segment = Segment(0x100000, physical, CODE, memory_size)
    return elf_image([segment], entry, bits=bits, prefix=prefix, kind=kind, machine=machine)


def patched(image: bytes, offset: int, layout: str, value: int) -> bytes:
    changed = bytearray(image)
    struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("image", "field"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\n", "format"),
        (simple()[:5], "e_ident"),
        (simple()[:40], "ELF header"),
        (simple()[:60], "segment 0"),
        (simple()[:-1], "segment 0: ends at"),
        (patched(simple(), 4, "<B", 3), "e_ident"),
        (patched(simple(), 5, "<B", 2), "little-endian"),
        (simple(kind=3), "e_type: ET_DYN"),
        (simple(kind=0xABCD), "e_type"),
        (simple(machine=40), "e_machine: EM_ARM"),
        (simple(entry=0x200000), "e_entry: 0x200000"),
        (patched(simple(), 28, "<I", 0xFFFFFFF0), "segment 0"),
        (patched(simple(bits=64), 39, "<B", 0x80), "segment 0"),  # e_phoff from 2**63 up
        (patched(simple(), 42, "<H", 4), "e_phentsize"),
        (patched(simple(), 44, "<H", 0xFFFF), "e_phnum"),
        (patched(simple(), 44, "<H", 0), "e_phnum: no segment"),
        (simple(memory_size=8), "p_filesz"),
        (simple(physical=RAM_SIZE - 8), f"segment 0: needs {RAM_SIZE - 8:#x}-{RAM_SIZE + 8:#x}, RAM ends at"),
        (simple(memory_size=RAM_SIZE), "RAM ends at"),
        (simple(bits=64, memory_size=(1 << 64) - 1), "RAM ends at"),
        (simple(bits=64, physical=(1 << 64) - 8), "RAM ends at"),
        (elf_image([Segment(0, 0, CODE, 99), Segment(0, 98, CODE, 16)], 0), "segment 1: overlaps segment 0"),
        (simple(prefix=multiboot_header(0x8)), "flags 0x8"),
        (multiboot_header(0), "e_ident"),
        (multiboot_header(0x10000, (0x1000, 0x2000, 0, 0, 0x1000)), "load_addr 0x2000"),
        (multiboot_header(0x10000, (0x2000, 0x1000, 0, 0, 0x1000)), "load_addr 0x1000"),
        (multiboot_header(0x10000, (0x1000, 0x1000, 0x2000, 0, 0x1000)), "load_end_addr"),
        (multiboot_header(0x10000, (0x1000, 0x1000, 0x0800, 0, 0x1000)), "load_end_addr"),
        (multiboot_header(0x10000, (0x1000, 0x1000, 0, 0x1008, 0x1000)), "bss_end_addr"),
        (multiboot_header(0x10000, (0x1000, 0x1000, 0, 0xFFFFFFFF, 0x1000)), "RAM ends at"),
        (multiboot_header(0x10000, (0x1000, 0x1000, 0, 0, 0x1020)), "entry_addr"),
    ],
)
def test_each_fault_is_named(image: bytes, field: str) -> None:
    with pytest.raises(BadImage) as error:
        Memory().load(image)
    assert error.value.subject == "dir/kernel.elf"
    assert field in error.value.detail
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("boot", "field"),
    [
        ({"load_address": 0x1000, "entry": 0x1000}, "start_mode"),
        ({"load_address": 0x1000, "entry": 0x1010, "start_mode": REAL}, "entry"),
        ({"load_address": 0x1000, "entry": 0xFFF, "start_mode": REAL}, "entry"),
        ({"load_address": RAM_SIZE - 15, "entry": RAM_SIZE - 15, "start_mode": REAL}, "load_address"),
        ({"load_address": (1 << 64) - 1, "entry": 0, "start_mode": REAL}, "load_address"),
        ({"load_address": 0x100000, "entry": 0x100000, "start_mode": REAL}, "real mode"),
        ({"start_mode": REAL, "modules": [vcpu_pb2.BootModule(path="m")]}, "modules"),
    ],
)
def test_flat_faults_are_named(boot: dict[str, object], field: str) -> None:
    with pytest.raises(BadImage) as error:
        Memory().load(CODE, format=FLAT, **boot)
    assert field in error.value.detail


@pytest.mark.parametrize("image_format", [0, 99])
def test_unknown_format(image_format: int) -> None:
    with pytest.raises(BadImage, match="format"):
        Memory().load(CODE, format=image_format)


@pytest.mark.parametrize(
    ("data", "described", "subject", "field"),
    [
        ([b""], [vcpu_pb2.BootModule(path="initrd")], "initrd", "empty"),
        ([b"x"], [vcpu_pb2.BootModule(path="initrd", command_line="a\0b")], "initrd", "zero byte"),
        ([b"x" * RAM_SIZE], [vcpu_pb2.BootModule(path="initrd")], "dir/kernel.elf", "module initrd"),
        ([b"x"], [], "dir/kernel.elf", "modules"),
    ],
)
def test_module_faults_are_named(
    data: list[bytes], described: list[vcpu_pb2.BootModule], subject: str, field: str
) -> None:
    with pytest.raises(BadImage) as error:
        Memory().load(simple(prefix=multiboot_header()), data, modules=described)
    assert error.value.subject == subject
    assert field in error.value.detail


def test_too_little_ram_is_refused() -> None:
    for size in (0, 4096, 0x4000):
        with pytest.raises(BadImage):
            Memory(size).load(simple(prefix=multiboot_header()))


BASES = [
    simple(),
    simple(bits=64),
    simple(prefix=multiboot_header()),
    simple(bits=64, prefix=multiboot_header(7)),
    multiboot_header(0x10003, (0x1000, 0x1000, 0, 0x3000, 0x1000)) + CODE,
    elf_image([Segment(0x1000, 0x1000, CODE, 64), Segment(0x2000, 0x2000, CODE, 0x3000)], 0x1000),
]


def try_to_load(image: bytes, **boot: object) -> None:
    try:
        state = Memory(2 << 20).load(image, **boot)
    except BadImage as error:
        assert error.subject  # noqa: PT017
        assert error.detail  # noqa: PT017
    else:
        assert state.registers.rflags == 2


@settings(max_examples=300)
@given(
    st.sampled_from(BASES),
    st.lists(st.tuples(st.integers(0, 160), st.sampled_from("BHIQ"), st.integers(0, (1 << 64) - 1)), max_size=4),
    st.integers(0, 400),
)
def test_mutated_images(image: bytes, changes: list[tuple[int, str, int]], length: int) -> None:
    data = bytearray(image)
    for offset, layout, value in changes:
        size = struct.calcsize(layout)
        if offset + size <= len(data):
            struct.pack_into("<" + layout, data, offset, value & ((1 << 8 * size) - 1))
    try_to_load(bytes(data[: max(length, 1)]))
    try_to_load(bytes(data))


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x7fELF", b"\x7fELF\x01\x01", b"\x7fELF\x02\x01"]))
def test_random_files(tail: bytes, head: bytes) -> None:
    try_to_load(head + tail)
    try_to_load(head + tail, format=ELF)


@given(*[st.integers(0, 0xFFFFFFFF)] * 6, st.binary(max_size=64))
def test_random_multiboot_headers(a: int, b: int, c: int, d: int, e: int, flags: int, tail: bytes) -> None:
    try_to_load(multiboot_header(flags | 0x10000, (a, b, c, d, e)) + tail)
    try_to_load(multiboot_header(0x10000, (b, b, c, d, e)) + tail)
