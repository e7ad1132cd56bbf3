"""VTL1 on a second VP, what the levels of two VPs do to each other, and starting VPs where VTL1 decides on it."""

from __future__ import annotations

import struct

from vtlab.hyperv.hypercalls import VP_SELF
from vtlab.hyperv.messages import InterceptType
from vtlab.hyperv.registers import HvRegister as N
from vtlab.x86.registers import Msr
from vtlab_conformance import code
from vtlab_conformance.calls import (
    VTL0_TARGET,
    VTL1_TARGET,
    By,
    C,
    S,
    call,
    get,
    protect,
    put,
    read_msr,
    row,
    run,
    write_msr,
)
from vtlab_conformance.layout import MESSAGE, MESSAGE_COUNT, STATUS, Answer, counter, page, report
from vtlab_conformance.rows.protection import CONFIG, ENABLED, R, bring_up
from vtlab_conformance.rows.vtl0_services import enable_vp, ipi, start, taken
from vtlab_conformance.steps import Delay, Join, Put, Row, See, SetAnswer, Step

_ENABLE_VP = "3 HvCallEnableVpVtl"
_REGISTERS = "3 HvCallGetVpRegisters, HvCallSetVpRegisters"
_IPI = "3 HvCallSendSyntheticClusterIpi(Ex)"
_LOCK = "4 TLB lock"
_MEMORY = "5 Memory intercepts"
_START = "3 HvCallStartVirtualProcessor"
_STARTUP = "6 Starting VPs"
_DENY = 1 << 6
_MILLISECOND = 10_000
_FLAG, _DONE = page(60), page(60) + 8
_SEALED = page(61)
_LSTAR = 0x0008_0009
_OLD, _NEW = 0x1000, 0xFFFF_8000_0000_5000


def entered(times: int, by: int = 0, vp: int = 1) -> See:
    """VTL1 of that VP was entered so often by a VTL call (0) or an interrupt (1)."""
    return See(at=report(1, vp) + STATUS + 8 * by, value=struct.pack("<Q", times), wait=True)


def together(by: By) -> list[Row]:
    """Two VPs with VTL1."""
    again = by(S.VTL_ALREADY_ENABLED, S.VTL_ALREADY_ENABLED, S.INVALID_PARAMETER)
    refused = by(S.ACCESS_DENIED, S.ACCESS_DENIED, S.INVALID_PARAMETER)
    one = by(S.SUCCESS, S.ACCESS_DENIED, S.SUCCESS)
    one_set = by(S.SUCCESS, S.INVALID_VP_INDEX, S.SUCCESS)
    up = by(S.ACCESS_DENIED, S.ACCESS_DENIED, S.SUCCESS)
    send = C.SEND_SYNTHETIC_CLUSTER_IPI
    return [
        bring_up("processors"),
        row(
            "3.enable-vp.again",
            _ENABLE_VP,
            "VTL1, for a VP that has it",
            "openvmm; KUT",
            enable_vp(0, 1, again, caller=1),
        ),
        row(
            "3.enable-vp.running",
            _ENABLE_VP,
            "a VP that runs in VTL0 gets VTL1 from VTL1",
            "TLFS, KUT",
            start(1, 0),
            put_ready(),
            enable_vp(1, 1, caller=1),
        ),
        row(
            "3.enable-vp.other-again",
            _ENABLE_VP,
            "and not a second time",
            "openvmm; KUT",
            enable_vp(1, 1, again, caller=1),
        ),
        row(
            "3.enable-vp.other-vtl0",
            _ENABLE_VP,
            "VTL0, for another VP that has it",
            "openvmm; KUT",
            enable_vp(1, 1, refused),
        ),
        row(
            "4.call.other",
            "4 VTL call and return",
            "VTL1 of the second VP starts with its own first call",
            "TLFS",
            run(code.VTL_CALL, vp=1),
            entered(1),
        ),
        row(
            "4.vp-status.other",
            "4 VSM registers",
            "VsmVpStatus of the second VP",
            "TLFS",
            get(N.VSM_VP_STATUS, 3 << 16, vp=1),
            get(N.VSM_VP_STATUS, 1 | 3 << 16, vp=1, vtl=1),
        ),
        row(
            "4.set.other-runs",
            _REGISTERS,
            "VTL1: LSTAR of VTL0 of another VP, which runs: it finds the new value",
            "openvmm; TLFS",
            write_msr(Msr.LSTAR, _OLD, vp=1),
            put(_LSTAR, _NEW, one_set, vp_index=1, target=VTL0_TARGET, vtl=1),
            read_msr(Msr.LSTAR, _OLD if one_set else _NEW, vp=1),
        ),
        row(
            "4.get.other-runs",
            _REGISTERS,
            "VTL1: LSTAR of VTL0 of another VP, which has written it",
            "openvmm; TLFS",
            write_msr(Msr.LSTAR, _OLD, vp=1),
            get(_LSTAR, None if one else _OLD, one, vp_index=1, target=VTL0_TARGET, vtl=1),
        ),
        row(
            "4.set.other-own",
            _REGISTERS,
            "VTL1: LSTAR of VTL1 of another VP, where a level may name its own",
            "KUT",
            put(_LSTAR, _NEW, one_set, vp_index=1, target=VTL1_TARGET, vtl=1),
            get(_LSTAR, None if one else _NEW, one, vp_index=1, target=VTL1_TARGET, vtl=1),
            [] if one_set else read_msr(Msr.LSTAR, _NEW, vtl=1, vp=1),
        ),
        row(
            "4.get.other-vina",
            _REGISTERS,
            "VTL1: VsmVina of another VP",
            "openvmm; TLFS",
            get(N.VSM_VINA, None if one else 0, one, vp_index=1, vtl=1),
        ),
        row(
            "4.set.other-vina",
            _REGISTERS,
            "VTL1: VsmVina of another VP",
            "openvmm; TLFS",
            put(N.VSM_VINA, 0x55, one_set, vp_index=1, vtl=1),
            put(N.VSM_VINA, 0, one_set, vp_index=1, vtl=1),
        ),
        row(
            "4.get.other-intercepts",
            _REGISTERS,
            "VTL1: CrInterceptControl of another VP",
            "openvmm; TLFS",
            get(N.CR_INTERCEPT_CONTROL, None if one else 0, one, vp_index=1, target=VTL1_TARGET, vtl=1),
        ),
        row(
            "4.ipi.across",
            _IPI,
            "VTL1 to VTL1 of another VP, which runs in VTL0: it is preempted at once",
            "KUT",
            call(send, ipi(0xA1, 2), vtl=1),
            See(at=counter(0xA1, 1, 1), value=struct.pack("<I", 1), wait=True),
        ),
        row(
            "4.ipi.across-down",
            _IPI,
            "VTL1 to VTL0 of another VP",
            "KUT",
            call(send, ipi(0xA2, 2, target=0x10), vtl=1),
            taken(0xA2, 1, vp=1, on=1),
        ),
        row(
            "4.ipi.across-up",
            _IPI,
            "VTL0 to VTL1 of another VP: refused, or taken",
            "openvmm; KUT",
            call(send, ipi(0xA3, 2, target=VTL1_TARGET), up),
            See(at=counter(0xA3, 1, 1), value=struct.pack("<I", 0 if up else 1), wait=True),
        ),
        row(
            "4.ipi.all",
            _IPI,
            "VTL1 to VTL1 of all VPs",
            "KUT",
            call(send, ipi(0xA4, 3), vtl=1),
            See(at=counter(0xA4, 1, 1), value=struct.pack("<I", 1), wait=True),
            See(at=counter(0xA4, 1, 0), value=struct.pack("<I", 1), wait=True),
        ),
        row(
            "5.memory.every-vp",
            _MEMORY,
            "what VTL1 protects on one VP it protects on all; the message is the other VP's VTL1's",
            "TLFS",
            put(CONFIG, ENABLED, vtl=1),
            protect([_SEALED >> 12], R),
            SetAnswer(answer=Answer.SKIP, vp=1),
            run(code.STORE, rdx=_SEALED, r8=1, vp=1),
            See(at=report(1, 1) + MESSAGE_COUNT, value=struct.pack("<Q", 1)),
            See(
                at=report(1, 1) + MESSAGE,
                value=struct.pack("<I12xIBB", InterceptType.GPA_INTERCEPT, 1, 3, 1),
                mask=b"\xff" * 4 + b"\0" * 12 + b"\xff" * 6,
            ),
            See(at=_SEALED, value=bytes(8)),
        ),
        row(
            "4.lock.waits",
            _LOCK,
            "a flush by VTL0 of another VP waits while VTL1 holds the lock, and goes on when VTL1 is left",
            "TLFS",
            Put(at=_FLAG, data=bytes(16)),
            _flush_later(),
            put(N.VSM_VP_SECURE_CONFIG_VTL0, 2, vtl=1),
            Put(at=_FLAG, data=b"\1", vtl=1),
            Delay(duration=30 * _MILLISECOND, vtl=1),
            See(at=_DONE, value=b"\0", vtl=1),
            Join(of_vp=1),
            See(at=_DONE, value=b"\1"),
        ),
        row(
            "4.lock.released",
            _LOCK,
            "or when VTL1 gives it back",
            "TLFS",
            Put(at=_FLAG, data=bytes(16)),
            _flush_later(),
            put(N.VSM_VP_SECURE_CONFIG_VTL0, 2, vtl=1),
            Put(at=_FLAG, data=b"\1", vtl=1),
            Delay(duration=10 * _MILLISECOND, vtl=1),
            put(N.VSM_VP_SECURE_CONFIG_VTL0, 0, vtl=1),
            See(at=_DONE, value=b"\1", wait=True, vtl=1),
            Join(of_vp=1),
        ),
        row(
            "4.lock.own",
            _LOCK,
            "VTL1's own flushes do not wait",
            "TLFS",
            put(N.VSM_VP_SECURE_CONFIG_VTL0, 2, vtl=1),
            call(C.FLUSH_VIRTUAL_ADDRESS_SPACE, struct.pack("<QQQ", 0, 3, 0), vtl=1),
        ),
    ]


def put_ready() -> list[Step]:
    """The second VP answers: it runs in VTL0."""
    return [Put(at=_FLAG, data=b"\1", vp=1)]


def _flush_later() -> list[Step]:
    """The second VP, by itself: waits for the flag, flushes all VPs, says that it has."""
    return [
        See(at=_FLAG, value=b"\1", wait=True, vp=1, together=False),
        *call(C.FLUSH_VIRTUAL_ADDRESS_SPACE, struct.pack("<QQQ", 0, 3, 0), vp=1, together=False),
        Put(at=_DONE, data=b"\1", vp=1, together=False),
    ]


def startup(_by: By) -> list[Row]:
    """The second VP is not started yet."""
    return [
        bring_up("startup"),
        row(
            "6.start.deny",
            _STARTUP,
            "DenyLowerVtlStartup: VTL0 may not start a VP",
            "openvmm",
            put(CONFIG, ENABLED | _DENY, vtl=1),
            start(1, 0, S.ACCESS_DENIED),
        ),
        row(
            "6.start.without",
            _START,
            "VTL1 of a VP that has none",
            "openvmm",
            start(1, 1, S.INVALID_VP_STATE, caller=1),
        ),
        row(
            "6.start.above",
            _START,
            "VTL1, for a level that there is not",
            "openvmm",
            start(1, 2, S.ACCESS_DENIED, caller=1),
        ),
        row("6.start.self", _START, "VTL1, for its own VP", "openvmm", start(VP_SELF, 1, S.INVALID_VP_INDEX, caller=1)),
        row(
            "6.start.enabled",
            _STARTUP,
            "VTL1 is enabled on a VP that does not run: nothing runs by that",
            "TLFS",
            enable_vp(1, 1, caller=1),
            entered(0),
        ),
        row(
            "6.start.lower",
            _STARTUP,
            "VTL1 starts VTL0 there: the VP begins in its highest level, with the context of each",
            "TLFS",
            start(1, 0, caller=1),
            entered(1, by=0),
            Put(at=_FLAG, data=b"\1", vp=1),
        ),
        row(
            "6.start.again", _STARTUP, "once in the life of a VP", "openvmm", start(1, 0, S.INVALID_VP_STATE, caller=1)
        ),
        row("6.start.call", _STARTUP, "its VTL1 can be called", "TLFS", run(code.VTL_CALL, vp=1), entered(2)),
    ]
