"""The registers of one processor, read and written where the engine keeps them.

Only while the engine is stopped. Writing control state goes through the setters, which keep the engine's hidden
flags (translation-time copies of CR0, CR4, EFER, CPL and segment sizes) and its address translations right.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from vtl0_guest.cpu import layout
from vtl0_guest.cpu.engine import Engine
from vtlab.x86.registers import Cr0, Cr4, Efer, Rflags

_SEGMENT = struct.Struct("<I4xQII")


class Seg(IntEnum):
    """Index of a segment or table register in the engine's structure."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5
    LDTR = 6
    TR = 7
    GDTR = 8
    IDTR = 9


class SegmentState(NamedTuple):
    """Attributes as in registers.proto, limit in bytes."""

    selector: int
    attributes: int
    limit: int
    base: int


def decode_segment(raw: bytes) -> SegmentState:
    """From the 24 bytes that a segment register is in the structure."""
    selector, base, limit, flags = _SEGMENT.unpack(raw)
    return SegmentState(selector, flags >> 8 & 0xF0FF, limit, base)


class Gpr(IntEnum):
    """Encoding of the general registers."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15


_U32 = struct.Struct("<I")
_RIP, _RFLAGS, _CR, _EFER = layout.RIP // 8, layout.RFLAGS // 8, layout.CR // 8, layout.EFER // 8

# Hidden flags (the engine's own; stable within the pinned version).
_INTERRUPT_SHADOW = 1 << 3
_CS32, _SS32, _ADD_SEGMENT, _PE = 1 << 4, 1 << 5, 1 << 6, 1 << 7
_LMA, _CS64, _OSFXSR, _SMAP = 1 << 14, 1 << 15, 1 << 22, 1 << 23
_SVME, _GUEST = 1 << 20, 1 << 21
_HIDDEN_FIRST, _HIDDEN_SECOND = layout.HIDDEN_FLAGS, layout.HIDDEN_FLAGS + 1
_CS64_BYTE = _CS64 >> 8  # in the second byte
_COMPUTED = 0x3 | _CS32 | _SS32 | _ADD_SEGMENT | _PE | 0xE00 | _LMA | _CS64 | _OSFXSR | _SMAP | _SVME

# Attribute bits (vtlab.x86.segments); plain integers for speed.
L, DB = 1 << 13, 1 << 14

_FLUSHING_CR0 = int(Cr0.PG | Cr0.WP | Cr0.PE)
_FLUSHING_CR4 = int(Cr4.PSE | Cr4.PAE | Cr4.PGE | Cr4.SMEP | Cr4.SMAP | Cr4.LA57 | Cr4.PCIDE | Cr4.PKE)
_SMAP_BIT, _OSFXSR_BIT = int(Cr4.SMAP), int(Cr4.OSFXSR)
_PE_BIT, _VM_BIT = int(Cr0.PE), int(Rflags.VM)
_LMA_BIT = int(Efer.LMA)
_RF = int(Rflags.RF)
_MASK_64 = (1 << 64) - 1
_RIP_MASKS = {16: 0xFFFF, 32: 0xFFFF_FFFF, 64: _MASK_64}


class Environment:
    """Typed access to one engine's processor state."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.state = self._state = engine.state
        self.words = engine.words

    # -------------------------------------------------------------------------------------------- plain registers

    def gpr(self, number: int) -> int:
        return self.words[number]

    def set_gpr(self, number: int, value: int) -> None:
        self.words[number] = value & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def rip(self) -> int:
        return self.words[_RIP]

    @rip.setter
    def rip(self, value: int) -> None:
        self.words[_RIP] = value & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def rflags(self) -> int:
        return self.words[_RFLAGS] | 2

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.words[_RFLAGS] = (value & 0x3F7FD5) | 2

    def advance(self, length: int) -> int:
        """RIP moves behind an instruction; RF and the interrupt shadow end. Returns RFLAGS as they were.

        All in one: every exit that ends an instruction comes through here.
        """
        words, state = self.words, self._state
        mask = _MASK_64 if state[_HIDDEN_SECOND] & _CS64_BYTE else _RIP_MASKS[self.bitness]
        words[_RIP] = words[_RIP] + length & mask
        flags = words[_RFLAGS]
        if flags & _RF:
            words[_RFLAGS] = flags & ~_RF
        if state[layout.HIDDEN_FLAGS] & _INTERRUPT_SHADOW:
            state[layout.HIDDEN_FLAGS] &= ~_INTERRUPT_SHADOW & 0xFF
        return flags

    def cr(self, number: int) -> int:
        return self.words[_CR + number]

    @property
    def efer(self) -> int:
        return self.words[_EFER]

    @property
    def cpl(self) -> int:
        return self._state[layout.HIDDEN_FLAGS] & 3

    @property
    def kernel(self) -> bool:
        """Protected mode at CPL0."""
        words = self.words
        return not (self._state[layout.HIDDEN_FLAGS] & 3 or words[_RFLAGS] & _VM_BIT) and words[_CR] & _PE_BIT != 0

    @property
    def interrupt_shadow(self) -> bool:
        return bool(self._state[layout.HIDDEN_FLAGS] & _INTERRUPT_SHADOW)

    def set_interrupt_shadow(self, on: bool) -> None:
        if on:
            self._state[layout.HIDDEN_FLAGS] |= _INTERRUPT_SHADOW
        else:
            self._state[layout.HIDDEN_FLAGS] &= ~_INTERRUPT_SHADOW & 0xFF

    @property
    def protected(self) -> bool:
        """CR0.PE and not virtual-8086 mode."""
        return bool(self.words[_CR] & _PE_BIT) and not self.words[_RFLAGS] & _VM_BIT

    @property
    def long_mode(self) -> bool:
        """EFER.LMA: 64-bit or compatibility mode."""
        return bool(self.words[_EFER] & _LMA_BIT)

    @property
    def bitness(self) -> int:
        """16, 32 or 64: size of the code segment."""
        state = self._state
        if state[_HIDDEN_SECOND] & _CS64_BYTE:
            return 64
        return 32 if state[_HIDDEN_FIRST] & _CS32 else 16

    # ------------------------------------------------------------------------------------------------ segments

    def segment(self, number: int) -> SegmentState:
        at = layout.SEGMENTS + number * layout.SEGMENT_SIZE
        selector, base, limit, flags = _SEGMENT.unpack_from(self._state, at)
        return SegmentState(selector, flags >> 8 & 0xF0FF, limit, base)

    def set_segment(self, number: int, segment: SegmentState) -> None:
        """Loads a segment register whole. CS and SS set sizes; `cpl` is set apart."""
        at = layout.SEGMENTS + number * layout.SEGMENT_SIZE
        flags = (segment.attributes & 0xF0FF) << 8
        _SEGMENT.pack_into(
            self._state, at, segment.selector & 0xFFFF, segment.base & (1 << 64) - 1, segment.limit & 0xFFFF_FFFF, flags
        )
        if number <= Seg.DS:
            self.refresh()
        elif number == Seg.TR:
            self._engine.arm_guards()

    def table(self, number: int) -> tuple[int, int]:
        """(base, limit) of GDTR or IDTR."""
        _, base, limit, _ = _SEGMENT.unpack_from(self._state, layout.SEGMENTS + number * layout.SEGMENT_SIZE)
        return base, limit

    def set_table(self, number: int, base: int, limit: int) -> None:
        _SEGMENT.pack_into(self._state, layout.SEGMENTS + number * layout.SEGMENT_SIZE, 0, base, limit & 0xFFFF, 0)

    def set_cpl(self, cpl: int) -> None:
        self._state[layout.HIDDEN_FLAGS] = self._state[layout.HIDDEN_FLAGS] & ~3 & 0xFF | cpl

    # ------------------------------------------------------------------------------------------------ control

    def set_cr0(self, value: int) -> None:
        """Writes CR0 as it is, with EFER.LMA as it is; flushes what depends on it."""
        changed = self.words[_CR] ^ value
        self.words[_CR] = value
        self.refresh()
        if changed & _FLUSHING_CR0:
            self._engine.flush_translations()

    def set_cr2(self, value: int) -> None:
        self.words[_CR + 2] = value & (1 << 64) - 1

    def set_cr3(self, value: int) -> None:
        self.words[_CR + 3] = value
        self._engine.arm_guards()
        self._engine.flush_translations()

    def set_cr4(self, value: int) -> None:
        changed = self.words[_CR + 4] ^ value
        self.words[_CR + 4] = value
        self.refresh()
        if changed & _FLUSHING_CR4:
            self._engine.flush_translations()

    def set_efer(self, value: int) -> None:
        """Writes EFER as it is, LMA included."""
        changed = self.words[_EFER] ^ value
        self.words[_EFER] = value
        self.refresh()
        if changed & (Efer.NXE | Efer.LMA):
            self._engine.flush_translations()

    def refresh(self) -> None:
        """Computes the hidden flags from CR0, CR4, EFER, the segments and RFLAGS.VM; CPL is kept."""
        words, state = self.words, self._state
        old = _U32.unpack_from(state, layout.HIDDEN_FLAGS)[0]
        cr0, cr4 = words[_CR], words[_CR + 4]
        cs, ss = self.segment(Seg.CS), self.segment(Seg.SS)
        flags = old & ~_COMPUTED | old & 3 | _GUEST
        if cr0 & _PE_BIT:
            flags |= _PE
        flags |= (cr0 & 0xE) << 8  # MP EM TS
        if cr4 & _OSFXSR_BIT:
            flags |= _OSFXSR
        if cr4 & _SMAP_BIT:
            flags |= _SMAP
        lma = words[_EFER] & _LMA_BIT
        if lma:
            flags |= _LMA
        if lma and cs.attributes & L:
            flags |= _CS32 | _SS32 | _CS64
        else:
            if cs.attributes & DB:
                flags |= _CS32
            if ss.attributes & DB:
                flags |= _SS32
            flat = cr0 & _PE_BIT and not words[_RFLAGS] & _VM_BIT and flags & _CS32
            if not flat or ss.base or self.segment(Seg.DS).base or self.segment(Seg.ES).base:
                flags |= _ADD_SEGMENT
        _U32.pack_into(state, layout.HIDDEN_FLAGS, flags)
        self._engine.watch_blocks(not lma)

    # ---------------------------------------------------------------------------------------------------- MSRs

    def has_msr(self, index: int) -> bool:
        return index in self._engine.layout.msrs

    def msr(self, index: int) -> int:
        return self.words[self._engine.layout.msrs[index] // 8]

    def set_msr(self, index: int, value: int) -> None:
        self.words[self._engine.layout.msrs[index] // 8] = value
