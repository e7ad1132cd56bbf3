"""Architectural registers in HvCallGetVpRegisters and HvCallSetVpRegisters, read from a level's core and written to it.

Reading VTL0's from VTL1 has VTL0 apply first what waits for it, so that what VTL1 wrote is what it reads. A write has
no further effect and meets no intercept; it rides on that level's next enter. Where the profile lets a VP name another
one, that one is brought out for the moment.
"""

from __future__ import annotations

from vmm import processor_state
from vmm.hypercalls import observed, register_values
from vmm.hypercalls.table import Call
from vmm.memory import WRITE
from vmm.processor import Processor
from vmm.vtl import HIGHEST_VTL, VTL0
from vtlab.errors import VtlabError
from vtlab.hyperv.layouts import decode_segment, decode_table, encode_segment, encode_table
from vtlab.hyperv.registers import MSR_OF_REGISTER, SYNTHETIC_MSR_OF_REGISTER
from vtlab.hyperv.status import HvStatus
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import registers_pb2
from vtlab.v1.registers_pb2 import MsrValue, ProcessorState, RegisterValue
from vtlab.v1.vcpu_pb2 import Update
from vtlab.x86.registers import Msr

_WAKES = (registers_pb2.REGISTER_NAME_RIP,)


def known(name: int) -> bool:
    """The processor or its SynIC has that register."""
    return name in processor_state.REGISTERS or name in MSR_OF_REGISTER or name in SYNTHETIC_MSR_OF_REGISTER


def objection(call: Call, processor: Processor, target: int, name: int) -> HvStatus:
    """Only from above, unless it is synthetic or the profile lets a level name its own."""
    own = name in SYNTHETIC_MSR_OF_REGISTER or call.profile.own_registers
    if target >= call.vtl and not own:
        return HvStatus.ACCESS_DENIED
    return HvStatus.SUCCESS if processor.vtl.has(target) else HvStatus.INVALID_VTL_STATE


def state_of(call: Call, processor: Processor, target: int) -> ProcessorState:
    """What a level's core holds, when what waits for it has been applied.

    Another VP is brought out for that, and goes on by itself. Raises TimedOut if it does not come out.
    """
    if processor is not call.processor:
        with call.board.gate.none_inside():
            return _state_of_other(call, processor, target)
    if target < call.vtl and not processor.settled:
        call.board.record_serial(processor, target, processor.settle())
    return call.board.level(target).state(processor.index)


def _state_of_other(call: Call, processor: Processor, target: int) -> ProcessorState:
    """Of a VP that is outside: an instruction whose exit is open has not been executed yet."""
    if target == VTL0 and processor.vtl.active != VTL0 and not processor.settled:
        call.board.record_serial(processor, target, processor.settle())
    state = call.board.level(target).state(processor.index)
    return processor_state.with_updates(state, processor.waiting_for(target))


def read(call: Call, processor: Processor, target: int, name: int) -> int:
    """The 128-bit value."""
    state = state_of(call, processor, target)
    index = MSR_OF_REGISTER.get(name) or SYNTHETIC_MSR_OF_REGISTER.get(name)
    if index is not None:
        return processor_state.msr(state, index) or 0
    segment = processor_state.segment(state, name)
    if segment is not None:
        return int.from_bytes(encode_segment(segment), "little")
    table = processor_state.table(state, name)
    if table is not None:
        return int.from_bytes(encode_table(table), "little")
    return processor_state.word(state, name)


def write(call: Call, processor: Processor, target: int, name: int, value: int) -> HvStatus:
    """A level above may have reasons to keep its lower one from this: then that one cannot write its own."""
    index = SYNTHETIC_MSR_OF_REGISTER.get(name)
    if index is not None:
        return _write_synthetic(call, processor, target, index, value)
    if target == call.vtl and any(processor.vtl.has(vtl) for vtl in range(call.vtl + 1, HIGHEST_VTL + 1)):
        return HvStatus.ACCESS_DENIED
    index = MSR_OF_REGISTER.get(name)
    if index is not None:
        return _write_msr(call, processor, target, index, value)
    data = value.to_bytes(16, "little")
    register = RegisterValue(name=name)  # type: ignore[arg-type]
    if name in processor_state.SEGMENTS:
        register.segment.CopyFrom(decode_segment(data))
    elif name in processor_state.TABLES:
        register.table.CopyFrom(decode_table(data))
    elif not register_values.legal_register(name, value):
        return HvStatus.INVALID_REGISTER_VALUE
    else:
        register.value = value
    if call.exit.hypercall.observed and not observed.may_write(call, state_of(call, processor, target), register):
        return HvStatus.ACCESS_DENIED
    _post(call, processor, target, Update(register=register))
    if target == VTL0 and name in _WAKES:
        call.board.gate.wake(processor.index)
    return HvStatus.SUCCESS


def _write_synthetic(call: Call, processor: Processor, target: int, index: int, value: int) -> HvStatus:
    if index in register_values.SYNTHETIC_READ_ONLY:
        return HvStatus.INVALID_PARAMETER

    def writable(gpa: int) -> bool:
        try:
            call.board.memory.check(gpa, PAGE_SIZE, WRITE, target)
        except VtlabError:
            return False
        return True

    if not register_values.legal_synthetic(index, value, writable):
        return HvStatus.INVALID_REGISTER_VALUE
    if call.exit.hypercall.observed:
        old = processor_state.msr(state_of(call, processor, target), index) or 0
        if not observed.may_write_msr(call, index, old, value):
            return HvStatus.ACCESS_DENIED
    _post(call, processor, target, Update(msr=MsrValue(index=index, value=value)))
    return HvStatus.SUCCESS


def _write_msr(call: Call, processor: Processor, target: int, index: int, value: int) -> HvStatus:
    if not register_values.legal_msr(index, value):
        return HvStatus.INVALID_REGISTER_VALUE
    old = processor_state.msr(state_of(call, processor, target), index)
    if old is None:
        return HvStatus.INVALID_PARAMETER
    if index == Msr.APIC_BASE:
        return HvStatus.SUCCESS if value == old else HvStatus.INVALID_PARAMETER
    if not observed.may_write_msr(call, index, old, value):
        return HvStatus.ACCESS_DENIED
    _post(call, processor, target, Update(msr=MsrValue(index=index, value=value)))
    return HvStatus.SUCCESS


def _post(call: Call, processor: Processor, target: int, update: Update) -> None:
    """Another VP executes nothing more before it has the new value."""
    if processor is call.processor:
        processor.post_latest(update, vtl=target)
        return
    with call.board.gate.none_inside():
        processor.post_latest(update, vtl=target)
