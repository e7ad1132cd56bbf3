"""Section 6: MBEC, with which execution at CPL3 has a right of its own."""

from __future__ import annotations

import struct

from vtlab.hyperv.messages import EXECUTE, InterceptType
from vtlab.hyperv.registers import HvRegister as N
from vtlab_conformance import code
from vtlab_conformance.calls import VTL0_TARGET, By, C, S, call, get, protect, put, row, run
from vtlab_conformance.layout import USER_RETURN, USER_VIEW, Answer, page
from vtlab_conformance.rows.before_vtl1 import enable
from vtlab_conformance.rows.protection import (
    BAD,
    CONFIG,
    ENABLED,
    FULL,
    KMX,
    UMX,
    R,
    W,
    bring_up,
    fields,
    forget,
    messages,
)
from vtlab_conformance.steps import Put, Row, Run, SetAnswer, Step

_MBEC = "6 MBEC"
_SECURE = N.VSM_VP_SECURE_CONFIG_VTL0
_CODE = page(40)


def _user(address: int = _CODE, vector: int = USER_RETURN) -> Run:
    """Runs at CPL3; INT 0x80 is how it ends."""
    return Run(address=address + USER_VIEW, user=True, vector=vector)


def _kernel() -> list[Step]:
    steps: list[Step] = run(code.CALL, rdx=_CODE + len(code.USER_END))
    return steps


def rows(by: By) -> list[Row]:
    return [
        bring_up("mbec", 1),
        row(
            "6.mbec.partition",
            _MBEC,
            "VsmPartitionStatus shows MBEC of VTL1",
            "TLFS",
            get(N.VSM_PARTITION_STATUS, 3 | 1 << 16 | 2 << 20),
        ),
        row(
            "6.mbec.again",
            _MBEC,
            "VTL1 is not enabled a second time without it",
            "openvmm; KUT",
            call(C.ENABLE_PARTITION_VTL, enable(1), by(S.INVALID_PARAMETER, S.INVALID_VTL_STATE, S.INVALID_PARAMETER)),
        ),
        row(
            "6.mbec.off",
            _MBEC,
            "it is off on a VP at first",
            "TLFS",
            get(_SECURE, 0, vtl=1),
            get(N.VSM_VP_STATUS, 3 << 16),
        ),
        row(
            "6.mbec.vp-without",
            _MBEC,
            "where it is off, KMX governs CPL3 too: UMX alone lets nobody execute, a fetch at CPL3 is a message",
            "TLFS",
            put(CONFIG, ENABLED, vtl=1),
            Put(at=_CODE, data=code.USER_END + code.RET),
            SetAnswer(answer=Answer.OPEN),
            protect([_CODE >> 12], R | UMX),
            _user(),
            messages(1),
            fields(InterceptType.GPA_INTERCEPT, (5, struct.pack("<B", EXECUTE)), (6, struct.pack("<B", 0x17))),
        ),
        row("6.mbec.vtl0", _MBEC, "VTL0 cannot turn it on for itself", "openvmm", put(_SECURE, 1, S.ACCESS_DENIED)),
        row(
            "6.mbec.on",
            _MBEC,
            "VTL1 turns it on for VTL0 of a VP; VsmVpStatus shows it",
            "TLFS",
            put(_SECURE, 1, vtl=1),
            get(_SECURE, 1, vtl=1),
            get(N.VSM_VP_STATUS, 3 << 16 | 1 << 4),
        ),
        row(
            "6.mbec.vp-off",
            _MBEC,
            "and off again for a VP: refused by openvmm, where all follow the partition",
            "openvmm; TLFS",
            put(_SECURE, 0, by(S.SUCCESS, BAD, S.SUCCESS), vtl=1),
            forget(),
            protect([_CODE >> 12], R | UMX),
            _user(),
            messages(by(1, 0, 1)),
            put(_SECURE, 1, vtl=1),
        ),
        row(
            "6.mbec.both",
            _MBEC,
            "all rights: code runs at CPL0 and at CPL3",
            "TLFS",
            Put(at=_CODE, data=code.USER_END + code.RET),
            protect([_CODE >> 12], FULL),
            _kernel(),
            _user(),
        ),
        row(
            "6.mbec.user",
            _MBEC,
            "UMX alone: code runs at CPL3; at CPL0 its fetch is a message",
            "TLFS",
            forget(),
            SetAnswer(answer=Answer.OPEN),
            protect([_CODE >> 12], R | UMX),
            _user(),
            messages(0),
            _kernel(),
            messages(1),
            fields(InterceptType.GPA_INTERCEPT, (5, struct.pack("<B", EXECUTE)), (6, struct.pack("<B", 0x14))),
        ),
        row(
            "6.mbec.data",
            _MBEC,
            "R, W and UMX, as Linux maps data: written, and executed at CPL3",
            "Linux",
            forget(),
            protect([_CODE >> 12], R | W | UMX),
            Put(at=_CODE, data=code.USER_END + code.RET),
            _user(),
            messages(0),
        ),
        row(
            "6.mbec.neither",
            _MBEC,
            "no execution: a fetch at CPL3 is a message, CPL 3 in its state",
            "TLFS",
            forget(),
            protect([_CODE >> 12], R | W),
            _user(),
            messages(1),
            fields(InterceptType.GPA_INTERCEPT, (5, struct.pack("<B", EXECUTE)), (6, struct.pack("<B", 0x17))),
        ),
        row(
            "6.mbec.kernel-alone",
            _MBEC,
            "KMX without UMX is not legal",
            "openvmm",
            protect([_CODE >> 12], R | KMX, BAD),
        ),
        row(
            "6.mbec.rx",
            _MBEC,
            "R, KMX and UMX, as Linux maps text",
            "Linux",
            forget(),
            protect([_CODE >> 12], R | KMX | UMX),
            _kernel(),
            _user(),
            messages(0),
        ),
        row(
            "6.mbec.target",
            _MBEC,
            "VsmVpSecureConfigVtl0 is named by its register, not by the target level",
            "TLFS",
            get(_SECURE, 1, target=VTL0_TARGET, vtl=1),
        ),
    ]
