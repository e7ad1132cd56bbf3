"""KVM's hypercall convention and leaves, as pure decoding (Linux Documentation/virt/kvm/x86/{hypercalls,cpuid}.rst).

RAX holds the number, RBX RCX RDX RSI the arguments; the result goes to RAX, a negative errno if the call fails. Outside
64-bit mode all are 32 bits wide.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from vmm.discovery import Leaf
from vtlab.v1.registers_pb2 import Registers
from vtlab.x86.registers import Efer

_LMA = Efer.LMA.value
_CS_L = 1 << 13  # of segment attributes
_LOW = 0xFFFF_FFFF
_ALL = (1 << 64) - 1
_SIGNATURE, _FEATURES = 0x4000_0000, 0x4000_0001
_KVMKVMKVM = (0x4B4D_564B, 0x564B_4D56, 0x4D)


class KvmErrno(IntEnum):
    """include/uapi/linux/kvm_para.h."""

    PERM = 1
    E2BIG = 7
    FAULT = 14
    INVAL = 22
    NOSYS = 1000


class KvmCall(NamedTuple):
    """A call as it stands in the registers."""

    number: int
    arguments: tuple[int, int, int, int]
    long_mode: bool
    cpl: int

    def result(self, value: int) -> int:
        """What RAX becomes; negative values are errors."""
        return value & (_ALL if self.long_mode else _LOW)


def decode(registers: Registers) -> KvmCall:
    long_mode = bool(registers.efer & _LMA and registers.cs.attributes & _CS_L)
    mask = _ALL if long_mode else _LOW
    a0, a1, a2, a3 = (value & mask for value in (registers.rbx, registers.rcx, registers.rdx, registers.rsi))
    return KvmCall(registers.rax & mask, (a0, a1, a2, a3), long_mode, registers.cpl)


def leaf(number: int) -> Leaf:
    """No feature is announced: Heki has no bit, a guest finds it by the call that asks for its version."""
    return (_FEATURES, *_KVMKVMKVM) if number == _SIGNATURE else (0, 0, 0, 0)
