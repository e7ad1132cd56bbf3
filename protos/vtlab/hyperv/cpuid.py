"""Hypervisor CPUID leaves (TLFS, "Feature Discovery"; datatypes/hv_partition_privilege_mask)."""

from enum import IntFlag

HYPERVISOR_LEAVES = range(0x4000_0000, 0x4000_0100)

LEAF_VENDOR = 0x4000_0000
LEAF_INTERFACE = 0x4000_0001
LEAF_VERSION = 0x4000_0002
LEAF_FEATURES = 0x4000_0003
LEAF_HINTS = 0x4000_0004
LEAF_LIMITS = 0x4000_0005

# EBX, ECX, EDX of the vendor leaf: "Microsoft Hv". EAX of the interface leaf: "Hv#1".
VENDOR = (0x7263_694D, 0x666F_736F, 0x7648_2074)
INTERFACE = 0x3123_7648


class Privilege(IntFlag):
    """HV_PARTITION_PRIVILEGE_MASK: EAX is bits 31:0, EBX bits 63:32 of the features leaf."""

    ACCESS_VP_RUNTIME = 1 << 0
    ACCESS_TIME_REF_COUNT = 1 << 1
    ACCESS_SYNIC_REGISTERS = 1 << 2
    ACCESS_SYNTHETIC_TIMERS = 1 << 3
    ACCESS_APIC_MSRS = 1 << 4
    ACCESS_HYPERCALL_MSRS = 1 << 5
    ACCESS_VP_INDEX = 1 << 6
    ACCESS_RESET = 1 << 7
    ACCESS_REFERENCE_TSC = 1 << 9
    ACCESS_GUEST_IDLE = 1 << 10
    ACCESS_FREQUENCIES = 1 << 11
    POST_MESSAGES = 1 << 36
    SIGNAL_EVENTS = 1 << 37
    ACCESS_VSM = 1 << 48
    ACCESS_VP_REGISTERS = 1 << 49
    START_VIRTUAL_PROCESSOR = 1 << 53


class Feature(IntFlag):
    """EDX of the features leaf."""

    XMM_INPUT = 1 << 4
    GUEST_IDLE = 1 << 5
    FREQUENCY_MSRS = 1 << 8
    XMM_OUTPUT = 1 << 15
    SINT_POLLING = 1 << 17
    DIRECT_SYNTHETIC_TIMERS = 1 << 19


class Hint(IntFlag):
    """EAX of the hints leaf."""

    RESET_MSR = 1 << 4
    RELAXED_TIMING = 1 << 5
    CLUSTER_IPI = 1 << 10
    EX_PROCESSOR_MASKS = 1 << 11
