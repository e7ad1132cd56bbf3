"""Interrupts across levels (section 4): those of VTL1 come first; VTL1 can hear of those that wait for VTL0."""

from __future__ import annotations

import struct

from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.registers import HvRegister as N
from vtlab.hyperv.synic import TimerConfig
from vtlab_conformance import code
from vtlab_conformance.calls import GP, VTL0_TARGET, VTL1_TARGET, By, C, S, call, put, row, run, write_msr
from vtlab_conformance.layout import AFTER, ASSIST_PAGE, BEFORE, STATUS, Answer, code_page, counter, report
from vtlab_conformance.rows.protection import bring_up
from vtlab_conformance.rows.vtl0_services import ipi, ipi_ex, taken
from vtlab_conformance.steps import Delay, Put, Row, See, SetAnswer, Step

_IPI = "3 HvCallSendSyntheticClusterIpi(Ex)"
_PREEMPT = "4 Interrupts of VTL1"
_VINA = "4 VINA"
_MILLISECOND = 10_000
TIMER = 0x71


def arm(milliseconds: int = 5, vector: int = TIMER, vtl: int = 1) -> list[Step]:
    """A level's synthetic timer 0, direct: raises the vector so much later."""
    config = int(TimerConfig.DIRECT | TimerConfig.AUTO_ENABLE) | vector << 4
    return [*write_msr(HvMsr.STIMER0_CONFIG, config, vtl=vtl), *run(code.ARM, rdx=milliseconds * _MILLISECOND, vtl=vtl)]


# Ends when VTL1 moves RIP to its last byte: pause; jmp; ret
_SPIN = code.SPIN + code.RET


def seen(vector: int, times: int, vtl: int) -> See:
    """The level has taken that vector so often by now."""
    return See(at=counter(vector, vtl), value=struct.pack("<I", times), vtl=1)


def _ipis(by: By) -> list[Row]:
    one, many = C.SEND_SYNTHETIC_CLUSTER_IPI, C.SEND_SYNTHETIC_CLUSTER_IPI_EX
    above = by(S.ACCESS_DENIED, S.ACCESS_DENIED, S.SUCCESS)
    arrived = 0 if above else 1
    return [
        row(
            "4.ipi.up",
            _IPI,
            "from VTL0 to VTL1: refused, or taken at once",
            "openvmm; KUT",
            call(one, ipi(0x81, target=VTL1_TARGET), above),
            See(at=counter(0x81, 1), value=struct.pack("<I", arrived), wait=True),
        ),
        row(
            "4.ipi-ex.up",
            _IPI,
            "Ex: from VTL0 to VTL1: refused, or taken at once",
            "openvmm; KUT",
            call(many, ipi_ex(0x82, 1, target=VTL1_TARGET), above, words=1),
            See(at=counter(0x82, 1), value=struct.pack("<I", arrived), wait=True),
        ),
        row(
            "4.ipi.down",
            _IPI,
            "from VTL1 to VTL0: waits until VTL0 runs",
            "KUT",
            call(one, ipi(0x83, target=VTL0_TARGET), vtl=1),
            seen(0x83, 0, 0),
            taken(0x83, 1),
        ),
        row(
            "4.ipi-ex.down",
            _IPI,
            "Ex: from VTL1 to VTL0",
            "KUT",
            call(many, ipi_ex(0x84, 1, target=VTL0_TARGET), words=1, vtl=1),
            taken(0x84, 1),
        ),
        row(
            "4.ipi.own",
            _IPI,
            "from VTL1 to VTL1, which is the target where none is named",
            "KUT",
            call(one, ipi(0x85), vtl=1),
            See(at=counter(0x85, 1), value=struct.pack("<I", 1), wait=True, vtl=1),
            seen(0x85, 0, 0),
        ),
        row(
            "4.ipi-ex.own",
            _IPI,
            "Ex: from VTL1 to VTL1",
            "KUT",
            call(many, ipi_ex(0x86, 1), words=1, vtl=1),
            See(at=counter(0x86, 1), value=struct.pack("<I", 1), wait=True, vtl=1),
        ),
        row(
            "4.ipi.lower-keeps",
            _IPI,
            "from VTL0 to itself, while VTL1 is there",
            "KUT",
            call(one, ipi(0x87)),
            taken(0x87, 1),
            seen(0x87, 0, 1),
        ),
        row(
            "4.ipi.vtl2",
            _IPI,
            "from VTL1 to a level that there is not",
            "openvmm",
            call(one, ipi(0x88, target=0x12), S.INVALID_PARAMETER, vtl=1),
        ),
        row(
            "4.ipi.without",
            _IPI,
            "from VTL1 to VTL1 of a VP that has none",
            "openvmm",
            call(one, ipi(0x88, 2), S.INVALID_VTL_STATE, vtl=1),
        ),
        row(
            "4.ipi-ex.without",
            _IPI,
            "Ex: from VTL1 to VTL1 of a VP that has none",
            "openvmm",
            call(many, ipi_ex(0x88, 2), S.INVALID_VTL_STATE, words=1, vtl=1),
        ),
    ]


def _preempts() -> list[Row]:
    spin_end = code_page(0) + len(code.SPIN)
    pattern = struct.pack("<16Q", *(0x7700 + 0x11 * number for number in range(16)))
    go = SetAnswer(answer=Answer.GO | Answer.ALWAYS, value=spin_end)
    event = 1 | 1 << 8 | GP << 16
    return [
        row(
            "4.preempt.spins",
            _PREEMPT,
            "a timer of VTL1 preempts VTL0, which spins with interrupts closed",
            "TLFS, KUT",
            go,
            arm(),
            run(_SPIN),
        ),
        row(
            "4.preempt.reason",
            _PREEMPT,
            "the entry is for an interrupt, and counted as one",
            "TLFS",
            See(at=report(1) + STATUS + 16, value=struct.pack("<Q", 2)),
        ),
        row(
            "4.preempt.registers",
            _PREEMPT,
            "VTL0 finds RAX, RCX and all others as they were",
            "TLFS",
            Put(at=report(0) + BEFORE, data=pattern),
            arm(),
            Put(at=report(0) + BEFORE, data=pattern),
            run(_SPIN, 0x7700, rax=0x7700, rcx=0x7711, rdx=0x7722, r8=0x7788),
            See(at=report(0) + AFTER, value=pattern, mask=b"\xff" * 32 + b"\0" * 8 + b"\xff" * 88),
        ),
        row(
            "4.preempt.halts",
            _PREEMPT,
            "HLT of VTL0, interrupts closed, does not stop VTL1",
            "openvmm",
            SetAnswer(answer=Answer.GO | Answer.ALWAYS, value=code_page(0) + 1),
            arm(),
            run(code.HALT),
        ),
        row(
            "4.preempt.wakes",
            _PREEMPT,
            "an event that VTL1 injects ends VTL0's HLT",
            "openvmm",
            SetAnswer(answer=Answer.EVENT | Answer.ALWAYS, value=event),
            arm(),
            run(code.HALT, vector=GP),
        ),
        row(
            "4.preempt.priority",
            _PREEMPT,
            "only TPR of VTL1 holds its interrupts back",
            "TLFS",
            SetAnswer(answer=Answer.NOTHING),
            write_msr(HvMsr.TPR, 0xF0, vtl=1),
            arm(1, TIMER + 1),
            Delay(duration=20 * _MILLISECOND),
            See(at=counter(TIMER + 1, 1), value=bytes(4)),
            write_msr(HvMsr.TPR, 0, vtl=1),
            See(at=counter(TIMER + 1, 1), value=struct.pack("<I", 1), wait=True),
        ),
        row(
            "4.preempt.higher",
            _PREEMPT,
            "VTL1 is not preempted by what comes for VTL0",
            "TLFS",
            call(C.SEND_SYNTHETIC_CLUSTER_IPI, ipi(0x89, target=VTL0_TARGET), vtl=1),
            Delay(duration=5 * _MILLISECOND, vtl=1),
            seen(0x89, 0, 0),
            taken(0x89, 1),
        ),
    ]


_NOTICE = 0x91
_ENABLE, _AUTO_RESET = 1 << 8, 1 << 9


def _vina() -> list[Row]:
    down = call(C.SEND_SYNTHETIC_CLUSTER_IPI, ipi(0x92, target=VTL0_TARGET), vtl=1)
    again = call(C.SEND_SYNTHETIC_CLUSTER_IPI, ipi(0x93, target=VTL0_TARGET), vtl=1)
    asserted = report(1) + ASSIST_PAGE + 12
    return [
        row(
            "4.vina.off",
            _VINA,
            "without VsmVina VTL1 does not hear of interrupts that wait for VTL0",
            "TLFS",
            down,
            See(at=asserted, value=b"\0", vtl=1),
            taken(0x92, 1),
        ),
        row(
            "4.vina.raised",
            _VINA,
            "an interrupt for VTL0 that waits raises the vector in VTL1, and is told in the assist page",
            "TLFS",
            put(N.VSM_VINA, _NOTICE | _ENABLE | _AUTO_RESET, vtl=1),
            down,
            See(at=counter(_NOTICE, 1), value=struct.pack("<I", 1), wait=True, vtl=1),
            See(at=asserted, value=b"\1", vtl=1),
            taken(0x92, 2),
        ),
        row(
            "4.vina.once",
            _VINA,
            "a second interrupt while it is asserted raises nothing",
            "TLFS",
            down,
            See(at=counter(_NOTICE, 1), value=struct.pack("<I", 2), wait=True, vtl=1),
            again,
            Delay(duration=_MILLISECOND, vtl=1),
            See(at=counter(_NOTICE, 1), value=struct.pack("<I", 2), wait=True, vtl=1),
            taken(0x93, 1),
        ),
        row(
            "4.vina.auto-reset",
            _VINA,
            "with auto-reset it is raised anew after VTL1 was left",
            "TLFS, openvmm",
            down,
            See(at=counter(_NOTICE, 1), value=struct.pack("<I", 3), wait=True, vtl=1),
            taken(0x92, 4),
        ),
        row(
            "4.vina.timer",
            _VINA,
            "an interrupt that VTL0's own timer raises meanwhile, or raised before with interrupts closed",
            "TLFS",
            arm(1, TIMER + 2, vtl=0),
            See(at=counter(_NOTICE, 1), value=struct.pack("<I", 4), wait=True, vtl=1),
            taken(TIMER + 2, 1),
        ),
        row(
            "4.vina.disabled",
            _VINA,
            "it can be turned off again",
            "TLFS",
            put(N.VSM_VINA, 0, vtl=1),
            down,
            Delay(duration=_MILLISECOND, vtl=1),
            See(at=counter(_NOTICE, 1), value=struct.pack("<I", 4), vtl=1),
            taken(0x92, 5),
        ),
    ]


def rows(by: By) -> list[Row]:
    return [bring_up("interrupts"), *_ipis(by), *_preempts(), *_vina()]
