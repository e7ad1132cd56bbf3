"""Calls of section 3 that need no VTL1: flushes, interrupts, other VPs, messages, events, translation."""

from __future__ import annotations

import struct
from dataclasses import replace

from vtlab.hyperv.hypercalls import ANY_VP, PARTITION_SELF, VP_SELF
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.synic import SINT_AFTER_RESET
from vtlab_conformance import code
from vtlab_conformance.calls import VTL0_TARGET, VTL1_TARGET, By, C, S, call, header, row, run, write_msr
from vtlab_conformance.layout import EVENT_PAGE, HYPERCALL_PAGE, MESSAGE_PAGE, counter, input_page, report
from vtlab_conformance.rows.before_vtl1 import NO_VP, OTHER_PARTITION
from vtlab_conformance.steps import Context, Put, Row, Run, See, Step

_FLUSH = "3 Flush calls"
_IPI = "3 HvCallSendSyntheticClusterIpi(Ex)"
_START = "3 HvCallStartVirtualProcessor"
_INDEX = "3 HvCallGetVpIndexFromApicId"
_MESSAGE = "3 HvCallPostMessage, HvCallSignalEvent"
_TRANSLATE = "3 HvCallTranslateVirtualAddress(Ex)"
TEST_DEVICE, _CREATE_MESSAGES, _CREATE_EVENTS = 0x3000, 4, 6
_BAD = S.INVALID_PARAMETER


def _flush() -> list[Row]:
    space, lists = C.FLUSH_VIRTUAL_ADDRESS_SPACE, C.FLUSH_VIRTUAL_ADDRESS_LIST
    space_ex, lists_ex = C.FLUSH_VIRTUAL_ADDRESS_SPACE_EX, C.FLUSH_VIRTUAL_ADDRESS_LIST_EX

    def fixed(flags: int, mask: int = 1) -> bytes:
        return struct.pack("<QQQ", 0, flags, mask)

    def sparse(flags: int, *banks: int, form: int = 0) -> bytes:
        return struct.pack(f"<QQQQ{len(banks)}Q", 0, flags, form, (1 << len(banks)) - 1, *banks)

    two = struct.pack("<QQ", 0x1000, 0x2001)
    return [
        row("3.flush.space", _FLUSH, "address space: this VP", "TLFS", call(space, fixed(2))),
        row(
            "3.flush.space-all",
            _FLUSH,
            "address space: all VPs, the mask is not looked at",
            "TLFS",
            call(space, fixed(1 | 2 | 4, 0)),
        ),
        row(
            "3.flush.space-flags",
            _FLUSH,
            "address space: flag 3, extended ranges, is the list's",
            "openvmm",
            call(space, fixed(8), _BAD),
        ),
        row(
            "3.flush.space-reserved",
            _FLUSH,
            "address space: a reserved flag",
            "openvmm",
            call(space, fixed(1 << 20), _BAD),
        ),
        row("3.flush.space-empty", _FLUSH, "address space: no VP", "openvmm", call(space, fixed(0, 0), _BAD)),
        row("3.flush.list", _FLUSH, "list: all elements are done", "TLFS", call(lists, fixed(2) + two, count=2)),
        row(
            "3.flush.list-extended",
            _FLUSH,
            "list: extended ranges",
            "openvmm",
            call(lists, fixed(2 | 8) + two, count=2),
        ),
        row(
            "3.flush.list-flags",
            _FLUSH,
            "list: a reserved flag",
            "openvmm",
            call(lists, fixed(1 << 40) + two, _BAD, count=2),
        ),
        row("3.flush.space-ex", _FLUSH, "address space, VP set", "TLFS", call(space_ex, sparse(2, 1), words=1)),
        row(
            "3.flush.space-ex-all",
            _FLUSH,
            "address space, the set of all VPs",
            "TLFS",
            call(space_ex, sparse(2, form=1)),
        ),
        row(
            "3.flush.space-ex-banks",
            _FLUSH,
            "address space, banks that are not in the header",
            "TLFS",
            call(space_ex, sparse(2, 1), _BAD),
        ),
        row(
            "3.flush.space-ex-form",
            _FLUSH,
            "address space, a form of set that there is not",
            "TLFS",
            call(space_ex, sparse(2, 1, form=2), _BAD, words=1),
        ),
        row("3.flush.list-ex", _FLUSH, "list, VP set", "TLFS", call(lists_ex, sparse(2, 1) + two, count=2, words=1)),
        row(
            "3.flush.list-ex-empty",
            _FLUSH,
            "list, an empty set",
            "openvmm",
            call(lists_ex, sparse(2) + two, _BAD, count=2),
        ),
    ]


def ipi(vector: int, mask: int = 1, target: int = 0, flags: int = 0, reserved: int = 0) -> bytes:
    """HvCallSendSyntheticClusterIpi."""
    return struct.pack("<IBBHQ", vector, target, flags, reserved, mask)


def ipi_ex(vector: int, *banks: int, target: int = 0, form: int = 0, valid: int | None = None) -> bytes:
    """HvCallSendSyntheticClusterIpiEx."""
    named = (1 << len(banks)) - 1 if valid is None else valid
    return struct.pack(f"<IBBHQQ{len(banks)}Q", vector, target, 0, 0, form, named, *banks)


def taken(vector: int, times: int, vtl: int = 0, vp: int = 0, on: int = 0) -> See:
    """The level has taken that vector so often; looked at by VTL0 of vCPU `on`, which lets its own in meanwhile."""
    return See(at=counter(vector, vtl, vp), value=struct.pack("<I", times), wait=True, vp=on)


def _interrupts(by: By) -> list[Row]:
    one, many = C.SEND_SYNTHETIC_CLUSTER_IPI, C.SEND_SYNTHETIC_CLUSTER_IPI_EX
    above = by(S.ACCESS_DENIED, S.ACCESS_DENIED, S.INVALID_VTL_STATE)
    return [
        row("3.ipi.self", _IPI, "to this VP, at the caller's level", "TLFS", call(one, ipi(0x51)), taken(0x51, 1)),
        row("3.ipi.self-fast", _IPI, "input in registers", "TLFS", call(one, ipi(0x52), fast=True), taken(0x52, 1)),
        row(
            "3.ipi.explicit",
            _IPI,
            "the own level, named",
            "TLFS",
            call(one, ipi(0x53, target=VTL0_TARGET)),
            taken(0x53, 1),
        ),
        row("3.ipi.vector-low", _IPI, "a vector below 0x10", "openvmm", call(one, ipi(0x0F), _BAD)),
        row("3.ipi.vector-high", _IPI, "a vector above 0xFF", "openvmm", call(one, ipi(0x100), _BAD)),
        row("3.ipi.flags", _IPI, "a flag", "openvmm", call(one, ipi(0x54, flags=1), _BAD)),
        row("3.ipi.reserved", _IPI, "a reserved field", "openvmm", call(one, ipi(0x54, reserved=1), _BAD)),
        row(
            "3.ipi.reserved-vtl", _IPI, "reserved bits of HV_INPUT_VTL", "TLFS", call(one, ipi(0x54, target=0x80), _BAD)
        ),
        row("3.ipi.no-vp", _IPI, "a VP that there is not", "openvmm", call(one, ipi(0x54, 1 << 63), _BAD)),
        row(
            "3.ipi.above",
            _IPI,
            "from VTL0 to a VTL1 that there is not",
            "openvmm; KUT",
            call(one, ipi(0x54, target=VTL1_TARGET), above),
        ),
        row(
            "3.ipi.refused", _IPI, "what was refused arrived nowhere", "TLFS", See(at=counter(0x54, 0), value=bytes(4))
        ),
        row("3.ipi-ex.self", _IPI, "Ex: a sparse set", "TLFS", call(many, ipi_ex(0x55, 1), words=1), taken(0x55, 1)),
        row("3.ipi-ex.form", _IPI, "Ex: a form other than sparse", "openvmm", call(many, ipi_ex(0x55, form=1), _BAD)),
        row(
            "3.ipi-ex.banks",
            _IPI,
            "Ex: more valid banks than the header has",
            "TLFS",
            call(many, ipi_ex(0x55, 1, valid=3), _BAD, words=1),
        ),
        row(
            "3.ipi-ex.no-vp",
            _IPI,
            "Ex: a VP that there is not",
            "openvmm",
            call(many, ipi_ex(0x55, 0, 1), _BAD, words=2),
        ),
        row(
            "3.ipi-ex.above",
            _IPI,
            "Ex: from VTL0 to a VTL1 that there is not",
            "openvmm; KUT",
            call(many, ipi_ex(0x55, 1, target=VTL1_TARGET), above, words=1),
        ),
    ]


def start(
    vp_index: int, vtl: int, status: S = S.SUCCESS, *, caller: int = 0, partition: int = PARTITION_SELF
) -> list[Step]:
    """HvCallStartVirtualProcessor with a context in which the guest's code can start."""
    return _with_context(C.START_VIRTUAL_PROCESSOR, vp_index, vtl, status, caller, partition)


def enable_vp(
    vp_index: int, vtl: int, status: S = S.SUCCESS, *, caller: int = 0, partition: int = PARTITION_SELF
) -> list[Step]:
    """HvCallEnableVpVtl, likewise."""
    return _with_context(C.ENABLE_VP_VTL, vp_index, vtl, status, caller, partition)


def _with_context(number: C, vp_index: int, vtl: int, status: S, caller: int, partition: int) -> list[Step]:
    of_vp = vp_index if vp_index < 2 else 0
    context = Context(at=input_page(0) + 16, of_vp=of_vp, of_vtl=min(vtl, 1), vtl=caller)
    return [context, *call(number, header(partition, vp_index, vtl), status, vtl=caller)]


def _processors() -> list[Row]:
    ids = C.GET_VP_INDEX_FROM_APIC_ID

    def named(*numbers: int, partition: int = PARTITION_SELF, target: int = 0) -> bytes:
        return struct.pack(f"<QB7x{len(numbers)}I", partition, target, *numbers)

    return [
        row(
            "3.start.partition",
            _START,
            "another partition",
            "TLFS",
            start(1, 0, S.INVALID_PARTITION_ID, partition=OTHER_PARTITION),
        ),
        row("3.start.no-vp", _START, "a VP that there is not", "openvmm", start(NO_VP, 0, S.INVALID_VP_INDEX)),
        row("3.start.self", _START, "the caller's own VP", "openvmm", start(VP_SELF, 0, S.INVALID_VP_INDEX)),
        row("3.start.above", _START, "a level above the caller", "openvmm", start(1, 1, S.ACCESS_DENIED)),
        row(
            "3.start.vp",
            _START,
            "starts the VP with the context",
            "TLFS",
            start(1, 0),
            Put(at=report(0, 1), data=bytes(8), vp=1),
        ),
        row("3.start.again", _START, "a VP that runs", "openvmm", start(1, 0, S.INVALID_VP_STATE)),
        row(
            "3.ipi.other-vp",
            _IPI,
            "to another VP",
            "TLFS",
            call(C.SEND_SYNTHETIC_CLUSTER_IPI, ipi(0x56, 2)),
            taken(0x56, 1, vp=1, on=1),
        ),
        row(
            "3.ipi.both",
            _IPI,
            "to two VPs",
            "TLFS",
            call(C.SEND_SYNTHETIC_CLUSTER_IPI, ipi(0x57, 3)),
            taken(0x57, 1, vp=1, on=1),
            taken(0x57, 1),
        ),
        row(
            "3.ipi-ex.other-vp",
            _IPI,
            "Ex: to another VP",
            "TLFS",
            call(C.SEND_SYNTHETIC_CLUSTER_IPI_EX, ipi_ex(0x58, 2), words=1),
            taken(0x58, 1, vp=1, on=1),
        ),
        row(
            "3.flush.other-vp",
            _FLUSH,
            "address space: another VP",
            "TLFS",
            call(C.FLUSH_VIRTUAL_ADDRESS_SPACE, struct.pack("<QQQ", 0, 2, 2)),
        ),
        row(
            "3.index.list",
            _INDEX,
            "the VP of each APIC id",
            "TLFS",
            call(ids, named(1, 0), count=2, output=struct.pack("<II", 1, 0)),
        ),
        row(
            "3.index.unknown",
            _INDEX,
            "an APIC id that there is not: the list stops there",
            "openvmm",
            call(ids, named(0, 77, 1), S.INVALID_PARAMETER, count=3, reps=1),
        ),
        row(
            "3.index.partition",
            _INDEX,
            "another partition",
            "openvmm",
            call(ids, named(0, partition=OTHER_PARTITION), S.INVALID_PARTITION_ID, count=1),
        ),
        row(
            "3.index.reserved",
            _INDEX,
            "reserved bits of HV_INPUT_VTL",
            "openvmm",
            call(ids, named(0, target=0x20), S.INVALID_PARAMETER, count=1),
        ),
        row(
            "3.index.above",
            _INDEX,
            "a level above the caller",
            "openvmm",
            call(ids, named(0, target=VTL1_TARGET), S.ACCESS_DENIED, count=1),
        ),
    ]


_SINT, _VECTOR, _CONNECTION = 2, 0x61, 5


def message(connection: int = _CONNECTION, kind: int = 1, size: int = 8, payload: bytes = b"vtlab row") -> bytes:
    return struct.pack("<I4xII240s", connection, kind, size, payload)


def _order(command: int, sint: int = _SINT) -> list[Step]:
    return list(run(code.OUT_DWORD, rdx=TEST_DEVICE, r8=sint | command << 16 | _CONNECTION << 24))


def _messages() -> list[Row]:
    post, signal = C.POST_MESSAGE, C.SIGNAL_EVENT
    slot = report(0) + MESSAGE_PAGE + 256 * _SINT
    flags = report(0) + EVENT_PAGE + 256 * _SINT
    posts = [step for _ in range(40) for step in _unchecked(post)]
    return [
        row(
            "3.post.connection",
            _MESSAGE,
            "post: no such connection",
            "TLFS",
            call(post, message(0x77), S.INVALID_CONNECTION_ID),
        ),
        row(
            "3.post.size",
            _MESSAGE,
            "post: a payload of more than 240 bytes",
            "TLFS",
            call(post, message(size=241), _BAD),
        ),
        row("3.post.type", _MESSAGE, "post: type 0", "TLFS", call(post, message(kind=0), _BAD)),
        row(
            "3.post.hypervisor",
            _MESSAGE,
            "post: a type of the hypervisor's own",
            "TLFS",
            call(post, message(kind=0x8000_0001), _BAD),
        ),
        row(
            "3.post.delivered",
            _MESSAGE,
            "post: the message lies in the slot of its SINT, and raises it",
            "TLFS",
            write_msr(HvMsr.SINT0 + _SINT, _VECTOR),
            _order(_CREATE_MESSAGES),
            call(post, message()),
            taken(_VECTOR, 1),
            See(at=slot, value=struct.pack("<IBBHQ8s", 1, 8, 0, 0, _CONNECTION, b"vtlab ro")),
        ),
        row(
            "3.post.buffers",
            _MESSAGE,
            "post: a receiver that reads nothing has no buffer left in the end",
            "TLFS",
            posts,
            call(post, message(), S.INSUFFICIENT_BUFFERS),
            write_msr(HvMsr.SINT0 + _SINT, SINT_AFTER_RESET),
        ),
        row(
            "3.signal.connection",
            _MESSAGE,
            "signal: no such connection",
            "TLFS",
            call(signal, struct.pack("<IHH", 0x77, 0, 0), S.INVALID_CONNECTION_ID, fast=True),
        ),
        row(
            "3.signal.delivered",
            _MESSAGE,
            "signal: the flag is set, and raises the SINT",
            "TLFS",
            write_msr(HvMsr.SINT0 + _SINT + 1, _VECTOR + 1),
            _order(_CREATE_EVENTS, _SINT + 1),
            call(signal, struct.pack("<IHH", _CONNECTION, 0, 0)),
            taken(_VECTOR + 1, 1),
            See(at=flags + 256, value=bytes([1 << _CONNECTION])),
        ),
        row(
            "3.signal.flag",
            _MESSAGE,
            "signal: a flag that the port does not have",
            "TLFS",
            call(signal, struct.pack("<IHH", _CONNECTION, 1, 0), _BAD),
        ),
        row(
            "3.signal.reserved",
            _MESSAGE,
            "signal: a reserved field",
            "TLFS",
            call(signal, struct.pack("<IHH", _CONNECTION, 0, 1), _BAD),
        ),
    ]


def _unchecked(number: C) -> list[Step]:
    """A post whose status does not matter."""
    return [replace(step, mask=0, code=None) if isinstance(step, Run) else step for step in call(number, message())]


def translation(
    address: int, flags: int = 1, target: int = 0, vp_index: int = VP_SELF, partition: int = PARTITION_SELF
) -> bytes:
    """HvCallTranslateVirtualAddress(Ex); flags: read 0, write 1, execute 2, supervisor 6, user 7."""
    return struct.pack("<QIIQQ", partition, vp_index, 0, flags | target << 56, address >> 12)


def found(gpa: int, overlay: bool = False) -> bytes:
    return struct.pack("<IBBHQ", 0, 6, overlay, 0, gpa >> 12)


def found_ex(gpa: int, overlay: bool = False) -> bytes:
    return struct.pack("<IBBHQ32xQQ", 0, 6, overlay, 0, 0, gpa >> 12, 0)


def _translate(by: By) -> list[Row]:
    one, two = C.TRANSLATE_VIRTUAL_ADDRESS, C.TRANSLATE_VIRTUAL_ADDRESS_EX
    other = by(S.INVALID_PARTITION_ID, S.ACCESS_DENIED, S.INVALID_PARTITION_ID)
    none = by(S.INVALID_VP_INDEX, S.ACCESS_DENIED, S.INVALID_VP_INDEX)
    own = by(S.SUCCESS, S.ACCESS_DENIED, S.SUCCESS)
    above = by(S.INVALID_VP_STATE, S.ACCESS_DENIED, S.INVALID_VP_STATE)
    page = report(0) + HYPERCALL_PAGE
    rows: list[Row] = []
    for call_code, short in ((one, "translate"), (two, "translate-ex")):
        as_found = found if call_code is one else found_ex

        def answer(gpa: int, overlay: bool = False, encode: object = as_found) -> bytes:
            assert callable(encode)
            return b"" if own else bytes(encode(gpa, overlay))

        absent = b"" if own else struct.pack("<I", 1)
        name = "Ex: " if call_code is two else ""
        rows += [
            row(
                f"3.{short}.partition",
                _TRANSLATE,
                f"{name}another partition",
                "openvmm; KUT",
                call(call_code, translation(0, partition=OTHER_PARTITION), other),
            ),
            row(
                f"3.{short}.no-vp",
                _TRANSLATE,
                f"{name}a VP that there is not",
                "openvmm; KUT",
                call(call_code, translation(0, vp_index=ANY_VP), none),
            ),
            row(
                f"3.{short}.other-vp",
                _TRANSLATE,
                f"{name}another VP",
                "openvmm",
                call(call_code, translation(0, vp_index=1), S.ACCESS_DENIED),
            ),
            row(
                f"3.{short}.reserved",
                _TRANSLATE,
                f"{name}reserved bits of HV_INPUT_VTL",
                "TLFS",
                call(call_code, translation(0, target=0x20), S.INVALID_PARAMETER),
            ),
            row(
                f"3.{short}.above",
                _TRANSLATE,
                f"{name}a level above the caller",
                "openvmm; KUT",
                call(call_code, translation(0, target=VTL1_TARGET), above),
            ),
            row(
                f"3.{short}.own",
                _TRANSLATE,
                f"{name}the caller's own level",
                "openvmm; KUT",
                call(call_code, translation(0x123000), own, output=answer(0x123000)),
            ),
            row(
                f"3.{short}.overlay",
                _TRANSLATE,
                f"{name}the hypercall page is an overlay",
                "KUT",
                call(call_code, translation(page), own, output=answer(page, True)),
            ),
            row(
                f"3.{short}.absent",
                _TRANSLATE,
                f"{name}a walk that fails is a success of the call: 1, not present",
                "TLFS",
                call(call_code, translation(1 << 46), own, output=absent),
            ),
        ]
    return rows


def rows(by: By) -> list[Row]:
    return [*_flush(), *_interrupts(by), *_processors(), *_messages(), *_translate(by)]
