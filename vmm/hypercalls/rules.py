"""Which status a VSM hypercall fails with, as data: rows of (condition, status), tried in order.

Where the sources disagree, the answer of the machine's profile stands in the row (vtlab.hyperv.profiles).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from vmm.vtl import HIGHEST_VTL, VTL0, VTL1, PartitionVtl, VpVtl
from vtlab.hyperv.hypercalls import PARTITION_SELF, VP_SELF
from vtlab.hyperv.layouts import EnablePartitionVtlInput, ModifyProtectionHeader, TranslateInput, VpHeader
from vtlab.hyperv.profiles import PROFILES, ExecuteBits, ProtectionTarget
from vtlab.hyperv.status import HvStatus
from vtlab.hyperv.vsm import FULL_ACCESS, EnablePartitionVtlFlags, MapGpaFlags, PartitionConfig

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
    """The status of the first row that applies, or SUCCESS. A row of SUCCESS is one that the profile does not have."""
    for condition, status in rules:
        if status and condition(facts, request):
            return status
    return HvStatus.SUCCESS


# ------------------------------------------------------------------------------------------------- conditions, named


def other_partition(
    _facts: Facts, request: EnablePartitionVtlInput | VpHeader | ModifyProtectionHeader | TranslateInput
) -> bool:
    return request.partition != PARTITION_SELF


def resolve_vp(facts: Facts, vp_index: int) -> int:
    return facts.vp_index if vp_index == VP_SELF else vp_index


def no_such_vp(facts: Facts, request: VpHeader | TranslateInput) -> bool:
    return resolve_vp(facts, request.vp_index) >= len(facts.vps)


def other_vp(facts: Facts, request: VpHeader | TranslateInput) -> bool:
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


def restricted_not_below_caller(facts: Facts, request: ModifyProtectionHeader) -> bool:
    """The level that is restricted, where it is given, must be below the caller."""
    explicit = bool(request.input_vtl >> 4 & 1)
    return facts.vtl == VTL0 or (explicit and request.input_vtl & 0xF >= facts.vtl)


def illegal_flags(execute_bits: ExecuteBits) -> Condition:
    def illegal(facts: Facts, request: ModifyProtectionHeader) -> bool:
        return not legal_map_flags(request.map_flags, mbec=facts.partition.has_mbec, execute_bits=execute_bits)

    return illegal


def legal_map_flags(flags: int, *, mbec: bool, execute_bits: ExecuteBits = ExecuteBits.EQUAL) -> bool:
    """R alone or with W and X; W or X without R, KMX without UMX, and without MBEC any difference are illegal."""
    if flags & ~_RIGHTS:
        return False
    kernel, user = flags & MapGpaFlags.KERNEL_EXECUTABLE, flags & MapGpaFlags.USER_EXECUTABLE
    if flags & ~_READABLE and not flags & _READABLE:
        return False
    if execute_bits is ExecuteBits.EITHER and not mbec:
        return True
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


def starts_itself(facts: Facts, request: VpHeader) -> bool:
    return resolve_vp(facts, request.vp_index) == facts.vp_index


def start_vtl_above_caller(facts: Facts, request: VpHeader) -> bool:
    return request.vtl > facts.vtl


def start_needs_vtl1(facts: Facts, request: VpHeader) -> bool:
    return request.vtl >= VTL1 and not facts.vps[resolve_vp(facts, request.vp_index)].has(VTL1)


def lower_startup_denied(facts: Facts, _request: VpHeader) -> bool:
    return facts.vtl == VTL0 and bool(facts.partition.config & PartitionConfig.DENY_LOWER_VTL_STARTUP)


def already_started(facts: Facts, request: VpHeader) -> bool:
    return facts.vps[resolve_vp(facts, request.vp_index)].started


def translate_vtl(facts: Facts, request: TranslateInput) -> int:
    """HV_INPUT_VTL in bits [63:56] of the control flags; unset is the caller's."""
    value = request.flags >> 56
    return value & 0xF if value >> 4 & 1 else facts.vtl


def reserved_translate_vtl(_facts: Facts, request: TranslateInput) -> bool:
    return bool(request.flags >> 61)


def translate_above_caller(facts: Facts, request: TranslateInput) -> bool:
    return translate_vtl(facts, request) > facts.vtl


def translate_not_below_caller(facts: Facts, request: TranslateInput) -> bool:
    return translate_vtl(facts, request) >= facts.vtl


# ---------------------------------------------------------------------------------------------------- rows of a profile


@dataclass(frozen=True, slots=True)
class CallRules:
    """The rows of each call, in the order in which they are tried. Attributes are named for their call."""

    enable_partition_vtl: Rules
    enable_vp_vtl: Rules
    start_virtual_processor: Rules
    modify_vtl_protection_mask: Rules
    get_vp_registers: Rules
    set_vp_registers: Rules
    translate_virtual_address: Rules


@cache
def rules_of(name: str) -> CallRules:
    """The rows for a profile of vtlab.hyperv.profiles."""
    profile, status = PROFILES[name], HvStatus
    registers: Rules = (
        (reserved_register_vtl, status.INVALID_PARAMETER),
        (register_vtl_above_caller, status.ACCESS_DENIED),
    )
    bad_partition = (other_partition, profile.registers_bad_partition)
    imposing: Rules = (
        (imposer_above_caller, status.ACCESS_DENIED),
        (imposer_is_vtl0, status.INVALID_PARAMETER),
    )
    restricted: Rules = ((restricted_not_below_caller, status.ACCESS_DENIED),)
    targets = imposing if profile.protection_target is ProtectionTarget.IMPOSING else restricted
    own = () if profile.translate_own else ((translate_not_below_caller, status.ACCESS_DENIED),)
    return CallRules(
        enable_partition_vtl=(
            (other_partition, status.INVALID_PARTITION_ID),
            (target_is_not_vtl1, profile.enable_partition_bad_target),
            (unsupported_partition_flags, status.INVALID_PARAMETER),
            (vsm_not_offered, status.ACCESS_DENIED),
            (partition_has_vtl1, profile.enable_partition_again),
        ),
        enable_vp_vtl=(
            (other_partition, status.INVALID_PARTITION_ID),
            (no_such_vp, status.INVALID_VP_INDEX),
            (target_is_not_vtl1, status.INVALID_PARAMETER),
            (partition_lacks_vtl1, profile.enable_vp_without_partition),
            (vtl0_may_not_start_this_vp, profile.enable_vp_not_allowed),
            (vp_has_vtl1, profile.enable_vp_again),
        ),
        start_virtual_processor=(
            (other_partition, status.INVALID_PARTITION_ID),
            (no_such_vp, status.INVALID_VP_INDEX),
            (starts_itself, status.INVALID_VP_INDEX),
            (start_vtl_above_caller, status.ACCESS_DENIED),
            (start_needs_vtl1, status.INVALID_VP_STATE),
            (lower_startup_denied, status.ACCESS_DENIED),
            (already_started, status.INVALID_VP_STATE),
        ),
        modify_vtl_protection_mask=(
            (other_partition, profile.protection_bad_partition),
            (reserved_input_vtl, status.INVALID_PARAMETER),
            *targets,
            (partition_lacks_vtl1, status.INVALID_VTL_STATE),
            (illegal_flags(profile.execute_bits), status.INVALID_REGISTER_VALUE),
            (own_protections_not_enabled, status.ACCESS_DENIED),
        ),
        get_vp_registers=(
            bad_partition,
            (no_such_vp, profile.other_vp_get or status.INVALID_VP_INDEX),
            (other_vp, profile.other_vp_get),
            *registers,
        ),
        set_vp_registers=(
            bad_partition,
            (no_such_vp, profile.other_vp_set or status.INVALID_VP_INDEX),
            (other_vp, profile.other_vp_set),
            *registers,
        ),
        translate_virtual_address=(
            (other_partition, profile.registers_bad_partition),
            (no_such_vp, profile.other_vp_get or status.INVALID_VP_INDEX),
            (other_vp, status.ACCESS_DENIED),
            (reserved_translate_vtl, status.INVALID_PARAMETER),
            *own,
            (translate_above_caller, status.INVALID_VP_STATE),
        ),
    )
