"""Hypercall numbers and the two 64-bit words that carry a hypercall in and out (TLFS, "Hypercall Interface")."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

PARTITION_SELF = 0xFFFF_FFFF_FFFF_FFFF
VP_SELF = 0xFFFF_FFFE
ANY_VP = 0xFFFF_FFFF


class HypercallCode(IntEnum):
    """Bits [15:0] of the input value."""

    FLUSH_VIRTUAL_ADDRESS_SPACE = 0x02
    FLUSH_VIRTUAL_ADDRESS_LIST = 0x03
    SEND_SYNTHETIC_CLUSTER_IPI = 0x0B
    MODIFY_VTL_PROTECTION_MASK = 0x0C
    ENABLE_PARTITION_VTL = 0x0D
    ENABLE_VP_VTL = 0x0F
    VTL_CALL = 0x11
    VTL_RETURN = 0x12
    FLUSH_VIRTUAL_ADDRESS_SPACE_EX = 0x13
    FLUSH_VIRTUAL_ADDRESS_LIST_EX = 0x14
    SEND_SYNTHETIC_CLUSTER_IPI_EX = 0x15
    INSTALL_INTERCEPT = 0x4D
    GET_VP_REGISTERS = 0x50
    SET_VP_REGISTERS = 0x51
    TRANSLATE_VIRTUAL_ADDRESS = 0x52
    POST_MESSAGE = 0x5C
    SIGNAL_EVENT = 0x5D
    START_VIRTUAL_PROCESSOR = 0x99
    GET_VP_INDEX_FROM_APIC_ID = 0x9A
    TRANSLATE_VIRTUAL_ADDRESS_EX = 0xAC


class InputValue(NamedTuple):
    """The hypercall input value.

    code [15:0], fast [16], variable header size in 8-byte units [26:17], nested [31], rep count [43:32], rep start
    index [59:48]; `reserved` holds the other bits in their places ([30:27], [47:44], [63:60]) and must be zero.
    """

    code: int
    fast: bool
    variable_header: int
    nested: bool
    rep_count: int
    rep_start: int
    reserved: int


RESERVED_INPUT_BITS = 0xF << 27 | 0xF << 44 | 0xF << 60


def decode_input_value(value: int) -> InputValue:
    """Splits a 64-bit input value; never fails."""
    return InputValue(
        value & 0xFFFF,
        bool(value >> 16 & 1),
        value >> 17 & 0x3FF,
        bool(value >> 31 & 1),
        value >> 32 & 0xFFF,
        value >> 48 & 0xFFF,
        value & RESERVED_INPUT_BITS,
    )


def encode_input_value(
    code: int, *, fast: bool = False, variable_header: int = 0, rep_count: int = 0, rep_start: int = 0
) -> int:
    """The input value of a call, as the guest passes it in RCX."""
    return code | fast << 16 | variable_header << 17 | rep_count << 32 | rep_start << 48


def encode_result(status: int, reps_completed: int = 0) -> int:
    """The result value: status [15:0], reps completed [43:32], counted from element 0."""
    return status | reps_completed << 32


class InputVtl(NamedTuple):
    """HV_INPUT_VTL: vtl [3:0], use_target_vtl [4], reserved [7:5] (as a value of 0 to 7, must be zero)."""

    vtl: int
    explicit: bool
    reserved: int


def decode_input_vtl(value: int) -> InputVtl:
    return InputVtl(value & 0xF, bool(value >> 4 & 1), value >> 5 & 7)
