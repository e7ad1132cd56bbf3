"""SMI and RSM: what they do to a processor.

Sources: AMD APM volume 2, chapter 10; Linux arch/x86/kvm/smm.c for what both vendors' processors do alike. Control, MSR
and table filters are suspended inside; the nested table is not. RSM loads what lies in the save area, so where VTL1
watches (InterceptFilter.state_loads) the whole of it exits before any of it is loaded.
"""

from __future__ import annotations

from vtl0_guest.cpu import control, state
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.faults import NestedFault, Shutdown
from vtl0_guest.cpu.operation import Operation
from vtl0_guest.cpu.smm import save_area
from vtl0_guest.cpu.smm.save_area import Saved
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr, Rflags

_ENTRY = 0x8000
_CLEARED_CR0 = int(Cr0.PE | Cr0.EM | Cr0.TS | Cr0.PG)
_CODE, _DATA, _LIMIT = 0x809B, 0x8093, 0xFFFF_FFFF
_DR7 = 0x400
_VM = int(Rflags.VM)


def enter(context: Context, nmi_blocked: bool) -> None:
    """SMI: saves the state and goes to SMBASE + 0x8000. Raises Shutdown if the state cannot be saved."""
    smm = context.smm
    smm.before, smm.base_before, smm.nmi_blocked = state.read(context), smm.base, nmi_blocked
    smm.active = True
    context.show_smram()
    area = save_area.pack(Saved(smm.before, smm.base, context.halted, nmi_blocked))
    try:
        context.memory.physical.write(_area(context), area)
    except NestedFault as fault:
        raise Shutdown(f"SMI: the state-save area at {fault.gpa:#x} cannot be written") from None
    context.suspend_pins()
    context.trap_pending = context.halted = context.hyperv.idle = False
    state.load(context, _entry_state(smm.before, smm.base))


def _area(context: Context) -> int:
    return context.smm.base + save_area.OFFSET & 0xFFFF_FFFF


def _entry_state(before: registers_pb2.ProcessorState, base: int) -> registers_pb2.ProcessorState:
    inside = registers_pb2.ProcessorState()
    inside.CopyFrom(before)
    del inside.msrs[:]
    registers = inside.registers
    registers.rflags, registers.rip, registers.interrupt_shadow, registers.cpl = 2, _ENTRY, False, 0
    registers.cr0 &= ~_CLEARED_CR0
    registers.cr4 = registers.efer = 0
    code = registers_pb2.Segment(selector=base >> 4 & 0xFFFF, base=base, limit=_LIMIT, attributes=_CODE)
    registers.cs.CopyFrom(code)
    for data in (registers.ss, registers.ds, inside.es, inside.fs, inside.gs):
        data.CopyFrom(registers_pb2.Segment(limit=_LIMIT, attributes=_DATA))
    inside.idtr.base = inside.idtr.limit = 0
    inside.debug[5] = _DR7
    return inside


def resume(context: Context) -> Operation | None:
    """RSM: loads the save area, or exits with it where VTL1 wants to see it.

    Raises Shutdown for a state that no processor can have.
    """
    present = state.read(context)
    try:
        area = context.memory.physical.read(_area(context), save_area.SIZE)
    except NestedFault as fault:
        raise Shutdown(f"RSM: the state-save area at {fault.gpa:#x} cannot be read") from None
    saved = _checked(save_area.unpack(area, present))
    if not context.state_loads_exit:
        _leave(context, saved)
        return None
    message = vcpu_pb2.StateLoad(
        cause=vcpu_pb2.STATE_LOAD_CAUSE_RSM,
        state=saved.state,
        before=context.smm.before,
        smbase=saved.smbase,
        smbase_before=context.smm.base_before,
    )
    # What SMM keeps in MSRs of its own; these come from the area.
    loaded: dict[int, int] = {
        Msr.EFER: saved.state.registers.efer,
        Msr.FS_BASE: saved.state.fs.base,
        Msr.GS_BASE: saved.state.gs.base,
    }
    for entry in present.msrs:
        message.state.msrs.add(index=entry.index, value=loaded.get(entry.index, entry.value))
    return Operation(vcpu_pb2.Exit(state_load=message), lambda _value: _leave(context, saved), shuts_down=True)


def _leave(context: Context, saved: Saved) -> None:
    context.smm.active, context.smm.base = False, saved.smbase
    context.resume_pins()
    context.show_smram()
    state.load(context, saved.state)
    context.halted = saved.halted
    context.left_smm()
    context.engine.set_pending(True)  # what was held back


def _checked(saved: Saved) -> Saved:
    """Raises Shutdown; LMA and CPL follow from the rest."""
    registers = saved.state.registers
    cr0, cr4, efer = registers.cr0, registers.cr4, registers.efer
    for broken, why in (
        (cr0 >> 32, f"CR0 {cr0:#x}"),
        (cr0 & Cr0.PG and not cr0 & Cr0.PE, "CR0.PG without PE"),
        (cr0 & Cr0.NW and not cr0 & Cr0.CD, "CR0.NW without CD"),
        (cr4 & ~control.CR4_DEFINED, f"CR4 {cr4:#x}"),
        (efer & ~control.EFER_DEFINED, f"EFER {efer:#x}"),
        (efer & Efer.LME and cr0 & Cr0.PG and not cr4 & Cr4.PAE, "long mode without CR4.PAE"),
    ):
        if broken:
            raise Shutdown(f"RSM would load {why}")
    registers.efer = control.efer_after_cr0(efer, cr0)
    if not cr0 & Cr0.PE:
        registers.cpl = 0
    else:
        registers.cpl = 3 if registers.rflags & _VM else registers.ss.attributes >> 5 & 3
    return saved
