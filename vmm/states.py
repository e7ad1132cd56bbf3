"""The table of legal state moves of a machine. A cell that is not there is illegal."""

from __future__ import annotations

from enum import StrEnum

from vtlab.errors import WrongState
from vtlab.v1 import vmm_pb2
from vtlab.v1.vmm_pb2 import MachineState


class Operation(StrEnum):
    """What can be asked of a machine; the value is for people."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    RESET = "reset"
    DESTROY = "destroy"
    GET_REGISTERS = "get registers"
    SET_REGISTERS = "set registers"
    READ_MEMORY = "read memory"
    WRITE_MEMORY = "write memory"
    TRANSLATE = "translate"
    HIJACK = "hijack"
    WRITE_SERIAL = "write serial"
    READ_DISK = "read disk"
    WRITE_DISK = "write disk"
    GUARD = "guard"
    INJECT = "inject"
    SET_FILTERS = "set filters"
    # From inside: a vCPU ended, asked for a reset, or broke.
    GUEST_ENDS = "end"
    GUEST_RESETS = "reset itself"
    BREAK = "break"


CREATED = vmm_pb2.MACHINE_STATE_CREATED
RUNNING = vmm_pb2.MACHINE_STATE_RUNNING
PAUSED = vmm_pb2.MACHINE_STATE_PAUSED
STOPPED = vmm_pb2.MACHINE_STATE_STOPPED
FAILED = vmm_pb2.MACHINE_STATE_FAILED
STATES = (CREATED, RUNNING, PAUSED, STOPPED, FAILED)

_LOOK = (Operation.GET_REGISTERS, Operation.READ_MEMORY, Operation.TRANSLATE)
# The disk can be taken out of a machine that is off.
_DISK = (Operation.READ_DISK, Operation.WRITE_DISK)
_CHANGE = (Operation.SET_REGISTERS, Operation.WRITE_MEMORY, Operation.WRITE_SERIAL, Operation.SET_FILTERS)


def _stay(state: MachineState.ValueType, *operations: Operation) -> dict[Operation, MachineState.ValueType]:
    return dict.fromkeys(operations, state)


_O = Operation
# state -> operation -> state after it. DESTROY leads out of the table; FAILED stands for that there.
MOVES: dict[MachineState.ValueType, dict[Operation, MachineState.ValueType]] = {
    CREATED: {
        **_stay(CREATED, *_LOOK, *_CHANGE, *_DISK),
        _O.START: RUNNING,
        _O.DESTROY: FAILED,
        _O.BREAK: FAILED,
    },
    RUNNING: {
        **_stay(RUNNING, *_LOOK, *_CHANGE, *_DISK, _O.HIJACK, _O.GUARD, _O.INJECT, _O.RESET, _O.GUEST_RESETS),
        _O.PAUSE: PAUSED,
        _O.STOP: STOPPED,
        _O.DESTROY: FAILED,
        _O.GUEST_ENDS: STOPPED,
        _O.BREAK: FAILED,
    },
    PAUSED: {
        # A reset that the guest asked for just before: the next generation waits, too.
        **_stay(PAUSED, *_LOOK, *_CHANGE, *_DISK, _O.HIJACK, _O.GUARD, _O.INJECT, _O.GUEST_RESETS),
        _O.RESUME: RUNNING,
        _O.STOP: STOPPED,
        _O.RESET: RUNNING,
        _O.DESTROY: FAILED,
        _O.GUEST_ENDS: STOPPED,
        _O.BREAK: FAILED,
    },
    STOPPED: {
        **_stay(STOPPED, *_LOOK, *_DISK),
        _O.RESET: RUNNING,
        _O.DESTROY: FAILED,
        _O.BREAK: FAILED,
    },
    FAILED: {
        _O.RESET: RUNNING,
        _O.DESTROY: FAILED,
        _O.BREAK: FAILED,
    },
}


def state_name(state: MachineState.ValueType) -> str:
    """ "RUNNING" for MACHINE_STATE_RUNNING."""
    return MachineState.Name(state).removeprefix("MACHINE_STATE_")


def after(state: MachineState.ValueType, operation: Operation, vm: str = "") -> MachineState.ValueType:
    """The state after an operation. Raises WrongState, which names both, if it is not legal."""
    following = MOVES[state].get(operation)
    if following is None:
        raise WrongState(f"machine '{vm}'", state=state_name(state), operation=operation.value)
    return following
