"""Names of registers, states and kinds of events as people write them, in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vtlab.enums import name_of
from vtlab.errors import BadArgument
from vtlab.v1 import registers_pb2, vmm_pb2

RegisterContent = int | registers_pb2.Segment | registers_pb2.TableRegister

_REGISTER_PREFIX = "REGISTER_NAME_"
_STATE_PREFIX = "MACHINE_STATE_"
_EVENT_PREFIX = "EVENT_KIND_"

REGISTERS: dict[str, registers_pb2.RegisterName.ValueType] = {
    name.removeprefix(_REGISTER_PREFIX).lower(): number for name, number in registers_pb2.RegisterName.items() if number
}
REGISTERS["xcr0"] = registers_pb2.REGISTER_NAME_XFEM
EVENT_KINDS: dict[str, vmm_pb2.EventKind.ValueType] = {
    name.removeprefix(_EVENT_PREFIX).lower(): number for name, number in vmm_pb2.EventKind.items() if number
}


def state_name(state: vmm_pb2.MachineState.ValueType) -> str:
    """ "RUNNING" for MACHINE_STATE_RUNNING."""
    return name_of(vmm_pb2.MachineState, state).removeprefix(_STATE_PREFIX)


def event_name(kind: vmm_pb2.EventKind.ValueType) -> str:
    """ "serial" for EVENT_KIND_SERIAL."""
    return name_of(vmm_pb2.EventKind, kind).removeprefix(_EVENT_PREFIX).lower()


def event_kinds(kinds: Iterable[str | int]) -> list[vmm_pb2.EventKind.ValueType]:
    """Kinds by name or number. Raises BadArgument for an unknown one."""
    by_text = EVENT_KINDS | {str(int(number)): number for number in EVENT_KINDS.values()}
    numbers = []
    for kind in kinds:
        number = by_text.get(str(kind).lower())
        if number is None:
            raise BadArgument(f"event kind {kind!r}", f"is none of {', '.join(EVENT_KINDS)}")
        numbers.append(number)
    return numbers


def register_values(content: Mapping[str, RegisterContent]) -> list[registers_pb2.RegisterValue]:
    """Registers by name ("rip", "cr0", "gdtr") as the contract carries them. Raises BadArgument for an unknown one."""
    values = []
    for name, value in content.items():
        number = REGISTERS.get(name.lower())
        if number is None:
            raise BadArgument(f"register {name!r}", f"is none of {', '.join(REGISTERS)}")
        if isinstance(value, registers_pb2.Segment):
            values.append(registers_pb2.RegisterValue(name=number, segment=value))
        elif isinstance(value, registers_pb2.TableRegister):
            values.append(registers_pb2.RegisterValue(name=number, table=value))
        elif 0 <= value < 1 << 64:
            values.append(registers_pb2.RegisterValue(name=number, value=value))
        else:
            raise BadArgument(f"register {name!r}", f"{value:#x} does not fit in 64 bits")
    return values
