"""INIT and SIPI: what they leave in a processor.

Sources: Intel SDM volume 3, "Processor state after power-up, reset or INIT" and "MP initialization protocol". INIT
keeps x87 and SSE state, XCR0 and the MSRs but EFER; the intercepts that a higher level set stay in force.
"""

from __future__ import annotations

from vtl0_guest.cpu import cpuid, state
from vtl0_guest.cpu.context import Context
from vtl0_guest.cpu.devices.apic_registers import Delivery
from vtl0_guest.cpu.devices.local_apic import Startup
from vtl0_guest.cpu.devices.power_management import FACS_ADDRESS, WAKING_VECTOR
from vtl0_guest.cpu.faults import NestedFault, Shutdown
from vtl0_guest.cpu.operation import Operation
from vtl0_guest.cpu.resolution import fault_of
from vtlab.v1 import registers_pb2, vcpu_pb2

_CD_NW = 0x6000_0000
_CR0_ET = 0x10
_LIMIT = 0xFFFF
_CODE, _DATA, _LDT, _TSS = 0x9B, 0x93, 0x82, 0x8B
_KINDS = {Delivery.INIT: vcpu_pb2.STARTUP_KIND_INIT, Delivery.STARTUP: vcpu_pb2.STARTUP_KIND_SIPI}


def init(context: Context) -> None:
    """INIT: the processor waits for SIPI. Its local APIC is reset, but for the ID and mode."""
    cr0 = context.environment.cr(0)
    message = registers_pb2.ProcessorState(xcr0=context.engine.xcr0, debug=[0, 0, 0, 0, 0xFFFF_0FF0, 0x400])
    registers = message.registers
    registers.rip, registers.rflags, registers.rdx = 0xFFF0, 2, cpuid.SIGNATURE
    registers.cr0 = _CR0_ET | cr0 & _CD_NW
    registers.cs.CopyFrom(_segment(0xF000, 0xFFFF_0000, _CODE))
    for data in (registers.ss, registers.ds, message.es, message.fs, message.gs):
        data.CopyFrom(_segment(0, 0, _DATA))
    message.ldtr.CopyFrom(_segment(0, 0, _LDT))
    message.tr.CopyFrom(_segment(0, 0, _TSS))
    message.gdtr.limit = message.idtr.limit = _LIMIT
    context.local_apic.init()
    state.load(context, message)
    context.open_window(None)
    context.trap_pending = context.repeat = False
    context.waits_for_startup = True


def start(context: Context, vector: int) -> None:
    """SIPI: real mode at page `vector`, offset 0; under a filter that wants one, with a window of no page."""
    registers = state.read(context)
    registers.registers.cs.CopyFrom(_segment(vector << 8, vector << 12, _CODE))
    registers.registers.rip = 0
    del registers.msrs[:]
    state.load(context, registers)
    context.open_window(() if context.intercepts.startup_window else None)


def waking_vector(context: Context) -> int:
    """What the FACS says now; 0 without one."""
    try:
        facs = context.memory.physical.read(FACS_ADDRESS, WAKING_VECTOR + 4)
    except NestedFault:
        return 0
    return int.from_bytes(facs[WAKING_VECTOR:], "little") if facs.startswith(b"FACS") else 0


def wake(context: Context) -> None:
    """Out of S3: INIT's state, in real mode at the waking vector. Raises Shutdown if there is none.

    Source: ACPI 6.5, 5.2.10: CS is the vector's paragraph, IP the rest.
    """
    vector = waking_vector(context)
    if not 0 < vector < 1 << 20:
        raise Shutdown(f"S3: no waking vector below 1 MiB (FACS at {FACS_ADDRESS:#x}: {vector:#x})")
    init(context)
    registers = state.read(context)
    registers.registers.cs.CopyFrom(_segment(vector >> 4, vector & ~0xF, _CODE))
    registers.registers.rip = vector & 0xF
    del registers.msrs[:]
    state.load(context, registers)


def held(context: Context) -> Operation | None:
    """The exit for the first INIT or SIPI that this processor holds back."""
    message = context.platform.take_held_startup(context.vp_index)
    if message is None:
        return None
    vector = message.vector if message.delivery == Delivery.STARTUP else 0
    kind = _KINDS[Delivery(message.delivery)]
    startup = vcpu_pb2.Startup(
        target_vp=message.target.vp_index, kind=kind, vector=vector, target_parked=message.target.is_parked()
    )

    def commit(vector: int) -> None:
        context.platform.deliver_startup(Startup(message.target, message.delivery, vector & 0xFF))

    def refuse(resolution: vcpu_pb2.Resolution) -> None:
        """The message is dropped."""
        fault = fault_of(resolution)
        if fault is not None:
            raise fault

    return Operation(vcpu_pb2.Exit(startup=startup), commit, vector, refuse=refuse)


def fetch_outside(context: Context, gpa: int) -> Operation:
    """The exit for a fetch that the open window does not cover. Whatever does not end it leaves INIT's state."""
    load = vcpu_pb2.StateLoad(cause=vcpu_pb2.STATE_LOAD_CAUSE_STARTUP_END, state=state.read(context), gpa=gpa)

    def commit(_value: int) -> None:
        context.open_window(None)
        context.engine.set_pending(True)  # an SMI may have waited for that

    return Operation(
        vcpu_pb2.Exit(state_load=load),
        commit,
        refuse=lambda _resolution: init(context),
    )


def _segment(selector: int, base: int, attributes: int) -> registers_pb2.Segment:
    return registers_pb2.Segment(selector=selector, base=base, limit=_LIMIT, attributes=attributes)
