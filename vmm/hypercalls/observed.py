"""What a hypercall of guest code at VTL1 would change, put to the policy that observes it (Hypercall.observed).

The change is in the words of the contract, decoded once: what is judged is what is applied.
"""

from __future__ import annotations

from vmm import processor_state
from vmm.hypercalls.table import Call
from vmm.vtl1 import judged
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.v1.registers_pb2 import ProcessorState, RegisterValue
from vtlab.v1.vcpu_pb2 import Exit, MsrAccess, Protect, ProtectionUpdate

_N = registers_pb2
# Of the registers that have names, those that rules can be about.
_PINNABLE = frozenset(
    {
        *(_N.REGISTER_NAME_CR0, _N.REGISTER_NAME_CR3, _N.REGISTER_NAME_CR4, _N.REGISTER_NAME_EFER),
        *(_N.REGISTER_NAME_XFEM, _N.REGISTER_NAME_GDTR, _N.REGISTER_NAME_IDTR),
        *(_N.REGISTER_NAME_LDTR, _N.REGISTER_NAME_TR),
    }
)


def may_protect(call: Call, update: ProtectionUpdate) -> bool:
    """Whether VTL0 may get those rights; True where no policy observes the caller."""
    return not call.exit.hypercall.observed or _allowed(call, Exit(protect=Protect(protections=[update])))


def may_write(call: Call, state: ProcessorState, value: RegisterValue) -> bool:
    """Whether a level whose state is `state` may get that register."""
    if not call.exit.hypercall.observed or value.name not in _PINNABLE:
        return True
    return _allowed(call, Exit(register_write=processor_state.register_write(state, value)))


def may_write_msr(call: Call, index: int, old: int, new: int) -> bool:
    if not call.exit.hypercall.observed:
        return True
    return _allowed(call, Exit(msr=MsrAccess(index=index, write=True, old_value=old, new_value=new)))


def _allowed(call: Call, change: Exit) -> bool:
    exit_ = call.exit
    change.vp_index, change.vtl, change.sequence = call.processor.index, call.vtl, exit_.sequence
    change.origin = vcpu_pb2.ORIGIN_VCPU
    change.registers.CopyFrom(exit_.registers)
    return judged(call.board, call.processor, change).action == vcpu_pb2.ACTION_COMMIT
