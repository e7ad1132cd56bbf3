"""KVM_HC_LOCK_CR_UPDATE as its authors have it: argument checks and enforcement, as pure functions.

Source: Salaün, v3 of "Hypervisor-Enforced Kernel Integrity - CR pinning", 20240503131910.307630-{1..6}@digikod.net.
"""

from __future__ import annotations

from typing import NamedTuple

from vmm.designs.kvm_abi import KvmErrno
from vtlab.v1 import registers_pb2
from vtlab.v1.vcpu_pb2 import Exit
from vtlab.x86.registers import Cr0, Cr4

LOCK_CR_UPDATE = 13
VERSION_FLAG = 1  # KVM_LOCK_CR_UPDATE_VERSION
ABI_VERSION = 1
REASON_CR0, REASON_CR4 = 1, 2  # KVM_HEKI_EXIT_REASON_*
REASONS = REASON_CR0 | REASON_CR4

# The host's own registers, which the calls are checked against: a Linux on a processor without CET and FRED.
HOST_CR0 = int(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG)
_CET, _FRED = 1 << 23, 1 << 32
HOST_CR4 = int(Cr4.SMEP | Cr4.SMAP | Cr4.UMIP | Cr4.FSGSBASE)
CR4_PINNED_MASK = HOST_CR4 | _CET | _FRED  # of Linux 6.9's arch/x86/kernel/cpu/common.c
_U32_MAX = 0xFFFF_FFFF
_WP = int(Cr0.WP)
_MOV_TO_CR = b"\x0f\x22"

_NUMBERS = {registers_pb2.REGISTER_NAME_CR0: 0, registers_pb2.REGISTER_NAME_CR4: 4}


class Pins(NamedTuple):
    """Bits that have to stay set, of the whole VM."""

    cr0: int = 0
    cr4: int = 0

    def of(self, number: int) -> int:
        return self.cr0 if number == 0 else self.cr4


class Lock(NamedTuple):
    """What the call gives: RAX, and which bits of which register are pinned from now on (0: none)."""

    value: int
    number: int = 0
    pin: int = 0


_INVALID = Lock(-KvmErrno.INVAL)


def lock_cr(number: int, pin: int, flags: int) -> Lock:
    """The checks of the call, in their order."""
    if number > _U32_MAX:
        return _INVALID
    if flags:
        return Lock(ABI_VERSION) if (flags, number, pin) == (VERSION_FLAG, 0, 0) else _INVALID
    if not pin:
        return _INVALID
    if number == 0:
        return Lock(0, 0, pin) if pin & _WP and not pin & ~HOST_CR0 else _INVALID
    if number == 4:
        return _INVALID if pin & ~CR4_PINNED_MASK else Lock(0, 4, pin & HOST_CR4)
    return _INVALID


def reason_of(number: int) -> int:
    return REASON_CR0 if number == 0 else REASON_CR4


def denied(pins: Pins, exit_: Exit) -> tuple[int, int] | None:
    """Number and value of a MOV to CR that leaves a pinned bit clear; None if the write goes through.

    VMX exits for MOV to CR only if it changes a bit. CLTS and LMSW are other exits, which nobody checks; nor does
    anybody check what RSM, INIT and SIPI load.
    """
    write = exit_.register_write
    number = _NUMBERS.get(write.name)
    if number is None or write.old_value == write.new_value or _MOV_TO_CR not in exit_.instruction:
        return None
    return (number, write.new_value) if pins.of(number) & ~write.new_value else None
