"""How a hypercall stands in the registers (TLFS, "Hypercall Inputs and Outputs")."""

from __future__ import annotations

from typing import NamedTuple

from vtlab.v1.registers_pb2 import Registers
from vtlab.x86.registers import Cr0, Efer

_PE, _LMA = Cr0.PE.value, Efer.LMA.value
# Bit 13 of HV_X64_SEGMENT_REGISTER attributes.
_CS_L = 1 << 13
_LOW = 0xFFFF_FFFF


class Request(NamedTuple):
    """A call as it stands in the registers. `control` is what a VTL switch takes beside its bare code."""

    value: int
    input: int
    output: int
    control: int
    long_mode: bool


def decode_registers(registers: Registers) -> Request | None:
    """Reads the 64-bit or the 32-bit convention; None in real mode, where a hypercall is #UD."""
    if registers.efer & _LMA and registers.cs.attributes & _CS_L:
        return Request(registers.rcx, registers.rdx, registers.r8, registers.rax, True)
    if not registers.cr0 & _PE:
        return None
    return Request(
        (registers.rdx & _LOW) << 32 | registers.rax & _LOW,
        (registers.rbx & _LOW) << 32 | registers.rcx & _LOW,
        (registers.rdi & _LOW) << 32 | registers.rsi & _LOW,
        registers.rcx & _LOW,
        False,
    )
