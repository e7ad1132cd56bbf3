"""How an exception or interrupt enters its handler: interrupt vector table, 16- and 32-bit gates, 64-bit gates.

The engine has no delivery of its own. Each function does everything that can fault before it changes a register, so
a fault leaves the interrupted state whole. Source: Intel SDM volume 3, chapter 6 (6.12, 6.14), volume 1, 20.1.4.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vtl0_guest.cpu import descriptors
from vtl0_guest.cpu.environment import DB, Environment, Gpr, L, Seg, SegmentState
from vtl0_guest.cpu.faults import GuestFault, general_protection
from vtl0_guest.cpu.guest_memory import GuestMemory
from vtlab.x86.paging import is_canonical
from vtlab.x86.registers import Rflags, Vector

_CLEARED = int(Rflags.TF | Rflags.NT | Rflags.RF | Rflags.VM)
_IF, _VM, _AC, _TF = int(Rflags.IF), int(Rflags.VM), int(Rflags.AC), int(Rflags.TF)
_CODE64 = 0xFFFF_FFFF


class Event(NamedTuple):
    """What is to be delivered.

    `software` marks INTn, INT3 and INTO, which check the gate's DPL; `external` an interrupt or NMI (the EXT bit of
    selector error codes). `rip` is the address that goes on the stack.
    """

    vector: int
    error_code: int | None
    rip: int
    software: bool = False
    external: bool = False
    address: int | None = None


class _Target(NamedTuple):
    cs: SegmentState
    rip: int
    interrupt_gate: bool


def real_mode(environment: Environment, memory: GuestMemory, event: Event) -> None:
    """Through the interrupt vector table: FLAGS, CS and IP as 16-bit words. Error codes are not pushed."""
    base, limit = environment.table(Seg.IDTR)
    if event.vector * 4 + 3 > limit:
        raise general_protection(event.vector * 8 + 2)
    offset, selector = struct.unpack("<HH", memory.read(base + event.vector * 4, 4, implicit=True))
    ss, cs = environment.segment(Seg.SS), environment.segment(Seg.CS)
    flags = environment.rflags
    sp = environment.gpr(Gpr.RSP) & 0xFFFF
    for value in (flags, cs.selector, event.rip):  # pushed one by one: SP wraps at 64 KiB
        sp = sp - 2 & 0xFFFF
        memory.write(ss.base + sp & 0xFFFF_FFFF, struct.pack("<H", value & 0xFFFF))
    environment.set_gpr(Gpr.RSP, environment.gpr(Gpr.RSP) & ~0xFFFF | sp)
    environment.rflags = flags & ~(_IF | _TF | _AC | int(Rflags.RF))
    environment.set_segment(Seg.CS, cs._replace(selector=selector, base=selector << 4))
    environment.rip = offset


def protected_mode(environment: Environment, memory: GuestMemory, event: Event) -> None:
    """Through a 16- or 32-bit interrupt or trap gate, also out of virtual-8086 mode. Task gates are refused."""
    selector_error = event.vector * 8 + 2 + event.external
    base, limit = environment.table(Seg.IDTR)
    if event.vector * 8 + 7 > limit:
        raise general_protection(selector_error)
    gate = memory.read_int(base + event.vector * 8, 8, implicit=True)
    kind = gate >> 40 & 0x1F
    if kind not in (0x6, 0x7, 0xE, 0xF):
        raise general_protection(selector_error)
    _check_gate(environment, gate, event, selector_error)
    offset = gate & 0xFFFF | (gate >> 32 & 0xFFFF0000 if kind & 8 else 0)
    target = _code_target(environment, memory, gate >> 16 & 0xFFFF, offset, event, kind & 1 == 0)
    wide = bool(kind & 8)
    ss, flags = environment.segment(Seg.SS), environment.rflags
    new_cpl = environment.cpl if descriptors.is_conforming(target.cs) else descriptors.dpl(target.cs)
    if flags & _VM and new_cpl:
        raise general_protection(target.cs.selector & 0xFFFC | event.external)
    frame = [event.rip, environment.segment(Seg.CS).selector, flags]
    if event.error_code is not None:
        frame.insert(0, event.error_code)
    new_ss, sp = ss, environment.gpr(Gpr.RSP)
    if new_cpl < environment.cpl or flags & _VM:
        new_ss, sp = _inner_stack(environment, memory, new_cpl, event)
        frame += [environment.gpr(Gpr.RSP), ss.selector]
        if flags & _VM:
            frame += [environment.segment(segment).selector for segment in (Seg.ES, Seg.DS, Seg.FS, Seg.GS)]
    size = 4 if wide else 2
    mask = 0xFFFF_FFFF if new_ss.attributes & DB else 0xFFFF
    top = sp - size * len(frame)
    data = b"".join((value & (1 << 8 * size) - 1).to_bytes(size, "little") for value in frame)
    _push(memory, new_ss, top & mask, data, mask, new_cpl)
    if target.rip > target.cs.limit:
        raise general_protection(event.external)
    cs = descriptors.mark_accessed(environment, memory, target.cs)
    environment.rflags = flags & ~(_CLEARED | (_IF if target.interrupt_gate else 0))
    environment.set_cpl(new_cpl)
    if flags & _VM:
        for segment in (Seg.DS, Seg.ES, Seg.FS, Seg.GS):
            environment.set_segment(segment, SegmentState(0, 0, 0, 0))
    if new_ss is not ss:
        environment.set_segment(Seg.SS, new_ss)
    environment.set_segment(Seg.CS, cs._replace(selector=cs.selector & ~3 | new_cpl))
    environment.set_gpr(Gpr.RSP, environment.gpr(Gpr.RSP) & ~mask | top & mask)
    environment.rip = target.rip


def long_mode(environment: Environment, memory: GuestMemory, event: Event) -> None:
    """Through a 64-bit gate, with interrupt stack table or stack switch; SS becomes null on a change of privilege."""
    selector_error = event.vector * 8 + 2 + event.external
    base, limit = environment.table(Seg.IDTR)
    if event.vector * 16 + 15 > limit:
        raise general_protection(selector_error)
    raw = memory.read_int(base + event.vector * 16, 16, implicit=True)
    gate = raw & (1 << 64) - 1
    if gate >> 40 & 0x1F not in (0xE, 0xF):
        raise general_protection(selector_error)
    _check_gate(environment, gate, event, selector_error)
    offset = gate & 0xFFFF | gate >> 32 & 0xFFFF0000 | (raw >> 64 & 0xFFFF_FFFF) << 32
    target = _code_target(environment, memory, gate >> 16 & 0xFFFF, offset, event, not gate >> 40 & 1)
    if target.cs.attributes & (L | DB) != L:
        raise general_protection(target.cs.selector & 0xFFFC | event.external)
    cpl = environment.cpl
    new_cpl = cpl if descriptors.is_conforming(target.cs) else descriptors.dpl(target.cs)
    stack_table = gate >> 32 & 7
    rsp, ss = environment.gpr(Gpr.RSP), environment.segment(Seg.SS)
    top = rsp
    if stack_table:
        top = _tss_stack64(environment, memory, 36 + 8 * (stack_table - 1), event)
    elif new_cpl < cpl:
        top = _tss_stack64(environment, memory, 4 + 8 * new_cpl, event)
    top &= ~0xF
    frame = [event.rip, environment.segment(Seg.CS).selector, environment.rflags, rsp, ss.selector]
    if event.error_code is not None:
        frame.insert(0, event.error_code)
    top = top - 8 * len(frame) & (1 << 64) - 1
    if not is_canonical(top):
        raise GuestFault(Vector.SS, event.external)
    memory.write(top, struct.pack(f"<{len(frame)}Q", *frame), user=new_cpl == 3, stack=True)
    if not is_canonical(target.rip):
        raise general_protection(event.external)
    cs = descriptors.mark_accessed(environment, memory, target.cs)
    flags = environment.rflags
    environment.rflags = flags & ~(_CLEARED | (_IF if target.interrupt_gate else 0))
    if new_cpl != cpl:
        environment.set_segment(Seg.SS, SegmentState(new_cpl, 0, 0, 0))
    environment.set_cpl(new_cpl)
    environment.set_segment(Seg.CS, cs._replace(selector=cs.selector & ~3 | new_cpl))
    environment.set_gpr(Gpr.RSP, top)
    environment.rip = target.rip


def _check_gate(environment: Environment, gate: int, event: Event, selector_error: int) -> None:
    if event.software and (gate >> 45 & 3) < environment.cpl:
        raise general_protection(event.vector * 8 + 2)
    if not gate >> 47 & 1:
        raise GuestFault(Vector.NP, selector_error)


def _code_target(
    environment: Environment, memory: GuestMemory, selector: int, offset: int, event: Event, interrupt_gate: bool
) -> _Target:
    error = selector & 0xFFFC | event.external
    if not selector & ~3:
        raise general_protection(event.external)
    try:
        cs = descriptors.load(environment, memory, selector)
    except GuestFault as fault:
        if fault.vector == Vector.GP:
            fault.error_code = error
        raise
    if not descriptors.is_code(cs) or descriptors.dpl(cs) > environment.cpl:
        raise general_protection(error)
    if not cs.attributes & descriptors.PRESENT:
        raise GuestFault(Vector.NP, error)
    return _Target(cs, offset, interrupt_gate)


def _tss_stack64(environment: Environment, memory: GuestMemory, offset: int, event: Event) -> int:
    tr = environment.segment(Seg.TR)
    if offset + 7 > tr.limit:
        raise GuestFault(Vector.TS, tr.selector & 0xFFFC | event.external)
    pointer = memory.read_int(tr.base + offset, 8, implicit=True)
    if not is_canonical(pointer):
        raise GuestFault(Vector.SS, event.external)
    return pointer


def _inner_stack(environment: Environment, memory: GuestMemory, cpl: int, event: Event) -> tuple[SegmentState, int]:
    """SS and stack pointer of a more privileged level, from the 16- or 32-bit TSS."""
    tr = environment.segment(Seg.TR)
    tss_error = GuestFault(Vector.TS, tr.selector & 0xFFFC | event.external)
    wide = bool(tr.attributes & 8)
    offset = 4 + 8 * cpl if wide else 2 + 4 * cpl
    if offset + (5 if wide else 3) > tr.limit:
        raise tss_error
    size = 4 if wide else 2
    sp = memory.read_int(tr.base + offset, size, implicit=True)
    selector = memory.read_int(tr.base + offset + size, 2, implicit=True)
    error = selector & 0xFFFC | event.external
    if not selector & ~3:
        raise GuestFault(Vector.TS, event.external)
    ss = descriptors.load(environment, memory, selector, Vector.TS)
    if selector & 3 != cpl or descriptors.dpl(ss) != cpl or not descriptors.is_writable_data(ss):
        raise GuestFault(Vector.TS, error)
    if not ss.attributes & descriptors.PRESENT:
        raise GuestFault(Vector.SS, error)
    return ss, sp


def _push(memory: GuestMemory, ss: SegmentState, sp: int, data: bytes, mask: int, cpl: int) -> None:
    """Writes a frame at SS:SP. Raises #SS outside the segment, also for a frame that would wrap."""
    last = sp + len(data) - 1
    expand_down = ss.attributes & 0x1C == 0x14
    inside = sp > ss.limit and last <= mask if expand_down else last <= ss.limit
    if not inside or last > mask:
        raise GuestFault(Vector.SS, 0)
    memory.write(ss.base + sp & 0xFFFF_FFFF, data, user=cpl == 3, stack=True)
