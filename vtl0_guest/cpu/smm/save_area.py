"""The state-save area of SMM, as bytes. Pure.

Layout: AMD APM volume 2, 10.2.3 ("SMRAM state-save area", AMD64), which KVM uses for every processor with long mode;
offsets from the area's start at SMBASE + 0xFE00. A segment is selector u16, attributes u16 (as in registers.proto,
without the gap), limit u32, base u64.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vtlab.v1 import registers_pb2

OFFSET, SIZE = 0xFE00, 0x200
REVISION = 0x0002_0064  # AMD64, SMBASE can be relocated

_SEGMENT = struct.Struct("<HHIQ")
# Names as in registers.proto; ProcessorState unless among the Registers.
_SEGMENTS = {"es": 0x00, "cs": 0x10, "ss": 0x20, "ds": 0x30, "fs": 0x40, "gs": 0x50, "ldtr": 0x70, "tr": 0x90}
_TABLES = {"gdtr": 0x60, "idtr": 0x80}
_IN_REGISTERS = frozenset({"cs", "ss", "ds"})
_WORDS = {"efer": 0xD0, "cr4": 0x148, "cr3": 0x150, "cr0": 0x158, "rflags": 0x170, "rip": 0x178}
_AUTO_HALT, _NMI_MASK, _SHADOW = 0xC9, 0xCA, 0xCB
_REVISION, _SMBASE = 0xFC, 0x100
_DR7, _DR6 = 0x160, 0x168
_GENERAL = (
    *("r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8"),
    *("rdi", "rsi", "rbp", "rsp", "rbx", "rdx", "rcx", "rax"),
)
_FIRST_GENERAL = 0x180
_Q, _I = struct.Struct("<Q"), struct.Struct("<I")


class Saved(NamedTuple):
    """What an area holds. `state` has no MSRs; `halted`: RSM goes back into HLT."""

    state: registers_pb2.ProcessorState
    smbase: int
    halted: bool
    nmi_blocked: bool


def _message(state: registers_pb2.ProcessorState, name: str) -> registers_pb2.Segment:
    segment: registers_pb2.Segment = getattr(state.registers if name in _IN_REGISTERS else state, name)
    return segment


def _packed(attributes: int) -> int:
    """Attributes without the gap between P and AVL."""
    return attributes & 0xFF | attributes >> 4 & 0xF00


def _unpacked(attributes: int) -> int:
    return attributes & 0xFF | attributes << 4 & 0xF000


def pack(saved: Saved) -> bytes:
    """The area that an SMI writes."""
    area = bytearray(SIZE)
    state = saved.state
    for name, at in _SEGMENTS.items():
        segment = _message(state, name)
        _SEGMENT.pack_into(area, at, segment.selector, _packed(segment.attributes), segment.limit, segment.base)
    for name, at in _TABLES.items():
        table = getattr(state, name)
        _SEGMENT.pack_into(area, at, 0, 0, table.limit, table.base)
    for name, at in _WORDS.items():
        _Q.pack_into(area, at, getattr(state.registers, name))
    for number, name in enumerate(_GENERAL):
        _Q.pack_into(area, _FIRST_GENERAL + 8 * number, getattr(state.registers, name))
    area[_AUTO_HALT], area[_NMI_MASK], area[_SHADOW] = saved.halted, saved.nmi_blocked, state.registers.interrupt_shadow
    _I.pack_into(area, _REVISION, REVISION)
    _I.pack_into(area, _SMBASE, saved.smbase)
    _Q.pack_into(area, _DR6, state.debug[4])
    _Q.pack_into(area, _DR7, state.debug[5])
    return bytes(area)


def unpack(area: bytes, present: registers_pb2.ProcessorState) -> Saved:
    """What RSM finds; `present` gives what is not saved there: CR2, CR8, XCR0, DR0-DR3."""
    state = registers_pb2.ProcessorState(xcr0=present.xcr0)
    registers = state.registers
    registers.cr2, registers.cr8 = present.registers.cr2, present.registers.cr8
    for name, at in _SEGMENTS.items():
        segment = _message(state, name)
        selector, attributes, segment.limit, segment.base = _SEGMENT.unpack_from(area, at)
        segment.selector, segment.attributes = selector, _unpacked(attributes)
    for name, at in _TABLES.items():
        table = getattr(state, name)
        _, _, limit, table.base = _SEGMENT.unpack_from(area, at)
        table.limit = limit & 0xFFFF
    for name, at in _WORDS.items():
        setattr(registers, name, _Q.unpack_from(area, at)[0])
    for number, name in enumerate(_GENERAL):
        setattr(registers, name, _Q.unpack_from(area, _FIRST_GENERAL + 8 * number)[0])
    registers.interrupt_shadow = bool(area[_SHADOW] & 1)
    state.debug.extend([*present.debug[:4], _Q.unpack_from(area, _DR6)[0], _Q.unpack_from(area, _DR7)[0]])
    return Saved(state, _I.unpack_from(area, _SMBASE)[0], bool(area[_AUTO_HALT] & 1), bool(area[_NMI_MASK] & 1))
