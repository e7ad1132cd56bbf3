"""Hypervisor CPUID leaves of a machine: what is advertised is what is implemented (vtlab.hyperv.cpuid)."""

from __future__ import annotations

from vtlab.hyperv import cpuid
from vtlab.hyperv.cpuid import Feature, Hint, Privilege

_BUILD = 1
_MAJOR, _MINOR = 10, 0
_BASE = (
    Privilege.ACCESS_VP_RUNTIME
    | Privilege.ACCESS_TIME_REF_COUNT
    | Privilege.ACCESS_SYNIC_REGISTERS
    | Privilege.ACCESS_SYNTHETIC_TIMERS
    | Privilege.ACCESS_APIC_MSRS
    | Privilege.ACCESS_HYPERCALL_MSRS
    | Privilege.ACCESS_VP_INDEX
    | Privilege.ACCESS_RESET
    | Privilege.ACCESS_REFERENCE_TSC
    | Privilege.ACCESS_GUEST_IDLE
    | Privilege.ACCESS_FREQUENCIES
    | Privilege.POST_MESSAGES
    | Privilege.SIGNAL_EVENTS
)
_FEATURES = int(
    Feature.XMM_INPUT
    | Feature.GUEST_IDLE
    | Feature.FREQUENCY_MSRS
    | Feature.XMM_OUTPUT
    | Feature.SINT_POLLING
    | Feature.DIRECT_SYNTHETIC_TIMERS
)
_VSM = Privilege.ACCESS_VSM | Privilege.ACCESS_VP_REGISTERS | Privilege.START_VIRTUAL_PROCESSOR
_HINTS = Hint.RESET_MSR | Hint.RELAXED_TIMING | Hint.CLUSTER_IPI | Hint.EX_PROCESSOR_MASKS
_NEVER_SPIN = 0xFFFF_FFFF

Leaf = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""


def leaves(vp_count: int, vtl1: bool) -> dict[int, Leaf]:
    """All leaves from 0x40000000 on; others of that range are zero."""
    privileges = int(_BASE | _VSM if vtl1 else _BASE)
    return {
        cpuid.LEAF_VENDOR: (cpuid.LEAF_LIMITS, *cpuid.VENDOR),
        cpuid.LEAF_INTERFACE: (cpuid.INTERFACE, 0, 0, 0),
        cpuid.LEAF_VERSION: (_BUILD, _MAJOR << 16 | _MINOR, 0, 0),
        cpuid.LEAF_FEATURES: (privileges & 0xFFFF_FFFF, privileges >> 32, 0, _FEATURES),
        cpuid.LEAF_HINTS: (int(_HINTS), _NEVER_SPIN, 0, 0),
        cpuid.LEAF_LIMITS: (vp_count, vp_count, 0, 0),
    }


def leaf(number: int, vp_count: int, vtl1: bool) -> Leaf:
    return leaves(vp_count, vtl1).get(number, (0, 0, 0, 0))
