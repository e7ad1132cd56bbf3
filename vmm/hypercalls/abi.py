"""The hypercall ABI: from registers to a bounded request, or to the status that it fails with (TLFS, "Hypercall
Interface"; facts about the order of the checks from openvmm's hv1_hypercall).

Everything here but read_input() is pure.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.memory import WRITE, Memory
from vtlab.errors import VtlabError
from vtlab.hyperv.hypercalls import InputValue, decode_input_value
from vtlab.hyperv.status import HvStatus
from vtlab.ram import PAGE_SIZE
from vtlab.v1.registers_pb2 import Registers
from vtlab.x86.registers import Cr0, Efer

_PE, _LMA = Cr0.PE.value, Efer.LMA.value
# Bit 13 of HV_X64_SEGMENT_REGISTER attributes.
_CS_L = 1 << 13
_LOW = 0xFFFF_FFFF
FAST_INPUT_SIZE = 16


class Shape(NamedTuple):
    """What a call takes and gives, in bytes.

    `element_in` and `element_out` are of a rep call, which has one; `fast` allows input in registers.
    """

    header: int
    output: int = 0
    element_in: int = 0
    element_out: int = 0
    fast: bool = True

    @property
    def rep(self) -> bool:
        return self.element_in > 0


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


def check_input_value(value: InputValue, shape: Shape, *, strict_reserved: bool = False) -> HvStatus:
    """The checks that need the input value alone. `strict_reserved`: reserved bits must be zero, as the TLFS says."""
    bad = HvStatus.INVALID_HYPERCALL_INPUT
    if strict_reserved and value.reserved:
        return bad
    if value.variable_header:
        return bad
    if shape.rep:
        if value.rep_start >= value.rep_count:
            return bad
    elif value.rep_count or value.rep_start:
        return bad
    fits = shape.fast and input_size(value, shape) <= FAST_INPUT_SIZE and not output_size(value, shape)
    if value.fast and not fits:
        return bad
    return HvStatus.SUCCESS


def input_size(value: InputValue, shape: Shape) -> int:
    """Bytes of header and all elements, those before the start index included."""
    return shape.header + value.rep_count * shape.element_in


def output_size(value: InputValue, shape: Shape) -> int:
    return shape.output + value.rep_count * shape.element_out


def check_buffer(gpa: int, size: int) -> HvStatus:
    """A buffer lies in one page and is 8-byte aligned."""
    if gpa % PAGE_SIZE + size > PAGE_SIZE:
        return HvStatus.INVALID_HYPERCALL_INPUT
    if gpa % 8:
        return HvStatus.INVALID_ALIGNMENT
    return HvStatus.SUCCESS


def read_input(memory: Memory, request: Request, value: InputValue, shape: Shape, vtl: int) -> bytes | HvStatus:
    """The input bytes, read once, after checking that the output can be written; both with the caller's rights."""
    out = output_size(value, shape)
    size = input_size(value, shape)
    if not value.fast:
        status = check_buffer(request.input, size)
        if status:
            return status
    if out:
        status = check_buffer(request.output, out)
        if status:
            return status
    try:
        if out:
            memory.check(request.output, out, WRITE, vtl)
        if value.fast:
            return (request.input | request.output << 64).to_bytes(FAST_INPUT_SIZE, "little")[:size]
        return memory.read(request.input, size, vtl)
    except VtlabError:
        return HvStatus.INVALID_HYPERCALL_INPUT


def decode(request: Request) -> InputValue:
    return decode_input_value(request.value)
