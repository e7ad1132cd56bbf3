"""States that a vCPU starts in, whoever loads it.

Sources: Intel SDM volume 3, table 10-1 (state after RESET); Multiboot Specification 0.6.96, section 3.2.
"""

from __future__ import annotations

from vtlab.v1 import registers_pb2
from vtlab.x86 import segments
from vtlab.x86.registers import Cr0, Rflags

CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10
CODE_32, CODE_64, DATA = 0xC09B, 0xA09B, 0xC093
"""Attributes of segments, as of vtlab.v1.Segment."""
_LDT, _TSS = 0x82, 0x8B


def state(code: registers_pb2.Segment, data: registers_pb2.Segment, cr0: int) -> registers_pb2.ProcessorState:
    """What all of them share: other segments, task state, debug registers; general registers are zero."""
    result = registers_pb2.ProcessorState(
        es=data,
        fs=data,
        gs=data,
        ldtr=registers_pb2.Segment(attributes=_LDT, limit=0xFFFF),
        tr=registers_pb2.Segment(attributes=_TSS, limit=0xFFFF),
        idtr=registers_pb2.TableRegister(limit=0x3FF),
        xcr0=1,
        debug=[0, 0, 0, 0, 0xFFFF0FF0, 0x400],
    )
    registers = result.registers
    registers.rflags = Rflags.FIXED.value
    registers.cr0 = cr0
    registers.cs.CopyFrom(code)
    registers.ss.CopyFrom(data)
    registers.ds.CopyFrom(data)
    return result


def protected_mode(entry: int) -> registers_pb2.ProcessorState:
    """32-bit code and flat segments without paging; there is no GDT, so the guest must bring one."""
    code, data = segments.flat(CODE_SELECTOR, CODE_32), segments.flat(DATA_SELECTOR, DATA)
    result = state(code, data, Cr0.PE.value | Cr0.ET.value)
    result.registers.rip = entry
    return result
