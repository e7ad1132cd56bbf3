"""VTL1 on the first VP: how it comes to life, calls and returns, what levels share and what each has of its own."""

from __future__ import annotations

import struct

from vtlab.hyperv.hypercalls import ANY_VP
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.registers import HvRegister as N
from vtlab.x86.registers import Cr4, Msr
from vtlab_conformance import code
from vtlab_conformance.calls import (
    UD,
    By,
    C,
    S,
    call,
    get,
    header,
    read_msr,
    row,
    run,
    write_msr,
)
from vtlab_conformance.image import symbols
from vtlab_conformance.layout import AFTER, ASSIST_PAGE, BEFORE, ENTERED, HYPERCALL_PAGE, LEAVING, STATUS, report
from vtlab_conformance.rows.before_vtl1 import NO_VP, OTHER_PARTITION, enable
from vtlab_conformance.rows.vtl0_services import enable_vp
from vtlab_conformance.steps import Put, Row, See, Step

_ENABLE = "3 HvCallEnablePartitionVtl"
_ENABLE_VP = "3 HvCallEnableVpVtl"
_SWITCH = "4 VTL call and return"
_PRIVATE = "4 Private and shared state"
_STATE = "4 VSM registers"
_STACK = 8192


def _enable(by: By) -> list[Row]:
    early = by(S.ACCESS_DENIED, S.ACCESS_DENIED, S.INVALID_PARAMETER)
    page = C.ENABLE_VP_VTL
    return [
        row("3.enable.slow", _ENABLE, "VTL1, input in memory", "TLFS; KUT", call(C.ENABLE_PARTITION_VTL, enable(1))),
        row(
            "3.enable-vp.partition",
            _ENABLE_VP,
            "another partition",
            "openvmm; KUT",
            call(page, header(OTHER_PARTITION, vtl=1) + bytes(224), S.INVALID_PARTITION_ID),
        ),
        row(
            "3.enable-vp.no-vp",
            _ENABLE_VP,
            "a VP that there is not",
            "openvmm; KUT",
            call(page, header(vp_index=NO_VP, vtl=1) + bytes(224), S.INVALID_VP_INDEX),
        ),
        row(
            "3.enable-vp.any-vp",
            _ENABLE_VP,
            "HV_ANY_VP",
            "openvmm",
            call(page, header(vp_index=ANY_VP, vtl=1) + bytes(224), S.INVALID_VP_INDEX),
        ),
        row(
            "3.enable-vp.vtl0",
            _ENABLE_VP,
            "VTL0",
            "openvmm",
            call(page, header(vtl=0) + bytes(224), S.INVALID_PARAMETER),
        ),
        row(
            "3.enable-vp.vtl2",
            _ENABLE_VP,
            "a VTL above the highest possible",
            "openvmm; KUT",
            call(page, header(vtl=2) + bytes(224), S.INVALID_PARAMETER),
        ),
        row(
            "3.enable-vp.other-first",
            _ENABLE_VP,
            "VTL0 may enable VTL1 on its own VP alone",
            "openvmm; KUT",
            enable_vp(1, 1, early),
        ),
        row(
            "3.enable-vp.self",
            _ENABLE_VP,
            "VTL1 on the own VP; it is not entered by that",
            "TLFS",
            enable_vp(0, 1),
            get(N.VSM_VP_STATUS, 3 << 16),
        ),
        row(
            "3.enable-vp.vtl0-again",
            _ENABLE_VP,
            "VTL0, once a VP has VTL1: the rest is VTL1's to enable",
            "openvmm; KUT",
            enable_vp(0, 1, early),
        ),
    ]


def _pattern(first: int) -> bytes:
    """Registers of a block: 16 general ones, XMM0 to XMM5."""
    return struct.pack("<28Q", *(first + 0x0101 * number for number in range(28)))


# All registers of a block but RAX, RCX (what the switch itself uses), RDX and R8 (what RUN sets) and RSP.
_KEPT = b"\0" * 24 + b"\xff" * 8 + b"\0" * 8 + b"\xff" * 24 + b"\0" * 8 + b"\xff" * 56 + b"\xff" * 96


def _switches() -> list[Row]:
    before, entered, leaving = report(0) + BEFORE, report(1) + ENTERED, report(1) + LEAVING
    after, status = report(0) + AFTER, report(1) + STATUS
    stack = symbols()["stacks"] + 2 * _STACK
    return [
        row(
            "4.call.first",
            _SWITCH,
            "the first VTL call starts VTL1 with its context, shared registers pass",
            "TLFS",
            Put(at=before, data=_pattern(0x5100)),
            run(code.VTL_CALL, rdx=0xD0D0, r8=0x8080),
            See(at=entered, value=_pattern(0x5100), mask=_KEPT),
            See(at=entered + 16, value=struct.pack("<Q", 0xD0D0)),
            See(at=entered + 32, value=struct.pack("<Q", stack)),
            See(at=status, value=struct.pack("<QQ", 1, 0)),
        ),
        row(
            "4.return.first",
            _SWITCH,
            "the VTL return brings them back; VTL0 goes on behind its call",
            "TLFS",
            See(at=after, value=_pattern(0x5100), mask=_KEPT),
            See(at=after + 16, value=struct.pack("<Q", 0xD0D0)),
        ),
        row(
            "4.return.fast",
            _SWITCH,
            "a fast return leaves RAX and RCX as they are: control input and code of the return",
            "TLFS, openvmm",
            run(code.VTL_CALL, 1),
            See(at=after + 8, value=struct.pack("<Q", C.VTL_RETURN)),
        ),
        row(
            "4.call.registers",
            _SWITCH,
            "RAX is the control input of the call, RCX its code, when VTL1 goes on",
            "TLFS",
            run(code.VTL_CALL),
            See(at=entered, value=struct.pack("<QQ", 0, C.VTL_CALL)),
        ),
        row(
            "4.call.reason",
            _SWITCH,
            "the assist page of VTL1 says that it is a call",
            "TLFS",
            run(code.VTL_CALL),
            See(at=report(1) + ASSIST_PAGE + 8, value=struct.pack("<I", 1), vtl=1),
        ),
        row(
            "4.return.slow",
            _SWITCH,
            "a return that is not fast loads RAX and RCX from the assist page",
            "TLFS",
            Put(at=leaving, data=struct.pack("<QQ", 0xAAA1, 0xCCC2)),
            run(code.VTL_CALL, 0xAAA1),
            See(at=after + 8, value=struct.pack("<Q", 0xCCC2)),
            Put(at=leaving, data=bytes(16)),
        ),
        row(
            "4.call.control",
            _SWITCH,
            "a call with control input 1 is #UD",
            "TLFS",
            run(code.VTL_CALL, vector=UD, rcx=1),
        ),
        row(
            "4.return.vtl0",
            _SWITCH,
            "a return from VTL0 is #UD, also when VTL1 is there",
            "TLFS",
            run(code.VTL_RETURN, vector=UD),
        ),
        row(
            "4.call.highest",
            _SWITCH,
            "a call from the highest level is #UD",
            "TLFS",
            run(code.VTL_CALL, vector=UD, vtl=1),
        ),
        row(
            "4.return.control",
            _SWITCH,
            "a return with control input 2 is #UD",
            "TLFS",
            run(code.VTL_RETURN, vector=UD, rcx=2, vtl=1),
        ),
        row(
            "4.call.bits",
            _SWITCH,
            "a call code with other bits of the input value is #UD",
            "TLFS",
            run(code.CALL_PAGE, vector=UD, rcx=C.VTL_CALL | 1 << 16),
        ),
        row(
            "4.vp-status.vtl1",
            _STATE,
            "VsmVpStatus in VTL1: VTL1 active, both enabled",
            "TLFS",
            get(N.VSM_VP_STATUS, 1 | 3 << 16, vtl=1),
        ),
    ]


_PRIVATE_MSRS = {
    "star": (Msr.STAR, 0x0013_0008_0000_0000, 0x0023_0018_0000_0000),
    "lstar": (Msr.LSTAR, 0xFFFF_8000_0000_1000, 0xFFFF_8000_0000_2000),
    "cstar": (Msr.CSTAR, 0x1000, 0x2000),
    "sfmask": (Msr.SFMASK, 0x200, 0x700),
    "kernel-gs-base": (Msr.KERNEL_GS_BASE, 0x11000, 0x22000),
    "sysenter-cs": (Msr.SYSENTER_CS, 0x10, 0x20),
    "sysenter-esp": (Msr.SYSENTER_ESP, 0x3000, 0x4000),
    "sysenter-eip": (Msr.SYSENTER_EIP, 0x5000, 0x6000),
    "pat": (Msr.PAT, 0x0007_0406_0007_0406, 0x0007_0405_0007_0406),
    "tsc-aux": (Msr.TSC_AUX, 1, 2),
    "fs-base": (0xC000_0100, 0x7000, 0x8000),
    "tpr": (HvMsr.TPR, 0x10, 0x20),
    "sint5": (HvMsr.SINT0 + 5, 0x1_0055, 0x1_0066),
    "scontrol": (HvMsr.SCONTROL, 1, 0),
    "stimer1-config": (HvMsr.STIMER0_CONFIG + 2, 0x3_0000, 0x4_0000),
}


def _private() -> list[Row]:
    rows = [
        row(
            f"4.private.{name}",
            _PRIVATE,
            f"MSR {index:#x} is each level's own",
            "TLFS",
            write_msr(index, low),
            write_msr(index, high, vtl=1),
            read_msr(index, low),
            read_msr(index, high, vtl=1),
            # The SynIC and the APIC of VTL1 are wanted later, as they were.
            _undo(index, low, high),
        )
        for name, (index, low, high) in _PRIVATE_MSRS.items()
    ]
    smep = int(Cr4.SMEP)
    rows += [
        row(
            "4.private.cr4",
            _PRIVATE,
            "CR4 is each level's own",
            "TLFS",
            run(code.CHANGE_CR4, smep, mask=smep, rdx=smep, vtl=1),
            run(code.READ_CR4, 0, mask=smep),
            run(code.READ_CR4, smep, mask=smep, vtl=1),
            run(code.CHANGE_CR4, 0, mask=smep, rdx=smep, vtl=1),
        ),
        row(
            "4.private.hypercall-page",
            _PRIVATE,
            "each level has a hypercall page and an identity of its own",
            "TLFS",
            read_msr(HvMsr.HYPERCALL, _page_of(0)),
            read_msr(HvMsr.HYPERCALL, _page_of(1), vtl=1),
        ),
        row(
            "4.private.assist-page",
            _PRIVATE,
            "and an assist page",
            "TLFS",
            read_msr(HvMsr.VP_ASSIST_PAGE, report(0) + ASSIST_PAGE | 1),
            read_msr(HvMsr.VP_ASSIST_PAGE, report(1) + ASSIST_PAGE | 1, vtl=1),
        ),
        row(
            "4.shared.cr2",
            _PRIVATE,
            "CR2 is shared",
            "TLFS",
            run(code.WRITE_CR2, rdx=0xC2C2),
            run(code.READ_CR2, 0xC2C2, vtl=1),
        ),
        row(
            "4.shared.dr0",
            _PRIVATE,
            "DR0 to DR3 are shared",
            "TLFS",
            run(code.WRITE_DR0, rdx=0xD0D0, vtl=1),
            run(code.READ_DR0, 0xD0D0),
        ),
        row(
            "4.shared.vp-index",
            _PRIVATE,
            "VP_INDEX is shared",
            "TLFS",
            read_msr(HvMsr.VP_INDEX, 0),
            read_msr(HvMsr.VP_INDEX, 0, vtl=1),
        ),
        row(
            "4.shared.memory",
            _PRIVATE,
            "both levels see the same memory",
            "TLFS",
            Put(at=_SHARED, data=b"from VTL1", vtl=1),
            See(at=_SHARED, value=b"from VTL1"),
        ),
    ]
    return rows


_SHARED = 0x7FF000
_RESTORED = {HvMsr.TPR: 0, HvMsr.SCONTROL: 1, HvMsr.SINT0 + 5: 0x1_0000, HvMsr.STIMER0_CONFIG + 2: 0}


def _undo(index: int, _low: int, _high: int) -> list[Step]:
    value = _RESTORED.get(index)
    return [] if value is None else [*write_msr(index, value), *write_msr(index, value, vtl=1)]


def _page_of(vtl: int) -> int:
    address: int = report(vtl) + HYPERCALL_PAGE
    return address | 1


def rows(by: By) -> list[Row]:
    return [*_enable(by), *_switches(), *_private()]
