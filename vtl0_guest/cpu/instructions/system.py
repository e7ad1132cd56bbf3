"""CPUID, HLT, VMCALL and VMMCALL, INVLPG, software interrupts, and what this processor does not have."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vtl0_guest.cpu import cpuid as cpuid_table
from vtl0_guest.cpu import levels, msrs
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.decode import SEGMENTS, effective_offset, write_register
from vtl0_guest.cpu.environment import Gpr
from vtl0_guest.cpu.faults import general_protection, undefined_opcode
from vtl0_guest.cpu.gates import Event
from vtl0_guest.cpu.instructions.control_registers import require_kernel
from vtl0_guest.cpu.operation import Operation
from vtlab.v1 import vcpu_pb2
from vtlab.x86.paging import is_canonical
from vtlab.x86.registers import Cr4, Msr, Rflags, Vector

_LOW = 0xFFFF_FFFF
_RAX = int(Gpr.RAX)
_IF, _VM, _OF = int(Rflags.IF), int(Rflags.VM), 1 << 11
_CF, _ARITHMETIC = 1, 0x8D5

RANDOM = frozenset({Mnemonic.RDRAND, Mnemonic.RDSEED})
SOFTWARE_INTERRUPTS = frozenset({Mnemonic.INT, Mnemonic.INT3, Mnemonic.INTO, Mnemonic.INT1})


def cpuid(context: Context, _instruction: Instruction) -> Operation | None:
    environment = context.environment
    leaf, subleaf = environment.gpr(Gpr.RAX) & _LOW, environment.gpr(Gpr.RCX) & _LOW
    values = cpuid_table.cpuid(
        leaf, subleaf, context.vp_index, context.vp_count, environment.cr(4), context.local_apic.enabled
    )

    def apply() -> None:
        for register, value in zip((Gpr.RAX, Gpr.RBX, Gpr.RCX, Gpr.RDX), values, strict=True):
            environment.set_gpr(register, value)

    if context.intercepts.cpuid or cpuid_table.HYPERVISOR_FIRST <= leaf <= cpuid_table.HYPERVISOR_LAST:
        # The answer of four registers comes as register updates beside COMPLETE.
        message = vcpu_pb2.Exit(cpuid=vcpu_pb2.Cpuid(leaf=leaf, subleaf=subleaf, defaults=values))
        return Operation(message, lambda _value: apply(), 0, lambda _value: None)
    apply()
    return None


def hlt(context: Context, _instruction: Instruction) -> Operation | None:
    require_kernel(context)
    interrupts = bool(context.environment.rflags & _IF)

    def halt(_value: int) -> None:
        context.halted = True

    if context.intercepts.hlt or not interrupts:
        message = vcpu_pb2.Exit(halt=vcpu_pb2.Halt(interrupts_enabled=interrupts))
        return Operation(message, halt, 0, lambda _value: None)
    context.halted = True
    return None


def hypercall(context: Context, instruction: Instruction) -> Operation | None:
    """VMCALL or VMMCALL: for the machine at CPL0 in protected mode, or wherever the filter wants it; else #UD.

    Forms with prefixes are #UD too, and all inside SMM: pins are suspended there, and VTL1 would take what it sees for
    VTL0's own state.
    """
    reaches = context.environment.kernel or context.intercepts.user_hypercalls
    if not reaches or instruction.len != 3 or context.smm.active:
        raise undefined_opcode()

    def complete(value: int) -> None:
        context.environment.words[_RAX] = value

    return Operation(levels.describe_hypercall(context), None, 0, complete)


def invlpg(context: Context, instruction: Instruction) -> Operation | None:
    require_kernel(context)
    environment = context.environment
    base = environment.segment(SEGMENTS[instruction.memory_segment]).base
    linear = base + effective_offset(environment, instruction) & (1 << 64) - 1
    if environment.bitness != 64:
        linear &= _LOW

    def flush(_value: int) -> None:
        if is_canonical(linear):
            context.engine.flush_page(linear)

    if context.intercepts.invlpg:
        return Operation(vcpu_pb2.Exit(invlpg=vcpu_pb2.InvalidatePage(gva=linear)), flush)
    flush(0)
    return None


def software_interrupt(context: Context, instruction: Instruction) -> Event | None:
    """The event of INTn, INT3, INTO or INT1; None for an INTO that does nothing."""
    environment = context.environment
    after = environment.rip + instruction.len
    if instruction.mnemonic == Mnemonic.INT1:
        return Event(Vector.DB, None, after)
    if instruction.mnemonic == Mnemonic.INT3:
        return Event(Vector.BP, None, after, software=True)
    if instruction.mnemonic == Mnemonic.INTO:
        return Event(Vector.OF, None, after, software=True) if environment.rflags & _OF else None
    if environment.rflags & _VM and (environment.rflags >> 12 & 3) < 3:
        raise general_protection()
    return Event(instruction.immediate8, None, after, software=True)


def undefined(_context: Context, _instruction: Instruction) -> Operation | None:
    """SVM instructions, MONITOR, MWAIT: this processor does not have them."""
    raise undefined_opcode()


def rdtsc(context: Context, instruction: Instruction) -> Operation | None:
    """RDTSC and RDTSCP where hyperv/instant.py wants to know. The engine has checked CR4.TSD."""
    environment = context.environment
    counter = context.hyperv.instant.counter() + context.engine.tsc_offset
    environment.set_gpr(Gpr.RAX, counter & _LOW)
    environment.set_gpr(Gpr.RDX, counter >> 32 & _LOW)
    if instruction.mnemonic == Mnemonic.RDTSCP:
        environment.set_gpr(Gpr.RCX, context.shadows[Msr.TSC_AUX])
    return None


def random_number(context: Context, instruction: Instruction) -> Operation | None:
    """RDRAND and RDSEED of a machine whose runs repeat."""
    environment = context.environment
    write_register(environment, instruction.op0_register, context.random.getrandbits(64))
    environment.rflags = environment.rflags & ~_ARITHMETIC | _CF
    return None


def rdpmc(context: Context, _instruction: Instruction) -> Operation | None:
    """The four counters, which count nothing: what was last written to their MSRs. #GP for every other index."""
    environment = context.environment
    if not environment.cr(4) & Cr4.PCE:
        require_kernel(context)
    index = environment.gpr(Gpr.RCX) & 0xFFFF_FFFF
    if index >= msrs.COUNTERS:
        raise general_protection()
    value = context.shadows[msrs.FIRST_COUNTER + index]
    environment.set_gpr(Gpr.RAX, value & 0xFFFF_FFFF)
    environment.set_gpr(Gpr.RDX, value >> 32 & 0xFFFF)
    return None


def nothing(context: Context, _instruction: Instruction) -> Operation | None:
    """INVD: caches are not modelled."""
    require_kernel(context)
    return None
