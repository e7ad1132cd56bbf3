"""Names that a policy may use: register bits, MSRs. Numbers: vtlab.x86.registers; XCR0: SDM volume 1, section 13.3."""

from __future__ import annotations

from enum import IntFlag

from vtlab.v1 import registers_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr


class Xcr0(IntFlag):
    X87 = 1 << 0
    SSE = 1 << 1
    AVX = 1 << 2
    BNDREG = 1 << 3
    BNDCSR = 1 << 4
    OPMASK = 1 << 5
    ZMM_HI256 = 1 << 6
    HI16_ZMM = 1 << 7
    PKRU = 1 << 9


ALL_BITS = (1 << 64) - 1

# Bits that the guest changes in normal operation: a policy pins them only by naming them, never by `frozen: true`.
FREE_BITS: dict[type[IntFlag], int] = {
    Cr0: int(Cr0.TS | Cr0.PG),
    Cr4: int(Cr4.PGE | Cr4.PCIDE | Cr4.LA57),
    Efer: int(Efer.LMA),
}

# Keys of `registers` whose rule is about bits.
CONTROL_REGISTERS: dict[str, registers_pb2.RegisterName.ValueType] = {
    "cr0": registers_pb2.REGISTER_NAME_CR0,
    "cr4": registers_pb2.REGISTER_NAME_CR4,
    "efer": registers_pb2.REGISTER_NAME_EFER,
    "xcr0": registers_pb2.REGISTER_NAME_XFEM,
}
TABLE_REGISTERS: dict[str, registers_pb2.RegisterName.ValueType] = {
    "gdtr": registers_pb2.REGISTER_NAME_GDTR,
    "idtr": registers_pb2.REGISTER_NAME_IDTR,
    "ldtr": registers_pb2.REGISTER_NAME_LDTR,
    "tr": registers_pb2.REGISTER_NAME_TR,
}
BITS: dict[str, type[IntFlag]] = {"cr0": Cr0, "cr4": Cr4, "efer": Efer, "xcr0": Xcr0}


def bit_mask(value: object, register: type[IntFlag] | None) -> int:
    """Mask of one bit given by name or number (0 to 63). Raises ValueError with the names that exist."""
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < 64:
            return 1 << value
        raise ValueError(f"bit number {value} is not between 0 and 63")
    if not isinstance(value, str):
        raise ValueError("must be the name of a bit or its number")
    if register is None:
        raise ValueError(f"bit '{value}': bits of this register have no names, give the number")
    try:
        return int(register[value])
    except KeyError:
        names = ", ".join(str(member.name) for member in register)
        raise ValueError(f"{register.__name__.upper()} has no bit '{value}'; it has {names}") from None


def msr_index(key: str) -> int:
    """Index of an MSR given by name or number. Raises ValueError."""
    if key in Msr.__members__:
        index = int(Msr[key])
    else:
        try:
            index = int(key, 0)
        except ValueError:
            raise ValueError(f"no MSR '{key}'; known by name: {', '.join(Msr.__members__)}") from None
    if not 0 <= index < 1 << 32:
        raise ValueError(f"MSR index {key} does not fit 32 bits")
    if index == Msr.EFER:
        raise ValueError("EFER is pinned under 'registers', key 'efer'")
    return index
