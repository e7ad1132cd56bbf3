"""Registers of the local APIC as tables: numbers, writable bits, and what x2APIC mode refuses.

Source: Intel SDM volume 3, tables "Local APIC register address map" and "Local APIC register address space supported
by x2APIC". A register's number is its MMIO offset divided by 16 and its x2APIC MSR index minus 0x800.
"""

from __future__ import annotations

from enum import IntEnum

from vtl0_guest.cpu.devices.bus import GeneralProtection

X2APIC_FIRST = 0x800
X2APIC_LAST = 0x8FF


class Register(IntEnum):
    """ISR, TMR and IRR are the first of eight."""

    ID = 0x02
    VERSION = 0x03
    TPR = 0x08
    APR = 0x09
    PPR = 0x0A
    EOI = 0x0B
    RRD = 0x0C
    LDR = 0x0D
    DFR = 0x0E
    SVR = 0x0F
    ISR = 0x10
    TMR = 0x18
    IRR = 0x20
    ESR = 0x28
    ICR_LOW = 0x30
    ICR_HIGH = 0x31
    LVT_TIMER = 0x32
    LVT_THERMAL = 0x33
    LVT_PERFORMANCE = 0x34
    LVT_LINT0 = 0x35
    LVT_LINT1 = 0x36
    LVT_ERROR = 0x37
    TIMER_INITIAL = 0x38
    TIMER_CURRENT = 0x39
    TIMER_DIVIDE = 0x3E
    SELF_IPI = 0x3F


class Delivery(IntEnum):
    """Delivery mode, bits 10:8 of ICR and of LVT entries."""

    FIXED = 0
    LOWEST = 1
    SMI = 2
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


LVT_MASKED = 1 << 16

# LVT entries: bits that can be written. Vector 7:0, delivery 10:8, polarity 13, trigger 15, mask 16, timer mode 18:17.
LVT_WRITABLE = {
    Register.LVT_TIMER: 0x0007_00FF,
    Register.LVT_THERMAL: 0x0001_07FF,
    Register.LVT_PERFORMANCE: 0x0001_07FF,
    Register.LVT_LINT0: 0x0001_A7FF,
    Register.LVT_LINT1: 0x0001_A7FF,
    Register.LVT_ERROR: 0x0001_00FF,
}

_WORD = 0xFFFF_FFFF

# x2APIC registers: (readable, bits that can be written; None if it cannot be written).
_X2APIC: dict[int, tuple[bool, int | None]] = {
    Register.ID: (True, None),
    Register.VERSION: (True, None),
    Register.TPR: (True, 0xFF),
    Register.PPR: (True, None),
    Register.EOI: (False, 0),
    Register.LDR: (True, None),
    Register.SVR: (True, 0x1FF),
    Register.ESR: (True, 0),
    Register.ICR_LOW: (True, _WORD << 32 | 0x000C_CFFF),
    Register.TIMER_INITIAL: (True, _WORD),
    Register.TIMER_CURRENT: (True, None),
    Register.TIMER_DIVIDE: (True, 0xB),
    Register.SELF_IPI: (False, 0xFF),
}
# Delivery status and remote IRR are read-only, not reserved: a write may have them set.
_READ_ONLY = 1 << 12 | 1 << 14
_X2APIC |= {register: (True, mask | _READ_ONLY) for register, mask in LVT_WRITABLE.items()}
_X2APIC |= {first + number: (True, None) for first in (Register.ISR, Register.TMR, Register.IRR) for number in range(8)}


def check_x2apic_access(register: int, written: int | None) -> None:
    """Raises GeneralProtection for an absent register, the wrong direction or a reserved bit. None is a read."""
    readable, writable = _X2APIC.get(register, (False, None))
    if written is None:
        if not readable:
            raise GeneralProtection(f"x2APIC register {register:#x} cannot be read")
    elif writable is None or written & ~writable:
        raise GeneralProtection(f"x2APIC register {register:#x} cannot take {written:#x}")


def lvt_delivery(value: int) -> int:
    """Delivery mode of an LVT entry."""
    return value >> 8 & 7
