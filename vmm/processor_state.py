"""Registers of a ProcessorState by name: pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vtlab.enums import name_of
from vtlab.v1.registers_pb2 import MsrValue, ProcessorState, RegisterName, RegisterValue, Segment, TableRegister
from vtlab.v1.vcpu_pb2 import RegisterWrite, Update
from vtlab.x86.registers import Msr

_GENERAL = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
_TABLES = ("idtr", "gdtr")
_DEBUG = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")

# While VTL1 is on, clients may set these without asking it.
FREE_REGISTERS = frozenset(int(RegisterName.Value(f"REGISTER_NAME_{name.upper()}")) for name in _GENERAL)


def _number(name: str) -> int:
    return int(RegisterName.Value(f"REGISTER_NAME_{name.upper()}"))


def _word(name: str) -> Callable[[ProcessorState], int]:
    return lambda state: int(getattr(state.registers, name))


def _debug(position: int) -> Callable[[ProcessorState], int]:
    return lambda state: state.debug[position] if position < len(state.debug) else 0


_WORDS: dict[int, Callable[[ProcessorState], int]] = {
    **{_number(name): _word(name) for name in (*_GENERAL, *_CONTROL)},
    **{_number(name): _debug(position) for position, name in enumerate(_DEBUG)},
    _number("xfem"): lambda state: state.xcr0,
}
_DEBUG_NUMBERS = {_number(name): position for position, name in enumerate(_DEBUG)}
SEGMENTS = frozenset(_number(name) for name in _SEGMENTS)
TABLES = frozenset(_number(name) for name in _TABLES)
_SEGMENT_NAMES = {_number(name): name for name in _SEGMENTS}
_TABLE_NAMES = {_number(name): name for name in _TABLES}
REGISTERS = frozenset(_WORDS) | frozenset(_SEGMENT_NAMES) | frozenset(_TABLE_NAMES)


def segment(state: ProcessorState, name: int) -> Segment | None:
    """ES to TR, or None if the register is no segment."""
    field = _SEGMENT_NAMES.get(name)
    if field is None:
        return None
    holder = state.registers if field in ("cs", "ss", "ds") else state
    found: Segment = getattr(holder, field)
    return found


def table(state: ProcessorState, name: int) -> TableRegister | None:
    """IDTR or GDTR, or None."""
    field = _TABLE_NAMES.get(name)
    found: TableRegister | None = getattr(state, field) if field else None
    return found


def word(state: ProcessorState, name: int) -> int:
    """The 64-bit value of a register that has one; KeyError for others."""
    return _WORDS[name](state)


def register(state: ProcessorState, name: RegisterName.ValueType) -> RegisterValue:
    """Any register; KeyError if there is no such."""
    if name in _WORDS:
        return RegisterValue(name=name, value=word(state, name))
    found = segment(state, name)
    if found is not None:
        return RegisterValue(name=name, segment=found)
    descriptor = table(state, name)
    if descriptor is None:
        raise KeyError(name)
    return RegisterValue(name=name, table=descriptor)


def msr(state: ProcessorState, index: int) -> int | None:
    """An MSR that the core models, or None."""
    return next((item.value for item in state.msrs if item.index == index), None)


def _set_register(state: ProcessorState, item: RegisterValue) -> None:
    """A segment, a table, or one of the 64-bit registers outside XCR0 and the debug registers."""
    name = name_of(RegisterName, item.name).removeprefix("REGISTER_NAME_").lower()
    if item.HasField("segment"):
        holder = state.registers if name in ("cs", "ss", "ds") else state
        getattr(holder, name).CopyFrom(item.segment)
    elif item.HasField("table"):
        getattr(state, name).CopyFrom(item.table)
    else:
        setattr(state.registers, name, item.value)


def with_updates(state: ProcessorState, updates: Iterable[Update]) -> ProcessorState:
    """The state when a vCPU that holds `state` has taken these; what is no register is passed over."""
    result = ProcessorState()
    result.CopyFrom(state)
    for update in updates:
        kind = update.WhichOneof("change")
        if kind == "start_processor":
            result.CopyFrom(update.start_processor.state)
        elif kind == "msr":
            found = next((item for item in result.msrs if item.index == update.msr.index), None)
            if found is not None:
                found.value = update.msr.value
        elif kind == "register":
            _update_register(result, update.register)
    return result


def _update_register(state: ProcessorState, item: RegisterValue) -> None:
    if item.name == _number("xfem"):
        state.xcr0 = item.value
    elif item.name in _DEBUG_NUMBERS:
        state.debug[_DEBUG_NUMBERS[item.name]] = item.value
    elif item.name in REGISTERS:
        _set_register(state, item)


def initial_state(values: Iterable[RegisterValue], pat: int) -> ProcessorState:
    """The state that an initial VP context describes; DR6 and DR7 are as after RESET, XCR0 has x87 alone.

    An illegal PAT, which a processor could not load, is left out.
    """
    state = ProcessorState(xcr0=1, debug=[0, 0, 0, 0, 0xFFFF_0FF0, 0x400])
    registers = state.registers
    for item in values:
        _set_register(state, item)
    registers.cpl = registers.ss.attributes >> 5 & 3
    if all(pat >> shift & 0xFF in (0, 1, 4, 5, 6, 7) for shift in range(0, 64, 8)):
        state.msrs.append(MsrValue(index=Msr.PAT, value=pat))
    return state


def register_write(state: ProcessorState, value: RegisterValue) -> RegisterWrite:
    """What a write of that register would change; the tables, and of segments base and limit, as tables."""
    old = register(state, value.name)
    write = RegisterWrite(name=value.name)
    if value.HasField("table") or old.HasField("table"):
        write.old_table.CopyFrom(old.table)
        write.new_table.CopyFrom(value.table)
    elif old.HasField("segment"):
        write.old_value, write.new_value = old.segment.selector, value.segment.selector
        write.old_table.base, write.old_table.limit = old.segment.base, old.segment.limit
        write.new_table.base, write.new_table.limit = value.segment.base, value.segment.limit
    else:
        write.old_value, write.new_value = old.value, value.value
    return write
