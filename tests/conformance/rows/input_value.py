"""Section 2: the input value, where input and output may lie, how they travel. VTL1 is not there yet."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vtlab.hyperv.hypercalls import PARTITION_SELF
from vtlab.hyperv.registers import HvRegister
from vtlab_conformance import code
from vtlab_conformance.calls import UD, By, C, S, call, get, header, row, run
from vtlab_conformance.layout import HYPERCALL_PAGE, NO_RAM, USER_VIEW, input_page, output_page, report
from vtlab_conformance.steps import Put, Row, Run, See

SECTION = "2 Hypercall interface"
_OV = "openvmm hv1_hypercall"
_STATUS = HvRegister.VSM_VP_STATUS


class Shape(NamedTuple):
    """Bytes of the fixed input; whether the call takes a list, gives output, and may come in registers."""

    size: int
    rep: bool = False
    output: bool = False
    fast: bool = True


SHAPES: dict[C, Shape] = {
    C.FLUSH_VIRTUAL_ADDRESS_SPACE: Shape(24),
    C.FLUSH_VIRTUAL_ADDRESS_LIST: Shape(24, rep=True),
    C.SEND_SYNTHETIC_CLUSTER_IPI: Shape(16),
    C.MODIFY_VTL_PROTECTION_MASK: Shape(16, rep=True),
    C.ENABLE_PARTITION_VTL: Shape(16),
    C.ENABLE_VP_VTL: Shape(240, fast=False),
    C.FLUSH_VIRTUAL_ADDRESS_SPACE_EX: Shape(32),
    C.FLUSH_VIRTUAL_ADDRESS_LIST_EX: Shape(32, rep=True),
    C.SEND_SYNTHETIC_CLUSTER_IPI_EX: Shape(24),
    C.INSTALL_INTERCEPT: Shape(24),
    C.GET_VP_REGISTERS: Shape(16, rep=True, output=True),
    C.SET_VP_REGISTERS: Shape(16, rep=True),
    C.TRANSLATE_VIRTUAL_ADDRESS: Shape(32, output=True),
    C.POST_MESSAGE: Shape(256, fast=False),
    C.SIGNAL_EVENT: Shape(8),
    C.START_VIRTUAL_PROCESSOR: Shape(240, fast=False),
    C.GET_VP_INDEX_FROM_APIC_ID: Shape(16, rep=True, output=True),
    C.TRANSLATE_VIRTUAL_ADDRESS_EX: Shape(32, output=True),
}


def _of_every_call() -> list[Row]:
    rows: list[Row] = []
    for number, shape in SHAPES.items():
        name, count = f"HvCall{number.name.title().replace('_', '')}", int(shape.rep)
        short = number.name.lower().replace("_", "-")
        rows.append(
            row(
                f"2.align.{short}",
                SECTION,
                f"{name}: input that is not 8-byte aligned",
                "TLFS",
                call(number, status=S.INVALID_ALIGNMENT, count=count, at=input_page(0) + 4),
            )
        )
        rows.append(
            row(
                f"2.page.{short}",
                SECTION,
                f"{name}: input that crosses a page, whether aligned or not",
                _OV,
                call(number, status=S.INVALID_HYPERCALL_INPUT, count=count, at=input_page(0) + 0x1000 - shape.size + 4),
            )
        )
        wrong = 0 if shape.rep else 1
        rows.append(
            row(
                f"2.reps.{short}",
                SECTION,
                f"{name}: " + ("a start index that is not below the rep count" if shape.rep else "a rep count"),
                "TLFS",
                call(number, status=S.INVALID_HYPERCALL_INPUT, count=1, start=1 - wrong, reps=1 - wrong),
            )
        )
        if not shape.fast:
            rows.append(
                row(
                    f"2.fast.{short}",
                    SECTION,
                    f"{name}: in registers, where it does not fit",
                    _OV,
                    call(number, bytes(16), S.INVALID_HYPERCALL_INPUT, fast=True),
                )
            )
    return rows


def _value(by: By) -> list[Row]:
    bad = S.INVALID_HYPERCALL_INPUT
    one = header() + struct.pack("<I", _STATUS)
    status_word = (1 << 16).to_bytes(16, "little")
    reserved = by(bad, S.SUCCESS, S.SUCCESS)
    return [
        row(
            "2.code.unknown",
            SECTION,
            "a call code that there is not",
            "TLFS",
            call(0x7E, status=S.INVALID_HYPERCALL_CODE),
        ),
        row(
            "2.code.unknown-fast",
            SECTION,
            "a call code that there is not, in registers, before any other check",
            _OV,
            call(0xFFFF, status=S.INVALID_HYPERCALL_CODE, fast=True, count=0, words=1),
        ),
        row(
            "2.words.fixed",
            SECTION,
            "a variable header for a call with a fixed one",
            _OV,
            call(C.GET_VP_REGISTERS, one, bad, count=1, words=1),
        ),
        row(
            "2.reps.none",
            SECTION,
            "HvCallGetVpRegisters with a rep count of 0",
            "TLFS; KUT",
            call(C.GET_VP_REGISTERS, one, by(bad, bad, S.SUCCESS), count=0),
        ),
        row(
            "2.reps.none-set",
            SECTION,
            "HvCallSetVpRegisters with a rep count of 0",
            "TLFS; KUT",
            call(C.SET_VP_REGISTERS, header(), by(bad, bad, S.SUCCESS), count=0),
        ),
        row(
            "2.reps.start",
            SECTION,
            "elements before the start index are not done; reps completed counts from element 0",
            "TLFS",
            Put(at=output_page(0), data=b"\xee" * 32),
            call(C.GET_VP_REGISTERS, header() + struct.pack("<II", 0xFFFF, _STATUS), count=2, start=1),
            See(at=output_page(0), value=b"\xee" * 16 + status_word),
        ),
        row(
            "2.reps.stop",
            SECTION,
            "a list stops at the first element that is refused: what was done is written and counted",
            _OV,
            Put(at=output_page(0), data=b"\xee" * 48),
            call(
                C.GET_VP_REGISTERS,
                header() + struct.pack("<III", _STATUS, 0xFFFF, _STATUS),
                S.INVALID_PARAMETER,
                count=3,
                reps=1,
            ),
            See(at=output_page(0), value=status_word + b"\xee" * 32),
        ),
        *(
            row(
                f"2.reserved.{bit}",
                SECTION,
                f"bit {bit} of the input value, which is reserved",
                "TLFS; openvmm and KVM do not look",
                call(C.GET_VP_REGISTERS, one, reserved, count=1, bits=1 << bit, reps=0 if reserved else 1),
            )
            for bit in (27, 44, 63)
        ),
    ]


def _buffers() -> list[Row]:
    bad = S.INVALID_HYPERCALL_INPUT
    one = header() + struct.pack("<I", _STATUS)
    status_word = (1 << 16).to_bytes(16, "little")
    last = output_page(0) + 0x1000 - 16
    return [
        row(
            "2.output.align",
            SECTION,
            "output that is not 8-byte aligned",
            "TLFS",
            call(C.GET_VP_REGISTERS, one, S.INVALID_ALIGNMENT, count=1, out=output_page(0) + 1),
        ),
        row(
            "2.output.page",
            SECTION,
            "output that crosses a page",
            _OV,
            call(C.GET_VP_REGISTERS, one, bad, count=1, out=last + 8),
        ),
        row(
            "2.output.end",
            SECTION,
            "output that ends with its page",
            "TLFS",
            call(C.GET_VP_REGISTERS, one, count=1, out=last, output=status_word),
        ),
        row(
            "2.output.no-memory",
            SECTION,
            "output where no memory is",
            _OV,
            call(C.GET_VP_REGISTERS, one, bad, count=1, out=NO_RAM << 12),
        ),
        row(
            "2.input.no-memory",
            SECTION,
            "input where no memory is",
            _OV,
            call(C.GET_VP_REGISTERS, b"", bad, count=1, at=NO_RAM << 12),
        ),
        row(
            "2.output.failure",
            SECTION,
            "a simple call that fails writes no output",
            _OV,
            Put(at=output_page(0), data=b"\xee" * 16),
            call(
                C.TRANSLATE_VIRTUAL_ADDRESS,
                struct.pack("<QIIQQ", PARTITION_SELF, 0xFFFFFFFE, 0, 0x20 << 56, 0),
                S.INVALID_PARAMETER,
            ),
            See(at=output_page(0), value=b"\xee" * 16),
        ),
        row(
            "2.fast.xmm-input",
            SECTION,
            "input of more than 16 bytes in XMM registers, output from the next pair on",
            "TLFS",
            call(
                C.GET_VP_REGISTERS,
                one + struct.pack("<I", HvRegister.VSM_PARTITION_STATUS),
                count=2,
                fast=True,
                output=status_word,
            ),
        ),
        row(
            "2.fast.too-large",
            SECTION,
            "112 bytes are the most that registers carry",
            "TLFS",
            call(C.GET_VP_REGISTERS, one, bad, count=5, fast=True),
        ),
        row(
            "2.fast.simple",
            SECTION,
            "16 bytes in RDX and R8",
            "TLFS",
            call(C.ENABLE_PARTITION_VTL, struct.pack("<QBB6x", 1, 1, 0), S.INVALID_PARTITION_ID, fast=True),
        ),
    ]


def _execution() -> list[Row]:
    # Through the user's view of the hypercall page: the VMCALL there is at CPL3.
    page = report(0) + HYPERCALL_PAGE + USER_VIEW
    return [
        row(
            "2.cpl3",
            SECTION,
            "a hypercall at CPL3 is #UD",
            "TLFS",
            Run(address=page, user=True, rcx=C.GET_VP_REGISTERS, vector=UD),
        ),
        row(
            "2.registers",
            SECTION,
            "a hypercall keeps every register but RAX",
            "TLFS",
            Put(at=report(0), data=struct.pack("<16Q", *(0x1100 + number for number in range(16)))),
            call(C.GET_VP_REGISTERS, header() + struct.pack("<I", _STATUS), count=1),
            See(
                at=report(0) + 0x100,
                value=struct.pack(
                    "<16Q",
                    0x1_0000_0000,
                    C.GET_VP_REGISTERS | 1 << 32,
                    input_page(0),
                    0x1103,
                    0,
                    *(0x1105, 0x1106, 0x1107),
                    output_page(0),
                    *(0x1109 + number for number in range(7)),
                ),
                mask=b"\xff" * 32 + b"\0" * 8 + b"\xff" * 88,
            ),
        ),
        row(
            "2.page.offsets",
            SECTION,
            "VsmCodePageOffsets: call [11:0] and return [23:12] lie in the page, apart",
            "TLFS",
            get(HvRegister.VSM_CODE_PAGE_OFFSETS, 0, mask=((1 << 128) - 1) & ~0xFFFFFF),
        ),
        row(
            "2.vtl-call.early", SECTION, "a VTL call without a higher VTL is #UD", "TLFS", run(code.VTL_CALL, vector=UD)
        ),
        row("2.vtl-return.lowest", SECTION, "a VTL return from VTL0 is #UD", "TLFS", run(code.VTL_RETURN, vector=UD)),
    ]


def rows(by: By) -> list[Row]:
    return [*_of_every_call(), *_value(by), *_buffers(), *_execution()]
