"""Which status a VSM hypercall fails with, as data: rows of (condition, status), tried in order.

A profile is one set of rows; where the sources disagree (docs/architecture.md names them) another profile replaces
rows, never code. The default does what openvmm does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vmm.vtl import HIGHEST_VTL, VTL0, VTL1, PartitionVtl, VpVtl
from vtlab.hyperv.hypercalls import PARTITION_SELF, VP_SELF
from vtlab.hyperv.layouts import EnablePartitionVtlInput, ModifyProtectionHeader, VpHeader
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.vsm import FULL_ACCESS, EnablePartitionVtlFlags, MapGpaFlags

# Plain integers: the complement of an IntFlag has its own members' bits alone.
_READABLE = int(MapGpaFlags.READABLE)
_RIGHTS = int(FULL_ACCESS)


class Facts(NamedTuple):
    """What conditions may look at.

    Attributes:
        partition, vps: levels of the partition and of each VP.
        vp_index: the caller's VP.
        vtl: the caller's level.
    """

    partition: PartitionVtl
    vps: tuple[VpVtl, ...]
    vp_index: int
    vtl: int


Condition = Callable[[Facts, Any], bool]
Rules = tuple[tuple[Condition, HvStatus], ...]


def first_objection(rules: Rules, facts: Facts, request: object) -> HvStatus:
    """The status of the first row that applies, or SUCCESS."""
    for condition, status in rules:
        if condition(facts, request):
            return status
    return HvStatus.SUCCESS


# ------------------------------------------------------------------------------------------------- conditions, named


def other_partition(_facts: Facts, request: EnablePartitionVtlInput | VpHeader | ModifyProtectionHeader) -> bool:
    return request.partition != PARTITION_SELF


def resolve_vp(facts: Facts, vp_index: int) -> int:
    return facts.vp_index if vp_index == VP_SELF else vp_index


def no_such_vp(facts: Facts, request: VpHeader) -> bool:
    return resolve_vp(facts, request.vp_index) >= len(facts.vps)


def other_vp(facts: Facts, request: VpHeader) -> bool:
    return resolve_vp(facts, request.vp_index) != facts.vp_index


def target_is_not_vtl1(_facts: Facts, request: EnablePartitionVtlInput | VpHeader) -> bool:
    return request.vtl != VTL1


def unsupported_partition_flags(_facts: Facts, request: EnablePartitionVtlInput) -> bool:
    return bool(request.flags & ~int(EnablePartitionVtlFlags.MBEC))


def vsm_not_offered(facts: Facts, _request: object) -> bool:
    return not facts.partition.offered


def partition_has_vtl1(facts: Facts, _request: object) -> bool:
    return facts.partition.has(VTL1)


def partition_lacks_vtl1(facts: Facts, _request: object) -> bool:
    return not facts.partition.has(VTL1)


def vtl0_may_not_start_this_vp(facts: Facts, request: VpHeader) -> bool:
    """VTL0 enables VTL1 on the first VP, and on its own; VTL1 enables the rest."""
    return facts.vtl == VTL0 and (
        any(vp.has(VTL1) for vp in facts.vps) or resolve_vp(facts, request.vp_index) != facts.vp_index
    )


def vp_has_vtl1(facts: Facts, request: VpHeader) -> bool:
    return facts.vps[resolve_vp(facts, request.vp_index)].has(VTL1)


def imposing_vtl(facts: Facts, request: ModifyProtectionHeader) -> int:
    """The level whose protections are meant: unset is the caller; a lower one is that one."""
    value = request.input_vtl
    return value & 0xF if value >> 4 & 1 else facts.vtl


def reserved_input_vtl(_facts: Facts, request: ModifyProtectionHeader) -> bool:
    return bool(request.input_vtl >> 5)


def imposer_above_caller(facts: Facts, request: ModifyProtectionHeader) -> bool:
    return imposing_vtl(facts, request) > facts.vtl


def imposer_is_vtl0(facts: Facts, request: ModifyProtectionHeader) -> bool:
    return imposing_vtl(facts, request) == VTL0


def own_protections_not_enabled(facts: Facts, request: ModifyProtectionHeader) -> bool:
    return imposing_vtl(facts, request) == facts.vtl and not facts.partition.protections_enabled


def illegal_flags(facts: Facts, request: ModifyProtectionHeader) -> bool:
    return not legal_map_flags(request.map_flags, mbec=facts.partition.has_mbec)


def legal_map_flags(flags: int, *, mbec: bool) -> bool:
    """R alone or with W and X; W or X without R, KMX without UMX, and without MBEC any difference are illegal."""
    if flags & ~_RIGHTS:
        return False
    kernel, user = flags & MapGpaFlags.KERNEL_EXECUTABLE, flags & MapGpaFlags.USER_EXECUTABLE
    if flags & ~_READABLE and not flags & _READABLE:
        return False
    if kernel and not user:
        return False
    return mbec or bool(kernel) == bool(user)


def register_vtl(facts: Facts, request: VpHeader) -> int:
    """Target of Get/SetVpRegisters: unset is the caller's own level."""
    return request.vtl & 0xF if request.vtl >> 4 & 1 else facts.vtl


def reserved_register_vtl(_facts: Facts, request: VpHeader) -> bool:
    return bool(request.vtl >> 5)


def register_vtl_above_caller(facts: Facts, request: VpHeader) -> bool:
    return register_vtl(facts, request) > min(facts.vtl, HIGHEST_VTL)


# ---------------------------------------------------------------------------------------------------------- profiles


@dataclass(frozen=True, slots=True)
class Profile:
    """One answer to each question on which the sources differ. Attributes are named for their call."""

    name: str
    strict_reserved: bool
    enable_partition_vtl: Rules
    enable_vp_vtl: Rules
    modify_vtl_protection_mask: Rules
    get_vp_registers: Rules
    set_vp_registers: Rules


_VP_REGISTERS: Rules = (
    (reserved_register_vtl, HvStatus.INVALID_PARAMETER),
    (register_vtl_above_caller, HvStatus.ACCESS_DENIED),
)

OPENVMM = Profile(
    name="openvmm",
    strict_reserved=False,
    enable_partition_vtl=(
        (other_partition, HvStatus.INVALID_PARTITION_ID),
        (target_is_not_vtl1, HvStatus.ACCESS_DENIED),
        (unsupported_partition_flags, HvStatus.INVALID_PARAMETER),
        (vsm_not_offered, HvStatus.ACCESS_DENIED),
        (partition_has_vtl1, HvStatus.INVALID_VTL_STATE),
    ),
    enable_vp_vtl=(
        (other_partition, HvStatus.INVALID_PARTITION_ID),
        (no_such_vp, HvStatus.INVALID_VP_INDEX),
        (target_is_not_vtl1, HvStatus.INVALID_PARAMETER),
        (partition_lacks_vtl1, HvStatus.INVALID_VTL_STATE),
        (vtl0_may_not_start_this_vp, HvStatus.ACCESS_DENIED),
        (vp_has_vtl1, HvStatus.VTL_ALREADY_ENABLED),
    ),
    modify_vtl_protection_mask=(
        (other_partition, HvStatus.ACCESS_DENIED),
        (reserved_input_vtl, HvStatus.INVALID_PARAMETER),
        (imposer_above_caller, HvStatus.ACCESS_DENIED),
        (imposer_is_vtl0, HvStatus.INVALID_PARAMETER),
        (partition_lacks_vtl1, HvStatus.INVALID_VTL_STATE),
        (illegal_flags, HvStatus.INVALID_REGISTER_VALUE),
        (own_protections_not_enabled, HvStatus.ACCESS_DENIED),
    ),
    get_vp_registers=(
        (other_partition, HvStatus.ACCESS_DENIED),
        (other_vp, HvStatus.ACCESS_DENIED),
        *_VP_REGISTERS,
    ),
    set_vp_registers=(
        (other_partition, HvStatus.ACCESS_DENIED),
        (other_vp, HvStatus.INVALID_VP_INDEX),
        *_VP_REGISTERS,
    ),
)
PROFILES = {profile.name: profile for profile in (OPENVMM,)}
