"""What VTL1 may read and write of VTL0 and of VSM, value by value (sections 3 and 4). VTL1 runs on the first VP."""

from __future__ import annotations

import struct

from vtlab.hyperv.layouts import RegisterAssociation
from vtlab.hyperv.registers import HvRegister as N
from vtlab.hyperv.vsm import CrInterceptControl
from vtlab.v1 import registers_pb2 as r
from vtlab.x86.registers import Msr
from vtlab_conformance import code
from vtlab_conformance.calls import VTL0_TARGET, VTL1_TARGET, By, C, S, call, get, header, put, read_msr, row, run
from vtlab_conformance.layout import NO_RAM, page
from vtlab_conformance.rows.before_vtl1 import OTHER_PARTITION, install
from vtlab_conformance.rows.vtl0_services import found, found_ex, translation
from vtlab_conformance.steps import Row

_REGISTERS = "3 HvCallGetVpRegisters, HvCallSetVpRegisters"
_STATE = "4 VSM registers"
_VALUES = "4 Values of registers"
_INSTALL = "3 HvCallInstallIntercept"
_TRANSLATE = "3 HvCallTranslateVirtualAddress(Ex)"
_BAD = S.INVALID_REGISTER_VALUE
_CANONICAL = 0xFFFF_8000_1234_5000
TSC_AUX, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, PAT = 0x8007B, 0x80009, 0x8000A, 0x8000B, 0x80002, 0x80004
SYSENTER_CS, SYSENTER_EIP, SYSENTER_ESP, STAR, APIC_BASE = 0x80005, 0x80006, 0x80007, 0x80008, 0x80003
SINT0 = 0xA0000

# name, register, value that the register takes, MSR that shows it in VTL0
_TAKEN = (
    ("star", STAR, 0x0013_0008_0000_0000, Msr.STAR),
    ("lstar", LSTAR, _CANONICAL, Msr.LSTAR),
    ("cstar", CSTAR, _CANONICAL + 1, Msr.CSTAR),
    ("sfmask", SFMASK, 0x47700, Msr.SFMASK),
    ("kernel-gs-base", KERNEL_GS_BASE, _CANONICAL + 2, Msr.KERNEL_GS_BASE),
    ("sysenter-cs", SYSENTER_CS, 8, Msr.SYSENTER_CS),
    ("sysenter-eip", SYSENTER_EIP, _CANONICAL + 3, Msr.SYSENTER_EIP),
    ("sysenter-esp", SYSENTER_ESP, _CANONICAL + 4, Msr.SYSENTER_ESP),
    ("tsc-aux", TSC_AUX, 7, Msr.TSC_AUX),
    ("pat", PAT, 0x0007_0406_0007_0406, Msr.PAT),
    ("sint3", SINT0 + 3, 0x1_0077, 0x4000_0093),
)
_NOT_CANONICAL = 0x8000_0000_0000_0000
_REFUSED = (
    ("lstar", LSTAR, _NOT_CANONICAL, "LSTAR that is not canonical"),
    ("cstar", CSTAR, _NOT_CANONICAL, "CSTAR that is not canonical"),
    ("kernel-gs-base", KERNEL_GS_BASE, _NOT_CANONICAL, "KERNEL_GS_BASE that is not canonical"),
    ("sysenter-eip", SYSENTER_EIP, _NOT_CANONICAL, "SYSENTER_EIP that is not canonical"),
    ("sysenter-esp", SYSENTER_ESP, _NOT_CANONICAL, "SYSENTER_ESP that is not canonical"),
    ("sfmask", SFMASK, 1 << 32, "SFMASK with reserved bits"),
    ("pat", PAT, 2, "PAT with a type that there is not"),
    ("efer", r.REGISTER_NAME_EFER, 1 << 40, "EFER with reserved bits"),
    ("cr4", r.REGISTER_NAME_CR4, 1 << 40, "CR4 with reserved bits"),
    ("cr0-high", r.REGISTER_NAME_CR0, 1 << 40 | 0x8000_0011, "CR0 with bits 63:32"),
    ("cr0-pg", r.REGISTER_NAME_CR0, 0x8000_0010, "CR0 with PG and without PE"),
    ("cr0-nw", r.REGISTER_NAME_CR0, 0xA000_0011, "CR0 with NW and without CD"),
    ("sint", SINT0 + 3, 5, "SINT3, not masked, with a vector below 16"),
    ("simp", 0xA0013, NO_RAM << 12 | 1, "SIMP where no memory is"),
    ("assist-page", N.VP_ASSIST_PAGE, NO_RAM << 12 | 1, "VP_ASSIST_PAGE where no memory is"),
    ("xfem", r.REGISTER_NAME_XFEM, 0, "XCR0 without x87"),
    ("cr8", r.REGISTER_NAME_CR8, 16, "CR8 above 15"),
    ("dr7", r.REGISTER_NAME_DR7, 1 << 40, "DR7 with bits 63:32"),
)


def _of_vtl0() -> list[Row]:
    rows = [
        row(
            f"4.set.{name}",
            _VALUES,
            "VTL1 writes a register of VTL0: VTL0 has it, VTL1 reads it",
            "TLFS",
            put(register, value, target=VTL0_TARGET, vtl=1),
            get(register, value, target=VTL0_TARGET, vtl=1),
            read_msr(msr, value),
            get(register, value, target=VTL0_TARGET, vtl=1),
        )
        for name, register, value, msr in _TAKEN
    ]
    rows += [
        row(
            f"4.bad.{name}",
            _VALUES,
            rule,
            "openvmm",
            put(register, value, _BAD, target=VTL0_TARGET, vtl=1),
        )
        for name, register, value, rule in _REFUSED
    ]
    rows += [
        row(
            "4.bad.kept",
            _VALUES,
            "what was refused changed nothing",
            "TLFS",
            read_msr(Msr.LSTAR, _CANONICAL),
            run(code.READ_CR0, 0x8000_0011, mask=0xA000_0011),
        ),
        row(
            "4.set.cr0",
            _VALUES,
            "CR0 of VTL0, from VTL1; reserved low bits are dropped",
            "openvmm",
            put(r.REGISTER_NAME_CR0, 0x8001_0033 | 1 << 6 | 1 << 20, target=VTL0_TARGET, vtl=1),
            run(code.READ_CR0, 0x8000_0011, mask=0x8010_0051),
            put(r.REGISTER_NAME_CR0, 0x8001_0033, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.set.dr7",
            _VALUES,
            "DR7 of VTL0, from VTL1",
            "TLFS",
            put(r.REGISTER_NAME_DR7, 0x700, target=VTL0_TARGET, vtl=1),
            get(r.REGISTER_NAME_DR7, 0x700, target=VTL0_TARGET, vtl=1),
            put(r.REGISTER_NAME_DR7, 0x400, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.get.sversion",
            _VALUES,
            "SVERSION of VTL0 is 1",
            "TLFS",
            get(0xA0011, 1, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.set.sversion",
            _VALUES,
            "SVERSION, which is read-only",
            "TLFS",
            put(0xA0011, 1, S.INVALID_PARAMETER, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.get.cs",
            _VALUES,
            "CS of VTL0: base, limit, selector and attributes in 16 bytes",
            "TLFS",
            get(r.REGISTER_NAME_CS, 8 << 96 | 0xA09B << 112, target=VTL0_TARGET, vtl=1, mask=0xF0FF_FFFF << 96),
        ),
        row(
            "4.set.apic-base-same",
            _VALUES,
            "APIC_BASE takes the value that it has",
            "openvmm",
            put(APIC_BASE, 0xFEE0_0900, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.set.apic-base-other",
            _VALUES,
            "and no other",
            "openvmm",
            put(APIC_BASE, 0xFEE0_0D00, S.INVALID_PARAMETER, target=VTL0_TARGET, vtl=1),
        ),
    ]
    return rows


def _list_of_two(by: By) -> Row:
    pairs = ((TSC_AUX, 9), (LSTAR, _NOT_CANONICAL))
    names = b"".join(struct.pack("<I", name) for name, _ in pairs)
    values = b"".join(value.to_bytes(16, "little") for _, value in pairs)
    data = by(*(b"".join(RegisterAssociation(*pair).encode() for pair in pairs),) * 2, names.ljust(16, b"\0") + values)
    return row(
        "4.set.list",
        _REGISTERS,
        "a list stops at the first register that is refused; what came before is done. Elements in rows, or in columns",
        "TLFS, openvmm; KUT",
        call(C.SET_VP_REGISTERS, header(vtl=VTL0_TARGET) + data, _BAD, count=2, reps=1, vtl=1),
        read_msr(Msr.TSC_AUX, 9),
    )


_OWN_VALUE, _OTHER_VALUE = 0x4000, 0xFFFF_8000_0000_4000


def _access(by: By) -> list[Row]:
    own = by(S.SUCCESS, S.ACCESS_DENIED, S.SUCCESS)
    other = by(S.INVALID_PARTITION_ID, S.ACCESS_DENIED, S.INVALID_PARTITION_ID)
    state = by(S.INVALID_VTL_STATE, S.ACCESS_DENIED, S.INVALID_VTL_STATE)
    other_get = by(S.SUCCESS, S.ACCESS_DENIED, S.SUCCESS)
    other_set = by(S.SUCCESS, S.INVALID_VP_INDEX, S.SUCCESS)
    written = by(_OTHER_VALUE, None, _OTHER_VALUE)
    state_set = by(S.INVALID_VTL_STATE, S.INVALID_VP_INDEX, S.INVALID_VTL_STATE)
    return [
        row(
            "4.get.own",
            _REGISTERS,
            "VTL1: CR0 of its own level",
            "openvmm; KUT",
            get(r.REGISTER_NAME_CR0, status=own, vtl=1),
        ),
        row(
            "4.set.own",
            _REGISTERS,
            "VTL1: TSC_AUX of its own level",
            "openvmm; KUT",
            put(TSC_AUX, 3, own, vtl=1),
        ),
        row(
            "4.set.own-below",
            _REGISTERS,
            "VTL0 does not write its own registers by hypercall when VTL1 is there",
            "openvmm; here in every profile, since it would pass by the intercepts",
            put(TSC_AUX, 3, S.ACCESS_DENIED),
        ),
        row(
            "4.get.vtl2",
            _REGISTERS,
            "VTL1: a level above",
            "openvmm",
            get(N.VSM_VP_STATUS, status=S.ACCESS_DENIED, target=0x12, vtl=1),
        ),
        row(
            "4.set.vtl2",
            _REGISTERS,
            "VTL1: a level above",
            "openvmm",
            put(N.VSM_VINA, 0, S.ACCESS_DENIED, target=0x12, vtl=1),
        ),
        row(
            "4.get.partition",
            _REGISTERS,
            "VTL1: another partition",
            "openvmm; KUT",
            get(LSTAR, status=other, partition=OTHER_PARTITION, vtl=1),
        ),
        row(
            "4.get.other-without",
            _REGISTERS,
            "CrInterceptControl of a VP that has no VTL1",
            "openvmm; TLFS",
            get(N.CR_INTERCEPT_CONTROL, status=state, vp_index=1, target=VTL1_TARGET, vtl=1),
        ),
        row(
            "4.set.other-without",
            _REGISTERS,
            "CrInterceptControl of a VP that has no VTL1",
            "openvmm; TLFS",
            put(N.CR_INTERCEPT_CONTROL, 0, state_set, vp_index=1, target=VTL1_TARGET, vtl=1),
        ),
        row(
            "4.get.other-registers",
            _REGISTERS,
            "LSTAR of another VP",
            "openvmm; TLFS",
            get(LSTAR, status=other_get, vp_index=1, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.set.other-registers",
            _REGISTERS,
            "LSTAR of another VP is written, and read back; that of the own VP is as it was",
            "openvmm; TLFS",
            put(LSTAR, _OWN_VALUE, target=VTL0_TARGET, vtl=1),
            put(LSTAR, _OTHER_VALUE, other_set, vp_index=1, target=VTL0_TARGET, vtl=1),
            get(LSTAR, written, other_get, vp_index=1, target=VTL0_TARGET, vtl=1),
            get(LSTAR, _OWN_VALUE, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.set.other-canonical",
            _REGISTERS,
            "LSTAR of another VP: not canonical",
            "openvmm; TLFS",
            put(LSTAR, _NOT_CANONICAL, by(_BAD, S.INVALID_VP_INDEX, _BAD), vp_index=1, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.install.port",
            _INSTALL,
            "VTL1 for an I/O port; access mask 0 takes it away",
            "openvmm",
            call(C.INSTALL_INTERCEPT, install(), vtl=1),
            call(C.INSTALL_INTERCEPT, install(access=0), vtl=1),
        ),
        row(
            "4.install.type",
            _INSTALL,
            "VTL1 for anything else",
            "openvmm",
            call(C.INSTALL_INTERCEPT, install(1), S.INVALID_PARAMETER, vtl=1),
        ),
        row(
            "4.install.access",
            _INSTALL,
            "an access that there is not",
            "openvmm",
            call(C.INSTALL_INTERCEPT, install(access=8), S.INVALID_PARAMETER, vtl=1),
        ),
        row(
            "4.install.number",
            _INSTALL,
            "a port above 0xFFFF",
            "TLFS",
            call(C.INSTALL_INTERCEPT, install(parameter=0x10000), S.INVALID_PARAMETER, vtl=1),
        ),
    ]


_ERROR, _PENDING = 1 << 8, 1


def _vsm() -> list[Row]:
    control = int(CrInterceptControl.CR0_WRITE | CrInterceptControl.CR4_WRITE)
    above = VTL0_TARGET
    events = (
        ("type", _PENDING | 1 << 1, "an event that is no exception"),
        ("vector", _PENDING | 32 << 16, "a vector that is no exception's"),
        ("nmi", _PENDING | 2 << 16, "NMI"),
        ("error", _PENDING | _ERROR | 3 << 16, "an error code for a vector that has none"),
    )
    return [
        row(
            "4.vina.value",
            _STATE,
            "VsmVina of VTL1 is read back",
            "TLFS",
            put(N.VSM_VINA, 0x3F1, vtl=1),
            get(N.VSM_VINA, 0x3F1, vtl=1),
            put(N.VSM_VINA, 0, vtl=1),
        ),
        row("4.vina.reserved", _STATE, "VsmVina with reserved bits", "openvmm", put(N.VSM_VINA, 1 << 11, _BAD, vtl=1)),
        row(
            "4.vina.vtl0",
            _STATE,
            "VsmVina of VTL0, from VTL1",
            "openvmm",
            put(N.VSM_VINA, 0, S.INVALID_PARAMETER, target=above, vtl=1),
        ),
        row(
            "4.wait.value", _STATE, "VsmVpWaitForTlbLock is written", "TLFS", put(N.VSM_VP_WAIT_FOR_TLB_LOCK, 1, vtl=1)
        ),
        row(
            "4.intercepts.value",
            _STATE,
            "CrInterceptControl is read back",
            "TLFS",
            put(N.CR_INTERCEPT_CONTROL, control, vtl=1),
            get(N.CR_INTERCEPT_CONTROL, control, vtl=1),
            put(N.CR_INTERCEPT_CONTROL, 0, vtl=1),
        ),
        row(
            "4.intercepts.reads",
            _STATE,
            "intercepts of reads",
            "openvmm",
            put(N.CR_INTERCEPT_CONTROL, int(CrInterceptControl.LSTAR_READ), _BAD, vtl=1),
        ),
        row(
            "4.intercepts.reserved",
            _STATE,
            "CrInterceptControl with reserved bits",
            "TLFS",
            put(N.CR_INTERCEPT_CONTROL, 1 << 40, _BAD, vtl=1),
        ),
        row(
            "4.intercepts.vtl0",
            _STATE,
            "CrInterceptControl of VTL0, from VTL1",
            "openvmm",
            put(N.CR_INTERCEPT_CONTROL, 0, S.ACCESS_DENIED, target=above, vtl=1),
        ),
        row(
            "4.masks.value",
            _STATE,
            "CrInterceptCr4Mask is read back",
            "TLFS",
            put(N.CR_INTERCEPT_CR4_MASK, 1 << 20, vtl=1),
            get(N.CR_INTERCEPT_CR4_MASK, 1 << 20, vtl=1),
        ),
        row(
            "4.secure.shadow-stack",
            _STATE,
            "VsmVpSecureConfigVtl0, bit 2",
            "openvmm",
            put(N.VSM_VP_SECURE_CONFIG_VTL0, 4, _BAD, vtl=1),
        ),
        row(
            "4.secure.hvpt",
            _STATE,
            "VsmVpSecureConfigVtl0, bit 3",
            "openvmm",
            put(N.VSM_VP_SECURE_CONFIG_VTL0, 8, _BAD, vtl=1),
        ),
        row(
            "4.secure.mbec",
            _STATE,
            "VsmVpSecureConfigVtl0: MBEC that the partition does not have",
            "openvmm",
            put(N.VSM_VP_SECURE_CONFIG_VTL0, 1, _BAD, vtl=1),
        ),
        row(
            "4.secure.lock",
            _STATE,
            "VsmVpSecureConfigVtl0: the lock is read back; a return releases it",
            "TLFS",
            put(N.VSM_VP_SECURE_CONFIG_VTL0, 2, vtl=1),
            get(N.VSM_VP_SECURE_CONFIG_VTL0, 2, vtl=1),
            run(code.RET),
            get(N.VSM_VP_SECURE_CONFIG_VTL0, 0, vtl=1),
        ),
        *(
            row(
                f"4.event.{name}",
                _STATE,
                f"PendingEvent0: {rule}",
                "openvmm",
                put(N.PENDING_EVENT0, value, _BAD, target=above, vtl=1),
            )
            for name, value, rule in events
        ),
        row(
            "4.event.own",
            _STATE,
            "PendingEvent0 of the own level",
            "openvmm",
            put(N.PENDING_EVENT0, 0, S.INVALID_PARAMETER, vtl=1),
        ),
        row(
            "4.event.none",
            _STATE,
            "PendingEvent0 with nothing pending",
            "TLFS",
            put(N.PENDING_EVENT0, 0, target=above, vtl=1),
        ),
        row(
            "4.unknown.vtl1",
            _REGISTERS,
            "VTL1: a name that there is not",
            "openvmm",
            get(0xFFFF_0000, status=S.INVALID_PARAMETER, target=above, vtl=1),
            put(0xFFFF_0000, 0, S.INVALID_PARAMETER, target=above, vtl=1),
        ),
    ]


def _translate(by: By) -> list[Row]:
    one, two = C.TRANSLATE_VIRTUAL_ADDRESS, C.TRANSLATE_VIRTUAL_ADDRESS_EX
    above = by(S.INVALID_VP_STATE, S.ACCESS_DENIED, S.INVALID_VP_STATE)
    gpa = page(3)
    return [
        row(
            "4.translate.vtl0",
            _TRANSLATE,
            "VTL1 walks the tables of VTL0",
            "TLFS",
            call(one, translation(gpa, target=VTL0_TARGET), vtl=1, output=found(gpa)),
        ),
        row(
            "4.translate-ex.vtl0",
            _TRANSLATE,
            "Ex: VTL1 walks the tables of VTL0",
            "TLFS",
            call(two, translation(gpa, target=VTL0_TARGET), vtl=1, output=found_ex(gpa)),
        ),
        row(
            "4.translate.user",
            _TRANSLATE,
            "a user access to a supervisor page: result 2",
            "TLFS",
            call(one, translation(gpa, 1 | 1 << 7, VTL0_TARGET), vtl=1, output=struct.pack("<I", 2)),
        ),
        row(
            "4.translate.exempt",
            _TRANSLATE,
            "privilege exempt: the walk alone counts",
            "TLFS",
            call(one, translation(gpa, 1 | 1 << 3 | 1 << 7, VTL0_TARGET), vtl=1, output=found(gpa)),
        ),
        row(
            "4.translate.absent",
            _TRANSLATE,
            "an address that is not mapped: result 1",
            "TLFS",
            call(one, translation(1 << 46, target=VTL0_TARGET), vtl=1, output=struct.pack("<I", 1)),
        ),
        row(
            "4.translate.vtl2",
            _TRANSLATE,
            "a level above VTL1",
            "openvmm; KUT",
            call(one, translation(gpa, target=0x12), above, vtl=1),
        ),
    ]


def rows(by: By) -> list[Row]:
    return [*_access(by), *_of_vtl0(), _list_of_two(by), *_vsm(), *_translate(by)]
