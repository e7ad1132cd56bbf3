"""Sections 3 and 4 while VTL0 is alone: what it may name and ask for. Ends with VTL1 enabled for the partition."""

from __future__ import annotations

import struct

from vtlab.hyperv.hypercalls import ANY_VP
from vtlab.hyperv.layouts import EnablePartitionVtlInput
from vtlab.hyperv.registers import HvRegister as N
from vtlab.v1 import registers_pb2 as r
from vtlab_conformance.calls import VTL0_TARGET, VTL1_TARGET, By, C, S, call, get, header, protect, put, row
from vtlab_conformance.layout import page
from vtlab_conformance.steps import Row

_ENABLE = "3 HvCallEnablePartitionVtl"
_ENABLE_VP = "3 HvCallEnableVpVtl"
_PROTECT = "3 HvCallModifyVtlProtectionMask"
_REGISTERS = "3 HvCallGetVpRegisters, HvCallSetVpRegisters"
_INSTALL = "3 HvCallInstallIntercept"
_STATE = "4 VSM registers"
OTHER_PARTITION = 7
NO_VP = 99


def enable(vtl: int, flags: int = 0, partition: int = (1 << 64) - 1) -> bytes:
    return EnablePartitionVtlInput(partition, vtl, flags).encode()


def _registers(by: By) -> list[Row]:
    other = by(S.INVALID_PARTITION_ID, S.ACCESS_DENIED, S.INVALID_PARTITION_ID)
    own = by(S.SUCCESS, S.ACCESS_DENIED, S.SUCCESS)
    cr0 = None if own else 0x8000_0011
    refused = (
        ("vina", N.VSM_VINA, 0, S.INVALID_PARAMETER, "VsmVina of VTL0"),
        ("config", N.VSM_PARTITION_CONFIG, 0, S.INVALID_PARAMETER, "VsmPartitionConfig of VTL0"),
        ("secure-config", N.VSM_VP_SECURE_CONFIG_VTL0, 0, S.ACCESS_DENIED, "VsmVpSecureConfigVtl0, asked for by VTL0"),
        ("tlb-lock", N.VSM_VP_WAIT_FOR_TLB_LOCK, 0, S.ACCESS_DENIED, "VsmVpWaitForTlbLock, asked for by VTL0"),
        ("event", N.PENDING_EVENT0, 0, S.INVALID_PARAMETER, "PendingEvent0 of the caller's own level"),
        ("intercepts", N.CR_INTERCEPT_CONTROL, 0, S.ACCESS_DENIED, "CrInterceptControl of VTL0"),
        ("mask", N.CR_INTERCEPT_CR4_MASK, 0, S.ACCESS_DENIED, "CrInterceptCr4Mask of VTL0"),
        ("above", N.VSM_VP_STATUS, VTL1_TARGET, S.ACCESS_DENIED, "any register of a level above the caller"),
        ("vtl15", N.VSM_VP_STATUS, 0x1F, S.ACCESS_DENIED, "any register of VTL 15"),
        ("reserved", N.VSM_VP_STATUS, 0x20, S.INVALID_PARAMETER, "reserved bits of HV_INPUT_VTL"),
        ("unknown", 0xFFFF_0000, 0, S.INVALID_PARAMETER, "a name that there is not"),
    )
    rows: list[Row] = []
    for short, name, target, status, rule in refused:
        rows.append(
            row(f"3.get.{short}", _REGISTERS, f"get: {rule}", "openvmm", get(name, status=status, target=target))
        )
        rows.append(row(f"3.set.{short}", _REGISTERS, f"set: {rule}", "openvmm", put(name, 0, status, target=target)))
    status_word = 1 << 16
    one, none = by(S.SUCCESS, S.ACCESS_DENIED, S.SUCCESS), by(S.INVALID_VP_INDEX, S.ACCESS_DENIED, S.INVALID_VP_INDEX)
    rows += [
        row(
            "3.get.partition",
            _REGISTERS,
            "get: another partition",
            "openvmm; KUT",
            get(N.VSM_VP_STATUS, status=other, partition=OTHER_PARTITION),
        ),
        row(
            "3.set.partition",
            _REGISTERS,
            "set: another partition",
            "openvmm; KUT",
            put(N.VSM_VINA, 0, other, partition=OTHER_PARTITION),
        ),
        row(
            "3.get.no-vp",
            _REGISTERS,
            "get: a VP that there is not",
            "openvmm; KUT",
            get(N.VSM_VP_STATUS, status=none, vp_index=NO_VP),
        ),
        row(
            "3.set.no-vp",
            _REGISTERS,
            "set: a VP that there is not",
            "openvmm; KUT",
            put(N.VSM_VINA, 0, S.INVALID_VP_INDEX, vp_index=NO_VP),
        ),
        row("3.get.any-vp", _REGISTERS, "get: HV_ANY_VP", "KUT", get(N.VSM_VP_STATUS, status=none, vp_index=ANY_VP)),
        row(
            "3.get.other-vp",
            _REGISTERS,
            "get: VsmVpStatus of another VP",
            "openvmm; TLFS",
            get(N.VSM_VP_STATUS, None if one else status_word, one, vp_index=1),
        ),
        row(
            "3.get.own-index",
            _REGISTERS,
            "get: the own VP, by its index",
            "TLFS",
            get(N.VSM_VP_STATUS, status_word, vp_index=0),
        ),
        row(
            "3.get.explicit",
            _REGISTERS,
            "get: the own level, named",
            "TLFS",
            get(N.VSM_VP_STATUS, status_word, target=VTL0_TARGET),
        ),
        row(
            "3.get.own-cr0",
            _REGISTERS,
            "get: CR0 of the caller's own level",
            "openvmm; KUT",
            get(r.REGISTER_NAME_CR0, cr0, own, mask=0x8000_0011),
        ),
        row(
            "3.set.own-tsc-aux",
            _REGISTERS,
            "set: TSC_AUX of the caller's own level, while there is none above",
            "openvmm; KUT",
            put(0x8007B, 0x1234, own),
            get(0x8007B, None if own else 0x1234, own),
        ),
        row(
            "3.set.read-only",
            _REGISTERS,
            "set: VsmVpStatus, which is read-only",
            "TLFS",
            put(N.VSM_VP_STATUS, 0, S.INVALID_PARAMETER),
        ),
    ]
    return rows


def _state(by: By) -> list[Row]:
    deny, mbec = by(1 << 46, 1 << 17, 1 << 46), by(1 << 48, 1 << 2, 1 << 48)
    return [
        row(
            "4.vp-status.vtl0",
            _STATE,
            "VsmVpStatus: VTL0 active, VTL0 alone enabled",
            "TLFS",
            get(N.VSM_VP_STATUS, 1 << 16),
        ),
        row(
            "4.partition-status.vtl0",
            _STATE,
            "VsmPartitionStatus: VTL0 alone enabled, VTL1 the highest possible",
            "TLFS",
            get(N.VSM_PARTITION_STATUS, 1 | 1 << 16),
        ),
        row(
            "4.capabilities",
            _STATE,
            "VsmCapabilities: DenyLowerVtlStartup and MBEC, bits counted from 0 or from 63",
            "openvmm, Linux; TLFS, KUT",
            get(N.VSM_CAPABILITIES, deny | mbec, mask=deny | mbec),
        ),
    ]


def _protection(by: By) -> list[Row]:
    pages = [page(0) >> 12]
    unset = by(S.ACCESS_DENIED, S.INVALID_PARAMETER, S.ACCESS_DENIED)
    other = by(S.INVALID_PARTITION_ID, S.ACCESS_DENIED, S.INVALID_PARTITION_ID)
    return [
        row("3.protect.vtl0", _PROTECT, "VTL0 for itself", "openvmm; TLFS", protect(pages, 0, unset, vtl=0)),
        row(
            "3.protect.vtl0-explicit",
            _PROTECT,
            "VTL0 for VTL0, named",
            "openvmm; TLFS",
            protect(pages, 0, unset, vtl=0, target=VTL0_TARGET),
        ),
        row(
            "3.protect.above",
            _PROTECT,
            "VTL0 for VTL1",
            "openvmm",
            protect(pages, 0, S.ACCESS_DENIED, vtl=0, target=VTL1_TARGET),
        ),
        row(
            "3.protect.partition",
            _PROTECT,
            "another partition",
            "openvmm; KUT",
            protect(pages, 0, other, vtl=0, partition=OTHER_PARTITION),
        ),
        row(
            "3.protect.reserved",
            _PROTECT,
            "reserved bits of HV_INPUT_VTL",
            "TLFS",
            protect(pages, 0, S.INVALID_PARAMETER, vtl=0, target=0x40),
        ),
    ]


def install(kind: int = 0, access: int = 3, parameter: int = 0x70, partition: int = (1 << 64) - 1) -> bytes:
    """HvCallInstallIntercept: type 0 is an I/O port."""
    return struct.pack("<QIIQ", partition, access, kind, parameter)


def _enable(by: By) -> list[Row]:
    bad = by(S.INVALID_PARAMETER, S.ACCESS_DENIED, S.INVALID_PARAMETER)
    again = by(S.INVALID_PARAMETER, S.INVALID_VTL_STATE, S.INVALID_PARAMETER)
    early = by(S.INVALID_VTL_STATE, S.INVALID_VTL_STATE, S.INVALID_PARAMETER)
    partition = C.ENABLE_PARTITION_VTL
    return [
        row(
            "3.install.partition",
            _INSTALL,
            "another partition",
            "TLFS",
            call(C.INSTALL_INTERCEPT, install(partition=OTHER_PARTITION), S.INVALID_PARTITION_ID),
        ),
        row(
            "3.install.early",
            _INSTALL,
            "before VTL1 is enabled",
            "openvmm",
            call(C.INSTALL_INTERCEPT, install(), S.INVALID_VTL_STATE),
        ),
        row(
            "3.enable-vp.early",
            _ENABLE_VP,
            "before the partition has that VTL",
            "openvmm; KUT",
            call(C.ENABLE_VP_VTL, header(vtl=1) + bytes(224), early),
        ),
        row(
            "3.enable.partition",
            _ENABLE,
            "another partition",
            "TLFS",
            call(partition, enable(1, partition=OTHER_PARTITION), S.INVALID_PARTITION_ID),
        ),
        row("3.enable.vtl0", _ENABLE, "VTL0", "openvmm; KUT", call(partition, enable(0), bad)),
        row(
            "3.enable.vtl2",
            _ENABLE,
            "a VTL above the highest possible",
            "openvmm; KUT",
            call(partition, enable(2), bad),
        ),
        row(
            "3.enable.shadow-stack",
            _ENABLE,
            "flag 1, supervisor shadow stack, without the capability",
            "openvmm",
            call(partition, enable(1, 2), S.INVALID_PARAMETER),
        ),
        row(
            "3.enable.hvpt",
            _ENABLE,
            "flag 2, HVPT, without the capability",
            "openvmm",
            call(partition, enable(1, 4), S.INVALID_PARAMETER),
        ),
        row(
            "3.enable.refused",
            _ENABLE,
            "calls that were refused changed nothing",
            "TLFS",
            get(N.VSM_PARTITION_STATUS, 1 | 1 << 16),
        ),
        row(
            "3.enable.vtl1",
            _ENABLE,
            "VTL1, input in registers; the active VTL stays",
            "TLFS",
            call(partition, enable(1), fast=True),
            get(N.VSM_VP_STATUS, 1 << 16),
        ),
        row(
            "3.enable.status", _ENABLE, "VsmPartitionStatus shows it", "TLFS", get(N.VSM_PARTITION_STATUS, 3 | 1 << 16)
        ),
        row("3.enable.again", _ENABLE, "VTL1 a second time", "openvmm; KUT", call(partition, enable(1), again)),
        row("3.install.vtl0", _INSTALL, "from VTL0", "openvmm", call(C.INSTALL_INTERCEPT, install(), S.ACCESS_DENIED)),
        row(
            "3.config.vtl0",
            _STATE,
            "VsmPartitionConfig of VTL1, from VTL0",
            "TLFS",
            put(N.VSM_PARTITION_CONFIG, 1, S.ACCESS_DENIED, target=VTL1_TARGET),
        ),
    ]


def rows(by: By) -> list[Row]:
    return [*_registers(by), *_state(by), *_protection(by), *_enable(by)]
