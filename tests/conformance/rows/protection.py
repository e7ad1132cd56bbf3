"""Protection of pages, and what VTL1 sees of VTL0's accesses (sections 3 to 6)."""

from __future__ import annotations

import struct

from vtlab.hyperv.messages import EXECUTE, READ, WRITE, InterceptType
from vtlab.hyperv.registers import HvRegister as N
from vtlab_conformance import code
from vtlab_conformance.calls import (
    GP,
    UD,
    VTL0_TARGET,
    VTL1_TARGET,
    By,
    C,
    S,
    call,
    get,
    header,
    protect,
    put,
    row,
    run,
)
from vtlab_conformance.layout import (
    MESSAGE,
    MESSAGE_COUNT,
    NO_RAM,
    STATUS,
    Answer,
    code_page,
    page,
    report,
)
from vtlab_conformance.rows.before_vtl1 import OTHER_PARTITION, enable
from vtlab_conformance.rows.vtl0_services import enable_vp, found, translation
from vtlab_conformance.steps import Put, Row, See, SetAnswer, Step

_CONFIG = "4 VsmPartitionConfig"
_PROTECT = "3 HvCallModifyVtlProtectionMask"
_MEMORY = "5 Memory intercepts"
_TRANSLATE = "3 HvCallTranslateVirtualAddress(Ex)"
_ABI = "2 Hypercall interface"
CONFIG = N.VSM_PARTITION_CONFIG
BAD = S.INVALID_REGISTER_VALUE
R, W, KMX, UMX = 1, 2, 4, 8
FULL = R | W | KMX | UMX
ENABLED = 1 | FULL << 1 | 1 << 5
_ZERO, _DENY = 1 << 5, 1 << 6
_HEADER = 16
"""Of a message, before its payload."""


def bring_up(name: str, flags: int = 0) -> Row:
    """VTL1 for the partition and for the first VP, entered once."""
    return row(
        f"4.bring-up.{name}",
        "4 VTL call and return",
        "VTL1 enabled on partition and VP, and entered",
        "TLFS",
        call(C.ENABLE_PARTITION_VTL, enable(1, flags)),
        enable_vp(0, 1),
        run(code.VTL_CALL),
        See(at=report(1) + STATUS, value=struct.pack("<Q", 1)),
    )


def _config(by: By) -> list[Row]:
    frozen = by(BAD, BAD, S.SUCCESS)
    split = by(BAD, BAD, S.SUCCESS)
    return [
        row(
            "3.protect.early",
            _PROTECT,
            "VTL1, before it enabled protection",
            "openvmm",
            protect([page(0) >> 12], FULL, S.ACCESS_DENIED),
        ),
        row(
            "4.config.reset",
            _CONFIG,
            "off after a reset, memory is zeroed at the next one",
            "TLFS",
            get(CONFIG, 1 << 5, mask=1 | 1 << 5, target=VTL1_TARGET, vtl=1),
        ),
        row(
            "4.config.vtl0",
            _CONFIG,
            "of VTL0",
            "openvmm",
            put(CONFIG, ENABLED, S.INVALID_PARAMETER, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.config.intercepts",
            _CONFIG,
            "bit 10, an intercept that is not offered",
            "openvmm",
            put(CONFIG, ENABLED | 1 << 10, BAD, vtl=1),
        ),
        row("4.config.reserved", _CONFIG, "a reserved bit", "TLFS", put(CONFIG, ENABLED | 1 << 40, BAD, vtl=1)),
        row("4.config.mask-read", _CONFIG, "a default mask without R", "openvmm", put(CONFIG, 1 | W << 1, BAD, vtl=1)),
        row(
            "4.config.mask-write",
            _CONFIG,
            "a default mask without W",
            "openvmm",
            put(CONFIG, 1 | (R | KMX | UMX) << 1, BAD, vtl=1),
        ),
        row(
            "4.config.mask-split",
            _CONFIG,
            "a default mask with UMX and without KMX, and no MBEC",
            "openvmm; KUT",
            put(CONFIG, (R | W | UMX) << 1 | _ZERO, split, vtl=1),
        ),
        row(
            "4.config.enable",
            _CONFIG,
            "protection is enabled, all rights the default; it is read back",
            "TLFS",
            put(CONFIG, ENABLED, vtl=1),
            get(CONFIG, ENABLED, vtl=1),
        ),
        row(
            "4.config.disable",
            _CONFIG,
            "it cannot be disabled again: refused, or ignored",
            "openvmm; KUT",
            put(CONFIG, ENABLED & ~1, frozen, vtl=1),
            get(CONFIG, ENABLED, vtl=1),
        ),
        row(
            "4.config.mask-again",
            _CONFIG,
            "the default mask is written once: refused, or ignored",
            "openvmm; KUT",
            put(CONFIG, 1 | (R | W) << 1 | _ZERO, frozen, vtl=1),
            get(CONFIG, ENABLED, vtl=1),
        ),
        row(
            "4.config.later",
            _CONFIG,
            "zero memory on reset and deny lower startup may change later",
            "openvmm",
            put(CONFIG, ENABLED & ~_ZERO | _DENY, vtl=1),
            get(CONFIG, ENABLED & ~_ZERO | _DENY, vtl=1),
            put(CONFIG, ENABLED, vtl=1),
        ),
    ]


def _rules(by: By) -> list[Row]:
    pages = [page(0) >> 12]
    denied = S.ACCESS_DENIED
    other = by(S.INVALID_PARTITION_ID, denied, S.INVALID_PARTITION_ID)
    imposing, restricted = by(denied, S.SUCCESS, denied), by(S.SUCCESS, S.INVALID_PARAMETER, S.SUCCESS)
    either = by(BAD, BAD, S.SUCCESS)
    illegal = (
        ("write", W, BAD, "W without R"),
        ("execute", KMX | UMX, BAD, "X without R"),
        ("kernel", R | KMX, either, "KMX without UMX"),
        ("user", R | UMX, either, "UMX without KMX, and no MBEC"),
        ("shadow-stack", FULL | 1 << 4, BAD, "supervisor shadow stack, which is not enabled"),
        ("paging", FULL | 1 << 5, BAD, "paging writability"),
        ("adjustable", FULL | 1 << 15, BAD, "adjustable"),
        ("reserved", FULL | 1 << 30, BAD, "a reserved bit"),
    )
    many = [page(number) >> 12 for number in range(510)]
    return [
        row("3.protect.own", _PROTECT, "no target: what the caller imposes on VTL0", "TLFS", protect(pages, FULL)),
        row(
            "3.protect.imposing",
            _PROTECT,
            "target VTL1: the level that imposes, or the one that is restricted",
            "openvmm; TLFS, KUT",
            protect(pages, FULL, imposing, target=VTL1_TARGET),
        ),
        row(
            "3.protect.restricted",
            _PROTECT,
            "target VTL0",
            "openvmm; TLFS, KUT",
            protect(pages, FULL, restricted, target=VTL0_TARGET),
        ),
        row("3.protect.vtl2", _PROTECT, "target VTL2", "openvmm; KUT", protect(pages, FULL, denied, target=0x12)),
        row(
            "3.protect.partition-vtl1",
            _PROTECT,
            "another partition, from VTL1",
            "openvmm; KUT",
            protect(pages, FULL, other, partition=OTHER_PARTITION),
        ),
        *(
            row(f"3.protect.flags-{name}", _PROTECT, rule, "openvmm", protect(pages, flags, status))
            for name, flags, status, rule in illegal
        ),
        row(
            "3.protect.no-memory",
            _PROTECT,
            "a page where no memory is; pages before it are done and counted",
            "TLFS",
            protect([*pages, NO_RAM], FULL, S.INVALID_PARAMETER, reps=1),
        ),
        row(
            "3.protect.legal",
            _PROTECT,
            "none, R, RX, RW and RWX are legal",
            "openvmm",
            [step for flags in (0, R, R | KMX | UMX, R | W, FULL) for step in protect(pages, flags)],
        ),
        row(
            "3.protect.510", _PROTECT, "510 pages are the most that a page of input holds", "TLFS", protect(many, FULL)
        ),
        row(
            "3.protect.511",
            _PROTECT,
            "511 cross the page",
            "TLFS",
            call(C.MODIFY_VTL_PROTECTION_MASK, header(vp_index=FULL), S.INVALID_HYPERCALL_INPUT, count=511, vtl=1),
        ),
        row(
            "3.protect.fast",
            _PROTECT,
            "pages in XMM registers",
            "openvmm",
            call(
                C.MODIFY_VTL_PROTECTION_MASK,
                header(vp_index=FULL) + struct.pack("<4Q", *many[:4]),
                count=4,
                fast=True,
                vtl=1,
            ),
        ),
    ]


_HIDDEN, _SEALED = page(16), page(17)
_CODE = page(18)
_WORD = 0x1122334455667788


def fields(kind: int, *parts: tuple[int, bytes], size: int | None = None) -> See:
    """The last message that VTL1 took: its type, and fields of its payload by their offsets."""
    value, mask = bytearray(256), bytearray(256)

    def put_at(offset: int, data: bytes) -> None:
        value[offset : offset + len(data)] = data
        mask[offset : offset + len(data)] = b"\xff" * len(data)

    put_at(0, struct.pack("<I", kind))
    if size is not None:
        put_at(4, bytes([size]))
    for offset, data in parts:
        put_at(_HEADER + offset, data)
    return See(at=report(1) + MESSAGE, value=bytes(value), mask=bytes(mask))


def messages(count: int) -> list[Step]:
    """VTL1 has taken so many since forget()."""
    return [See(at=report(1) + MESSAGE_COUNT, value=struct.pack("<Q", count))]


def forget() -> list[Step]:
    return [Put(at=report(1) + MESSAGE_COUNT, data=bytes(8))]


# CPL 0, CR0.PE, EFER.LMA; AM, debugger, interruption and shadow are masked out by where it is used.
_KERNEL_STATE = struct.pack("<H", 1 << 2 | 1 << 4)


def _memory(by: By) -> list[Row]:
    size = by(240, 80, 240)
    word = struct.pack("<Q", _WORD)
    memory = InterceptType.GPA_INTERCEPT

    def place(gpa: int, access: int, length: int, rip: int) -> tuple[tuple[int, bytes], ...]:
        return (
            (0, struct.pack("<IBB", 0, length, access)),
            (6, _KERNEL_STATE),
            (24, struct.pack("<Q", rip)),
            (40, struct.pack("<I", 6)),
            (48, struct.pack("<QQ", 0, gpa)),
        )

    registers = [(112, struct.pack("<QQQ", 0, 0, _HIDDEN))] if size == 240 else []
    return [
        row(
            "5.memory.hide",
            _MEMORY,
            "VTL1 keeps a page for itself, and still reads and writes it",
            "TLFS",
            Put(at=_HIDDEN, data=word, vtl=1),
            protect([_HIDDEN >> 12], 0),
            See(at=_HIDDEN, value=word, vtl=1),
            Put(at=_HIDDEN + 8, data=word, vtl=1),
        ),
        row(
            "5.memory.read",
            _MEMORY,
            "a read of VTL0 is a message: instruction, page, no virtual address; it runs again when VTL1 opens it",
            "TLFS; openvmm sends 80 bytes",
            forget(),
            SetAnswer(answer=Answer.OPEN),
            run(code.LOAD, _WORD, rdx=_HIDDEN),
            messages(1),
            fields(memory, *place(_HIDDEN, READ, 3, code_page(0)), *registers, size=size),
        ),
        row(
            "5.memory.reason",
            _MEMORY,
            "VTL1 is entered for an interrupt",
            "openvmm",
            See(at=report(1) + STATUS + 16, value=struct.pack("<Q", 2)),
        ),
        row(
            "5.memory.origin",
            _MEMORY,
            "the RFLAGS of the message have RF set",
            "KUT",
            fields(memory, (32 + 2, b"\1")),
        ),
        row(
            "5.memory.write",
            _MEMORY,
            "a write to a page that VTL0 may read alone; it is not done before VTL1 answers",
            "TLFS",
            forget(),
            protect([_SEALED >> 12], R),
            run(code.LOAD, 0, rdx=_SEALED),
            messages(0),
            run(code.STORE, rdx=_SEALED, r8=_WORD),
            messages(1),
            fields(memory, *place(_SEALED, WRITE, 3, code_page(0))),
            See(at=_SEALED, value=word),
        ),
        row(
            "5.memory.skip",
            _MEMORY,
            "VTL1 moves RIP behind the instruction: it is never done",
            "TLFS",
            forget(),
            protect([_SEALED >> 12], R),
            SetAnswer(answer=Answer.SKIP),
            run(code.STORE, rdx=_SEALED, r8=0),
            messages(1),
            See(at=_SEALED, value=word),
        ),
        row(
            "5.memory.event",
            _MEMORY,
            "VTL1 has VTL0 take #GP with an error code",
            "openvmm",
            SetAnswer(answer=Answer.EVENT, value=1 | 1 << 8 | GP << 16 | 0x18 << 32),
            run(code.STORE, vector=GP, rdx=_SEALED),
        ),
        row(
            "5.memory.event-ud",
            _MEMORY,
            "or #UD, which has none",
            "openvmm",
            SetAnswer(answer=Answer.EVENT, value=1 | UD << 16),
            run(code.STORE, vector=UD, rdx=_SEALED),
        ),
        row(
            "5.memory.execute",
            _MEMORY,
            "a fetch: RIP is the target; no instruction bytes; the length is that of the branch, or 0",
            "TLFS, openvmm; KUT",
            forget(),
            Put(at=_CODE, data=code.RET),
            protect([_CODE >> 12], R | W),
            SetAnswer(answer=Answer.OPEN),
            run(code.CALL, rdx=_CODE),
            messages(1),
            fields(memory, *place(_CODE, EXECUTE, by(0, 0, 2), _CODE), (44, b"\0")),
        ),
        row(
            "5.memory.write-code",
            _MEMORY,
            "what VTL0 may write and not execute it writes without a message",
            "TLFS",
            forget(),
            protect([_CODE >> 12], R | W),
            run(code.STORE, rdx=_CODE, r8=0xC3),
            messages(0),
        ),
        row(
            "5.memory.own",
            _MEMORY,
            "VTL1 executes what it keeps from VTL0",
            "TLFS",
            forget(),
            protect([_HIDDEN >> 12], 0),
            Put(at=_HIDDEN, data=code.READ_CR0, vtl=1),
            run(code.CALL, 0x8000_0011, mask=0x8000_0011, rdx=_HIDDEN, vtl=1),
            messages(0),
        ),
        row(
            "2.input.protected",
            _ABI,
            "input that the caller may not read",
            "openvmm",
            protect([_HIDDEN >> 12], 0),
            call(C.GET_VP_REGISTERS, b"", S.INVALID_HYPERCALL_INPUT, count=1, at=_HIDDEN),
        ),
        row(
            "2.output.protected",
            _ABI,
            "output that the caller may not write",
            "openvmm",
            protect([_SEALED >> 12], R),
            call(
                C.GET_VP_REGISTERS,
                header() + struct.pack("<I", N.VSM_VP_STATUS),
                S.INVALID_HYPERCALL_INPUT,
                count=1,
                out=_SEALED,
            ),
            See(at=_SEALED, value=word),
        ),
        row(
            "2.input.own",
            _ABI,
            "VTL1 may have its input where VTL0 may not look",
            "TLFS",
            Put(at=_HIDDEN, data=header() + struct.pack("<I", N.VSM_VP_STATUS), vtl=1),
            call(C.GET_VP_REGISTERS, b"", count=1, at=_HIDDEN, vtl=1, output=(1 | 3 << 16).to_bytes(16, "little")),
        ),
        row(
            "4.translate.no-read",
            _TRANSLATE,
            "result 5: a page that VTL0 may not read",
            "TLFS",
            call(
                C.TRANSLATE_VIRTUAL_ADDRESS,
                translation(_HIDDEN, target=VTL0_TARGET),
                vtl=1,
                output=struct.pack("<I", 5),
            ),
        ),
        row(
            "4.translate.no-write",
            _TRANSLATE,
            "result 6: a page that VTL0 may not write",
            "TLFS",
            call(C.TRANSLATE_VIRTUAL_ADDRESS, translation(_SEALED, 2, VTL0_TARGET), vtl=1, output=struct.pack("<I", 6)),
        ),
        row(
            "4.translate.readable",
            _TRANSLATE,
            "and it can read it",
            "TLFS",
            call(C.TRANSLATE_VIRTUAL_ADDRESS, translation(_SEALED, 1, VTL0_TARGET), vtl=1, output=found(_SEALED)),
        ),
    ]


def rows(by: By) -> list[Row]:
    return [bring_up("protection"), *_config(by), *_rules(by), *_memory(by)]
