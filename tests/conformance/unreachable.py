"""Pairs of hypercall and status that no row reaches, and why: a test holds this to the tables of the hypercalls.

What a row asserts it reaches. Here is the rest of what the hypercalls of a profile can give.
"""

from __future__ import annotations

from typing import NamedTuple

from vtlab_conformance.calls import C, S

_EVERY = ("tlfs", "openvmm", "kvm")
_OTHER_VP = (
    "openvmm refuses every access to another VP before it looks at the register, and the own VP is in a good state"
)
_ABOVE = "openvmm refuses every level that is not below the caller, with ACCESS_DENIED"


class Unreachable(NamedTuple):
    """A pair, the profiles of which it is said, and why."""

    code: C
    status: S
    profiles: tuple[str, ...]
    reason: str


UNREACHABLE = (
    Unreachable(
        C.MODIFY_VTL_PROTECTION_MASK,
        S.INVALID_VTL_STATE,
        _EVERY,
        "VTL0 is refused for what it is, and when VTL1 calls, the partition has it",
    ),
    Unreachable(
        C.ENABLE_VP_VTL,
        S.ACCESS_DENIED,
        ("kvm",),
        "only a policy refuses to come to life; here VTL1 is the guest's own code",
    ),
    Unreachable(C.GET_VP_REGISTERS, S.INVALID_VTL_STATE, ("openvmm",), _OTHER_VP),
    Unreachable(C.SET_VP_REGISTERS, S.INVALID_VTL_STATE, ("openvmm",), _OTHER_VP),
    Unreachable(C.TRANSLATE_VIRTUAL_ADDRESS, S.INVALID_VP_STATE, ("openvmm",), _ABOVE),
    Unreachable(C.TRANSLATE_VIRTUAL_ADDRESS_EX, S.INVALID_VP_STATE, ("openvmm",), _ABOVE),
)


def pairs(profile: str) -> set[tuple[int, int]]:
    """Those of a profile."""
    return {(item.code, item.status) for item in UNREACHABLE if profile in item.profiles}
