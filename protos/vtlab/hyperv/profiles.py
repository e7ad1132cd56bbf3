"""Where the sources on VSM disagree: one table of differences, one profile for each source.

`tlfs` is the specification's text, `openvmm` Microsoft's open-source hypervisor front end, `kvm` the KVM and QEMU work
with its public unit test. Each row of DIFFERENCES is a question that code asks, with each profile's answer; a profile
is the column. docs/vsm-profiles.md shows the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from vtlab.hyperv.status import HvStatus


class ProtectionTarget(Enum):
    """Which level HvCallModifyVtlProtectionMask names."""

    IMPOSING = "the level that imposes the rights"
    RESTRICTED = "the level whose rights are restricted"


class ExecuteBits(Enum):
    """What bits 2 and 3 of the page rights mean without MBEC."""

    EQUAL = "bit 2 is kernel, bit 3 user execution, and both must agree"
    EITHER = "executable if one of them is set"


@dataclass(frozen=True, slots=True)
class VsmProfile:
    """The answers of one source; see DIFFERENCES for the questions."""

    name: str
    reserved_input_bits: HvStatus
    no_repetitions: HvStatus
    register_columns: bool
    capabilities_from_top: bool
    execute_bits: ExecuteBits
    protection_target: ProtectionTarget
    protection_bad_partition: HvStatus
    enable_partition_bad_target: HvStatus
    enable_partition_again: HvStatus
    enable_vp_without_partition: HvStatus
    enable_vp_not_allowed: HvStatus
    enable_vp_again: HvStatus
    registers_bad_partition: HvStatus
    other_vp_get: HvStatus
    other_vp_set: HvStatus
    own_registers: bool
    config_change: HvStatus
    vp_without_mbec: HvStatus
    translate_own: bool
    ipi_to_higher: HvStatus
    memory_message_size: int
    branch_length_in_execute_message: bool
    local_apic_enabled: bool


class Difference(NamedTuple):
    """`field` is the attribute of VsmProfile; the answers are in the order of PROFILES."""

    field: str
    question: str
    tlfs: object
    openvmm: object
    kvm: object


_S = HvStatus
DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "reserved_input_bits",
        "A reserved bit of the hypercall input value is set",
        _S.INVALID_HYPERCALL_INPUT,
        _S.SUCCESS,
        _S.SUCCESS,
    ),
    Difference(
        "no_repetitions",
        "HvCallGet/SetVpRegisters with a rep count of 0",
        _S.INVALID_HYPERCALL_INPUT,
        _S.INVALID_HYPERCALL_INPUT,
        _S.SUCCESS,
    ),
    Difference("register_columns", "HvCallSetVpRegisters: all names, then all values", False, False, True),
    Difference("capabilities_from_top", "Bits of VsmCapabilities count from the top", True, False, True),
    Difference(
        "execute_bits",
        "Bits 2 and 3 of page rights without MBEC",
        ExecuteBits.EQUAL,
        ExecuteBits.EQUAL,
        ExecuteBits.EITHER,
    ),
    Difference(
        "protection_target",
        "Target VTL of HvCallModifyVtlProtectionMask, where it is given",
        ProtectionTarget.RESTRICTED,
        ProtectionTarget.IMPOSING,
        ProtectionTarget.RESTRICTED,
    ),
    Difference(
        "protection_bad_partition",
        "HvCallModifyVtlProtectionMask for another partition",
        _S.INVALID_PARTITION_ID,
        _S.ACCESS_DENIED,
        _S.INVALID_PARTITION_ID,
    ),
    Difference(
        "enable_partition_bad_target",
        "HvCallEnablePartitionVtl for a VTL that cannot be enabled",
        _S.INVALID_PARAMETER,
        _S.ACCESS_DENIED,
        _S.INVALID_PARAMETER,
    ),
    Difference(
        "enable_partition_again",
        "HvCallEnablePartitionVtl for a VTL that is enabled",
        _S.INVALID_PARAMETER,
        _S.INVALID_VTL_STATE,
        _S.INVALID_PARAMETER,
    ),
    Difference(
        "enable_vp_without_partition",
        "HvCallEnableVpVtl before the partition has that VTL",
        _S.INVALID_VTL_STATE,
        _S.INVALID_VTL_STATE,
        _S.INVALID_PARAMETER,
    ),
    Difference(
        "enable_vp_not_allowed",
        "HvCallEnableVpVtl by VTL0 for a VP that VTL1 has to enable",
        _S.ACCESS_DENIED,
        _S.ACCESS_DENIED,
        _S.INVALID_PARAMETER,
    ),
    Difference(
        "enable_vp_again",
        "HvCallEnableVpVtl for a VP that has it",
        _S.VTL_ALREADY_ENABLED,
        _S.VTL_ALREADY_ENABLED,
        _S.INVALID_PARAMETER,
    ),
    Difference(
        "registers_bad_partition",
        "HvCallGet/SetVpRegisters for another partition",
        _S.INVALID_PARTITION_ID,
        _S.ACCESS_DENIED,
        _S.INVALID_PARTITION_ID,
    ),
    Difference("other_vp_get", "HvCallGetVpRegisters for another VP", _S.SUCCESS, _S.ACCESS_DENIED, _S.SUCCESS),
    Difference("other_vp_set", "HvCallSetVpRegisters for another VP", _S.SUCCESS, _S.INVALID_VP_INDEX, _S.SUCCESS),
    Difference("own_registers", "A level may name its own architectural registers", True, False, True),
    Difference(
        "config_change",
        "The default mask of VsmPartitionConfig is changed after protections were enabled",
        _S.INVALID_REGISTER_VALUE,
        _S.INVALID_REGISTER_VALUE,
        _S.SUCCESS,
    ),
    Difference(
        "vp_without_mbec",
        "VsmVpSecureConfigVtl0 without MBEC, where the partition has it",
        _S.SUCCESS,
        _S.INVALID_REGISTER_VALUE,
        _S.SUCCESS,
    ),
    Difference("translate_own", "HvCallTranslateVirtualAddress for the caller's own level", True, False, True),
    Difference(
        "ipi_to_higher",
        "HvCallSendSyntheticClusterIpi from VTL0 to VTL1",
        _S.ACCESS_DENIED,
        _S.ACCESS_DENIED,
        _S.SUCCESS,
    ),
    Difference("memory_message_size", "Bytes of the memory-intercept message", 240, 80, 240),
    Difference(
        "branch_length_in_execute_message",
        "An execute intercept gives the length of the instruction that branched",
        False,
        False,
        True,
    ),
    Difference("local_apic_enabled", "The local APIC of a new VTL1 is software-enabled", False, False, True),
)


def _profile(name: str) -> VsmProfile:
    answers = {row.field: getattr(row, name) for row in DIFFERENCES}
    return VsmProfile(name=name, **answers)


PROFILES = {name: _profile(name) for name in ("tlfs", "openvmm", "kvm")}
DEFAULT_PROFILE = PROFILES["openvmm"]
"""What shipping guests meet."""
