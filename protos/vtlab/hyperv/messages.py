"""Intercept messages that VTL1 finds in its SynIC message page, byte for byte (TLFS, "Secure Intercepts"). Pure.

Each begins with a header of 40 bytes: VP index u32@0, instruction length [3:0] and CR8 [7:4] u8@4, access type u8@5,
execution state u16@6, CS 16@8, RIP u64@24, RFLAGS u64@32.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from vtlab.hyperv.layouts import encode_segment, encode_table
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.vcpu_pb2 import Exit
from vtlab.x86.registers import Cr0, Efer, Rflags


class InterceptType(IntEnum):
    """HV_MESSAGE_TYPE of intercepts."""

    UNMAPPED_GPA = 0x8000_0000
    GPA_INTERCEPT = 0x8000_0001
    IO_PORT_INTERCEPT = 0x8001_0000
    MSR_INTERCEPT = 0x8001_0001
    REGISTER_INTERCEPT = 0x8001_0006


INTERCEPT_SINT: Final = 0
MEMORY_MESSAGE_SIZE: Final = 240
READ, WRITE, EXECUTE = 0, 1, 2
_ACCESS = {
    vcpu_pb2.ACCESS_KIND_READ: READ,
    vcpu_pb2.ACCESS_KIND_WRITE: WRITE,
    vcpu_pb2.ACCESS_KIND_EXECUTE: EXECUTE,
}
_HEADER = struct.Struct("<IBBH16sQQ")
_MEMORY = struct.Struct("<IBBBxQQ16s16s16s16Q")
_MSR = struct.Struct("<I4xQQ")
_REGISTER = struct.Struct("<B3xI16s")
_PORT = struct.Struct("<HBB4xQ16s16s16sQQQ")
_WRITEBACK = 6
_MAX_INSTRUCTION = 15
_LOW_MASK = 0xFFFF_FFFF


def execution_state(registers: registers_pb2.Registers) -> int:
    """cpl [1:0], CR0.PE 2, CR0.AM 3, EFER.LMA 4; VTL [10:7] is that of the intercepted level, 0; shadow 12."""
    return (
        registers.cpl & 3
        | bool(registers.cr0 & Cr0.PE) << 2
        | bool(registers.cr0 & Cr0.AM) << 3
        | bool(registers.efer & Efer.LMA) << 4
        | registers.interrupt_shadow << 12
    )


def header(exit_: Exit, access: int, length: int | None = None) -> bytes:
    """The common part. RFLAGS has RF set where an instruction was stopped by a fault and will be run again."""
    registers = exit_.registers
    if length is None:
        length = exit_.instruction_length
    return _HEADER.pack(
        exit_.vp_index,
        min(length, _MAX_INSTRUCTION) | (registers.cr8 & 0xF) << 4,
        access,
        execution_state(registers),
        encode_segment(registers.cs),
        registers.rip,
        registers.rflags | (Rflags.RF if exit_.HasField("memory_fault") else 0),
    )


def memory_message(exit_: Exit, size: int = MEMORY_MESSAGE_SIZE, branch_length: int = 0) -> bytes:
    """GPA intercept: the address is physical; the virtual one is not given. `size` is 240, or 80 without registers.

    Args:
        branch_length: for a fetch: length of the instruction that led there, where a profile wants it.
    """
    fault, registers = exit_.memory_fault, exit_.registers
    access = _ACCESS.get(fault.access, READ)
    code = b"" if access == EXECUTE else exit_.instruction[:16]
    body = _MEMORY.pack(
        _WRITEBACK,
        len(code),
        0,
        0,
        0,
        fault.gpa,
        code,
        encode_segment(registers.ds),
        encode_segment(registers.ss),
        *(getattr(registers, name) for name in _GENERAL),
    )
    length = branch_length if access == EXECUTE else None
    return (header(exit_, access, length) + body)[:size]


_GENERAL = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)


def msr_message(exit_: Exit) -> bytes:
    """MSR intercept: RDX and RAX hold the value of a write."""
    access, registers = exit_.msr, exit_.registers
    kind = WRITE if access.write else READ
    return header(exit_, kind) + _MSR.pack(access.index, registers.rdx, registers.rax)


def msr_write_message(exit_: Exit, index: int) -> bytes:
    """MSR intercept for a register that is written by WRMSR but has a name of its own (EFER)."""
    registers = exit_.registers
    return header(exit_, WRITE) + _MSR.pack(index, registers.rdx, registers.rax)


def register_message(exit_: Exit) -> bytes:
    """Register intercept: the value that the instruction would load; GDTR and IDTR as table registers."""
    write = exit_.register_write
    if write.name in (registers_pb2.REGISTER_NAME_GDTR, registers_pb2.REGISTER_NAME_IDTR):
        info = encode_table(write.new_table)
    else:
        info = write.new_value.to_bytes(16, "little")
    return header(exit_, WRITE) + _REGISTER.pack(0, write.name, info)


def port_message(exit_: Exit) -> bytes:
    """I/O port intercept: size in bits [2:0] of the info byte."""
    access, registers = exit_.port, exit_.registers
    code = exit_.instruction[:16]
    empty = bytes(16)
    return header(exit_, WRITE if access.write else READ) + _PORT.pack(
        access.port & 0xFFFF,
        access.size & 7,
        len(code),
        registers.rax,
        code,
        encode_segment(registers.ds),
        empty,
        registers.rcx,
        registers.rsi,
        registers.rdi,
    )
