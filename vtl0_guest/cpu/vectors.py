"""x87, MMX and SSE state of an engine as an FXSAVE image: what the levels of a vCPU share.

The registers lie in QEMU's CPUX86State; where, is found once per engine by magic values and checked. FCW and MXCSR go
through the engine's own setters, which also set its rounding modes. Layout of the image: Intel SDM volume 1, 10.5.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from unicorn.x86_const import UC_X86_REG_FP0, UC_X86_REG_FPCW, UC_X86_REG_MXCSR, UC_X86_REG_XMM0, UC_X86_REG_XMM1

from vtl0_guest.cpu.unicorn_library import EngineUnsupported

if TYPE_CHECKING:
    from unicorn import Uc

FXSAVE_SIZE = 512
VECTORS = 16
_VECTOR_SIZE = 16
_MXCSR_MASK = 0xFFFF
_MAGIC = (0x5A17_C0DE_0000_0001_5A17_C0DE_1000_0001, 0x5A17_C0DE_0000_0002_5A17_C0DE_1000_0002)
_MAGIC_MANTISSA = 0xDA17_C0DE_5A17_0087
_MAGIC_CONTROL = 0x0E7F
# CPUX86State: top u32, status u16, control u16, eight tags u8 (1: empty), padding, then eight registers of 16 bytes.
_X87 = struct.Struct("<IHH8s4x")
_TOP_SHIFT, _TOP = 11, 0x3800
_HEAD = struct.Struct("<HHBxHQQII")  # FCW FSW FTW FOP FIP FDP MXCSR MXCSR_MASK
_ST_OFFSET, _XMM_OFFSET = 32, 160


class Vectors:
    """The registers of one engine. Only while it is stopped."""

    def __init__(self, uc: Uc, state: memoryview) -> None:
        """Raises EngineUnsupported if the registers are not where they can be found."""
        self._uc = uc
        self._state = state
        numbers = (UC_X86_REG_XMM0, UC_X86_REG_XMM1)
        before = [uc.reg_read(number) for number in numbers]
        for number, magic in zip(numbers, _MAGIC, strict=True):
            uc.reg_write(number, magic)
        image = bytes(state)
        first, second = (image.find(magic.to_bytes(_VECTOR_SIZE, "little")) for magic in _MAGIC)
        for number, value in zip(numbers, before, strict=True):
            uc.reg_write(number, value)
        self._stride = second - first
        if first < 0 or self._stride not in (16, 32, 64) or first + VECTORS * self._stride > len(image):
            raise EngineUnsupported("Unicorn engine: XMM0 and XMM1 are not in the processor's structure")
        self._xmm = first
        st0 = uc.reg_read(UC_X86_REG_FP0)
        uc.reg_write(UC_X86_REG_FP0, (_MAGIC_MANTISSA, 0x4000))
        self._st = bytes(state).find(_MAGIC_MANTISSA.to_bytes(8, "little"))
        uc.reg_write(UC_X86_REG_FP0, st0)
        control = uc.reg_read(UC_X86_REG_FPCW)
        uc.reg_write(UC_X86_REG_FPCW, _MAGIC_CONTROL)
        found = self._st >= _X87.size and self._x87()[2] == _MAGIC_CONTROL
        uc.reg_write(UC_X86_REG_FPCW, control)
        if not found:
            raise EngineUnsupported("Unicorn engine: the x87 registers are not in the processor's structure")

    def _x87(self) -> tuple[int, int, int, bytes]:
        top, status, control, tags = _X87.unpack_from(self._state, self._st - _X87.size)
        return top, status, control, tags

    def vector(self, number: int) -> bytes:
        """The 16 bytes of an XMM register."""
        at = self._xmm + number * self._stride
        return bytes(self._state[at : at + _VECTOR_SIZE])

    def set_vector(self, number: int, value: bytes) -> None:
        at = self._xmm + number * self._stride
        self._state[at : at + _VECTOR_SIZE] = value

    def vectors(self, count: int) -> bytes:
        """XMM0 and following, 16 bytes each."""
        return b"".join(self.vector(number) for number in range(count))

    def save(self) -> bytes:
        """The FXSAVE image. Instruction and data pointers are zero, as this engine has none."""
        top, status, control, tags = self._x87()
        used = sum(1 << number for number, empty in enumerate(tags) if not empty)
        mxcsr = self._uc.reg_read(UC_X86_REG_MXCSR) & _MXCSR_MASK
        status = status & ~_TOP | (top & 7) << _TOP_SHIFT
        head = _HEAD.pack(control, status, used, 0, 0, 0, mxcsr, _MXCSR_MASK)
        registers = bytes(self._state[self._st : self._st + 128])
        ordered = b"".join(registers[(top + number & 7) * 16 :][:10] + bytes(6) for number in range(8))
        return (head + ordered + self.vectors(VECTORS)).ljust(FXSAVE_SIZE, b"\0")

    def load(self, image: bytes) -> None:
        """The inverse. Reserved bits are dropped, an image of another size is refused with ValueError."""
        if len(image) != FXSAVE_SIZE:
            raise ValueError(f"FXSAVE image of {len(image)} bytes, not {FXSAVE_SIZE}")
        control, status, used, _, _, _, mxcsr, _ = _HEAD.unpack_from(image)
        top = (status & _TOP) >> _TOP_SHIFT
        tags = bytes(0 if used >> number & 1 else 1 for number in range(8))
        _X87.pack_into(self._state, self._st - _X87.size, top, status & ~_TOP, control, tags)
        for number in range(8):
            at = self._st + (top + number & 7) * 16
            source = _ST_OFFSET + number * 16
            self._state[at : at + 10] = image[source : source + 10]
        for number in range(VECTORS):
            source = _XMM_OFFSET + number * _VECTOR_SIZE
            self.set_vector(number, image[source : source + _VECTOR_SIZE])
        self._uc.reg_write(UC_X86_REG_FPCW, control)
        self._uc.reg_write(UC_X86_REG_MXCSR, mxcsr & _MXCSR_MASK)
