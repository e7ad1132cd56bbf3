"""Section 5: intercepts of registers, MSRs and ports, each with the message that VTL1 gets."""

from __future__ import annotations

import struct

from vtlab.hyperv.messages import READ, WRITE, InterceptType
from vtlab.hyperv.registers import HvRegister as N
from vtlab.hyperv.vsm import CrInterceptControl as Control
from vtlab.v1 import registers_pb2 as r
from vtlab.x86.registers import Cr0, Cr4, Msr
from vtlab_conformance import code
from vtlab_conformance.calls import By, C, call, put, read_msr, row, run, write_msr
from vtlab_conformance.layout import Answer, code_page, page
from vtlab_conformance.rows.before_vtl1 import install
from vtlab_conformance.rows.protection import fields, forget, messages
from vtlab_conformance.steps import Row, SetAnswer, Step

_CR = "5 Control-register intercepts"
_MSR = "5 MSR intercepts"
_TABLES = "5 Descriptor-table intercepts"
_PORT = "5 I/O-port intercepts"
_POINTER = page(32)
_DIAGNOSTIC = 0x80
_OTHER_TASK = 0x38


def _watch(control: int, cr0: int = 0, cr4: int = 0, misc: int = 0) -> list[Step]:
    return [
        *put(N.CR_INTERCEPT_CR0_MASK, cr0, vtl=1),
        *put(N.CR_INTERCEPT_CR4_MASK, cr4, vtl=1),
        *put(N.CR_INTERCEPT_MISC_ENABLE_MASK, misc, vtl=1),
        *put(N.CR_INTERCEPT_CONTROL, control, vtl=1),
    ]


def _header(rip: int, length: int, access: int = WRITE) -> tuple[tuple[int, bytes], ...]:
    return (0, struct.pack("<IBB", 0, length, access)), (24, struct.pack("<Q", rip))


def _skip() -> list[Step]:
    return [*forget(), SetAnswer(answer=Answer.SKIP)]


def _control_registers() -> list[Row]:
    wp, am, smep, pce = int(Cr0.WP), int(Cr0.AM), int(Cr4.SMEP), int(Cr4.PCE)
    at = code_page(0) + code.CHANGE_CR_AT
    kind = InterceptType.REGISTER_INTERCEPT
    plain_cr0, osxsave = 0x8001_0033, int(Cr4.OSXSAVE)
    return [
        row(
            "5.cr0.watched",
            _CR,
            "a watched bit of CR0 changes: a message with name and value, and the write is not done",
            "TLFS, openvmm",
            _skip(),
            _watch(Control.CR0_WRITE, cr0=wp),
            run(code.CHANGE_CR0, wp, mask=wp, rdx=wp),
            messages(1),
            fields(kind, *_header(at, 3), (40, b"\0"), (44, struct.pack("<IQ", r.REGISTER_NAME_CR0, plain_cr0 & ~wp))),
        ),
        row(
            "5.cr0.other-bit",
            _CR,
            "a bit outside the mask: no message",
            "openvmm",
            forget(),
            run(code.CHANGE_CR0, am, mask=am, rdx=am),
            run(code.CHANGE_CR0, 0, mask=am, rdx=am),
            messages(0),
        ),
        row(
            "5.cr0.same",
            _CR,
            "a write of the same value, all bits watched: no message",
            "openvmm",
            forget(),
            _watch(Control.CR0_WRITE | Control.LSTAR_WRITE, cr0=(1 << 64) - 1),
            run(code.CHANGE_CR0, wp, mask=wp),
            messages(0),
        ),
        row(
            "5.cr0.mask-0",
            _CR,
            "a control bit with a mask of 0 never fires",
            "openvmm",
            forget(),
            _watch(Control.CR0_WRITE),
            run(code.CHANGE_CR0, 0, mask=wp, rdx=wp),
            run(code.CHANGE_CR0, wp, mask=wp, rdx=wp),
            messages(0),
        ),
        row(
            "5.cr4.watched",
            _CR,
            "a watched bit of CR4 changes",
            "TLFS, openvmm",
            _skip(),
            _watch(Control.CR4_WRITE, cr4=smep),
            run(code.CHANGE_CR4, 0, mask=smep, rdx=smep),
            messages(1),
            fields(kind, *_header(at, 3), (44, struct.pack("<I", r.REGISTER_NAME_CR4))),
        ),
        row(
            "5.cr4.other-bit",
            _CR,
            "a bit outside the mask: no message",
            "openvmm",
            forget(),
            run(code.CHANGE_CR4, pce, mask=pce, rdx=pce),
            run(code.CHANGE_CR4, 0, mask=pce, rdx=pce),
            messages(0),
        ),
        row(
            "5.cr4.released",
            _CR,
            "VTL1 takes the intercept away: the instruction runs again and is done",
            "TLFS",
            forget(),
            SetAnswer(answer=Answer.UNWATCH),
            run(code.CHANGE_CR4, smep, mask=smep, rdx=smep),
            run(code.CHANGE_CR4, 0, mask=smep, rdx=smep),
            messages(1),
        ),
        row(
            "5.cr4.own",
            _CR,
            "VTL1's own writes are not intercepted",
            "TLFS",
            _skip(),
            _watch(Control.CR4_WRITE, cr4=smep),
            run(code.CHANGE_CR4, smep, mask=smep, rdx=smep, vtl=1),
            run(code.CHANGE_CR4, 0, mask=smep, rdx=smep, vtl=1),
            messages(0),
        ),
        row(
            "5.xcr0",
            _CR,
            "XCR0, which has no mask: every write",
            "TLFS, openvmm",
            _watch(Control.XCR0_WRITE),
            run(code.CHANGE_CR4, rdx=osxsave),
            _skip(),
            run(code.XSETBV, r8=1),
            messages(1),
            fields(kind, *_header(code_page(0) + code.XSETBV_AT, 3), (44, struct.pack("<IQ", r.REGISTER_NAME_XFEM, 1))),
            run(code.CHANGE_CR4, rdx=osxsave),
        ),
    ]


_MSRS = (
    ("lstar", Control.LSTAR_WRITE, Msr.LSTAR, 0xFFFF_8000_0000_1000),
    ("star", Control.STAR_WRITE, Msr.STAR, 0x0013_0008_0000_0000),
    ("cstar", Control.CSTAR_WRITE, Msr.CSTAR, 0xFFFF_8000_0000_3000),
    ("sfmask", Control.SFMASK_WRITE, Msr.SFMASK, 0x47700),
    ("sysenter-cs", Control.SYSENTER_CS_WRITE, Msr.SYSENTER_CS, 8),
    ("sysenter-eip", Control.SYSENTER_EIP_WRITE, Msr.SYSENTER_EIP, 0x1000),
    ("sysenter-esp", Control.SYSENTER_ESP_WRITE, Msr.SYSENTER_ESP, 0x2000),
    ("tsc-aux", Control.TSC_AUX_WRITE, Msr.TSC_AUX, 5),
    ("apic-base", Control.APIC_BASE_WRITE, Msr.APIC_BASE, 0xFEE0_0900),
    ("efer", Control.EFER_WRITE, Msr.EFER, 0xD01),
)


def _msrs() -> list[Row]:
    at = code_page(0) + code.WRMSR_AT
    kind = InterceptType.MSR_INTERCEPT
    rows = [
        row(
            f"5.msr.{name}",
            _MSR,
            f"WRMSR {int(index):#x}: index, RDX and RAX",
            "openvmm",
            _skip(),
            _watch(control),
            write_msr(index, value),
            messages(1),
            fields(kind, *_header(at, 2), (40, struct.pack("<I4xQQ", index, value >> 32, value & 0xFFFF_FFFF))),
        )
        for name, control, index, value in _MSRS
    ]
    rows += [
        row(
            "5.msr.kept",
            _MSR,
            "what VTL1 skipped was not done",
            "TLFS",
            _watch(0),
            write_msr(Msr.LSTAR, 0x1000),
            _skip(),
            _watch(Control.LSTAR_WRITE),
            write_msr(Msr.LSTAR, 0x2000),
            read_msr(Msr.LSTAR, 0x1000),
            messages(1),
        ),
        row(
            "5.msr.others",
            _MSR,
            "MSRs that are not watched: no message",
            "TLFS",
            forget(),
            write_msr(Msr.CSTAR, 0x1000),
            messages(0),
        ),
        row(
            "5.msr.misc-mask-0",
            _MSR,
            "MISC_ENABLE has a mask: 0 never fires",
            "openvmm",
            forget(),
            _watch(Control.MISC_ENABLE_WRITE),
            write_msr(Msr.MISC_ENABLE, 1),
            messages(0),
        ),
    ]
    return rows


def _tables() -> list[Row]:
    kind = InterceptType.REGISTER_INTERCEPT
    tables = (
        ("gdtr", Control.GDTR_WRITE, code.SGDT, code.LGDT, r.REGISTER_NAME_GDTR, _POINTER, 3),
        ("idtr", Control.IDTR_WRITE, code.SIDT, code.LIDT, r.REGISTER_NAME_IDTR, _POINTER, 3),
        ("ldtr", Control.LDTR_WRITE, code.RET, code.LLDT, r.REGISTER_NAME_LDTR, 0, 3),
        ("tr", Control.TR_WRITE, code.RET, code.LTR, r.REGISTER_NAME_TR, _OTHER_TASK, 3),
    )
    return [
        row(
            f"5.table.{name}",
            _TABLES,
            f"a load of {name.upper()}: a register message with its name",
            "openvmm",
            _watch(0),
            run(store, rdx=argument),
            _skip(),
            _watch(control),
            run(load, rdx=argument),
            messages(1),
            fields(kind, *_header(code_page(0), length), (40, b"\0"), (44, struct.pack("<I", register))),
            _watch(0),
        )
        for name, control, store, load, register, argument, length in tables
    ]


def _ports() -> list[Row]:
    kind = InterceptType.IO_PORT_INTERCEPT
    intercept = C.INSTALL_INTERCEPT
    at = code_page(0) + code.IN_AT
    out = code_page(0) + 3
    return [
        row(
            "5.port.read",
            _PORT,
            "IN from an intercepted port: port, size, RAX; VTL1 skips it",
            "openvmm",
            _skip(),
            call(intercept, install(parameter=_DIAGNOSTIC), vtl=1),
            run(code.IN_BYTE, 0, rdx=_DIAGNOSTIC),
            messages(1),
            fields(kind, *_header(at, 1, READ), (40, struct.pack("<HB", _DIAGNOSTIC, 1))),
        ),
        row(
            "5.port.write",
            _PORT,
            "OUT to it",
            "openvmm",
            _skip(),
            run(code.OUT_BYTE, rdx=_DIAGNOSTIC, r8=0x5A),
            messages(1),
            fields(kind, *_header(out, 1), (40, struct.pack("<HB", _DIAGNOSTIC, 1)), (48, b"\x5a")),
        ),
        row(
            "5.port.removed",
            _PORT,
            "no message once it is taken away",
            "openvmm",
            forget(),
            call(intercept, install(access=0, parameter=_DIAGNOSTIC), vtl=1),
            run(code.OUT_BYTE, rdx=_DIAGNOSTIC),
            messages(0),
        ),
    ]


def rows(_by: By) -> list[Row]:
    return [*_control_registers(), *_msrs(), *_tables(), *_ports()]
