"""Entering VTL1: the state machine, numbers, several vCPUs, attaching and detaching, the verdict log."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.monitor import kernel_image as image
from tests.unit.monitor.conftest import POLICY
from tests.unit.monitor.vtl0 import Vtl0, boot_image
from vtl1_monitor.monitor import Monitor
from vtl1_monitor.verdicts import VerdictLog
from vtlab.errors import BadArgument, BadImage, Conflict, NotFound, Unsupported, VtlabError, WrongState
from vtlab.ram import RamFile
from vtlab.services import Service
from vtlab.session import Session
from vtlab.v1 import monitor_pb2, registers_pb2, vcpu_pb2

CALL, RESUME = vcpu_pb2.ENTER_REASON_VTL_CALL, vcpu_pb2.ENTER_REASON_RESUME
REASONS = [value for value in vcpu_pb2.EnterReason.values() if value]


def take_policy_call(vtl0: Vtl0, vp_index: int = 0) -> vcpu_pb2.Exit:
    """Enters with TAKE_POLICY and stops at its first request."""
    vtl0.write(image.FREE, POLICY.encode())
    registers = registers_pb2.Registers()
    registers.CopyFrom(vtl0.registers)
    registers.rdi, registers.rsi, registers.rdx = Service.TAKE_POLICY, image.FREE, len(POLICY)
    return vtl0.enter(CALL, vp_index, registers=registers)


@pytest.mark.parametrize("reason", [0, RESUME, vcpu_pb2.ENTER_REASON_INTERRUPT, 65535])
def test_what_an_idle_vcpu_is_not_entered_with(vtl0: Vtl0, reason: vcpu_pb2.EnterReason.ValueType) -> None:
    with pytest.raises(WrongState, match="waits for VTL0"):
        vtl0.enter(reason)


@pytest.mark.parametrize("reason", [reason for reason in vcpu_pb2.EnterReason.values() if reason != RESUME])
def test_in_the_middle_of_a_service_only_its_status_is_taken(
    vtl0: Vtl0, reason: vcpu_pb2.EnterReason.ValueType
) -> None:
    assert take_policy_call(vtl0).WhichOneof("reason") == "protect"
    with pytest.raises(WrongState, match="waits for its protection"):
        vtl0.enter(reason, registers=vtl0.registers)
    assert vtl0.machine.serving is not None


def test_enabling_answers_at_once(vtl0: Vtl0) -> None:
    assert vtl0.enter(vcpu_pb2.ENTER_REASON_ENABLE).vtl_return == vcpu_pb2.VtlReturn()


def test_origin_and_reason_must_agree(vtl0: Vtl0) -> None:
    """A client's write cannot pass for VTL0's own, which a grant could let through."""
    exit_ = vcpu_pb2.Exit(origin=vcpu_pb2.ORIGIN_CLIENT, msr=vcpu_pb2.MsrAccess(index=1, write=True))
    with pytest.raises(WrongState, match="origin"):
        vtl0.enter(vcpu_pb2.ENTER_REASON_INTERCEPT, intercept=exit_)


def test_an_exit_has_the_number_and_level_of_its_enter(vtl0: Vtl0) -> None:
    exit_ = vtl0.enter(vcpu_pb2.ENTER_REASON_ENABLE)
    assert (exit_.vp_index, exit_.vtl, exit_.sequence) == (0, 1, 1)


def test_a_repeated_enter_does_nothing_twice(locked: Vtl0) -> None:
    locked.registers.rdi, locked.registers.rsi = Service.CHALLENGE, image.FREE
    first = locked.enter(CALL, registers=locked.registers)
    nonce = locked.read(image.FREE, 32)
    locked._sequence[0] -= 1
    assert locked.enter(CALL, registers=locked.registers) == first
    assert locked.read(image.FREE, 32) == nonce
    locked._sequence[0] -= 1
    with pytest.raises(Conflict, match="another content"):
        locked.enter(RESUME)


def test_there_is_no_such_vcpu(vtl0: Vtl0) -> None:
    with pytest.raises(NotFound):
        vtl0.monitor.run(vcpu_pb2.Enter(vp_index=1, sequence=1, reason=vcpu_pb2.ENTER_REASON_ENABLE))
    with pytest.raises(Unsupported):
        vtl0.monitor.state(0)
    assert vtl0.monitor.kick(0, 1) is False


def test_another_vcpu_waits_until_a_service_is_done(tmp_path: Path) -> None:
    """In the middle of TAKE_POLICY nobody else finds a half-taken policy."""
    vtl0 = Vtl0(tmp_path, image.kernel(), vp_count=2)
    try:
        exit_ = take_policy_call(vtl0)
        answers: list[vcpu_pb2.Exit] = []
        registers = registers_pb2.Registers(rdi=Service.LOCK_REGS, cr0=1, cr3=image.PML4)
        other = threading.Thread(target=lambda: answers.append(vtl0.enter(CALL, 1, registers=registers)))
        other.start()
        while exit_.WhichOneof("reason") == "protect":
            assert not answers
            for update in exit_.protect.protections:
                vtl0.apply(update)
            exit_ = vtl0.enter(RESUME)
        other.join(10)
        (answer,) = answers
        (r8,) = [update.register.value for update in answer.vtl_return.updates]
        assert r8 == (1 << 64) - errno.EINVAL, "CR0 does not satisfy the policy, which is known by now"
    finally:
        vtl0.close()


def test_detaching_ends_who_waits(tmp_path: Path) -> None:
    vtl0 = Vtl0(tmp_path, image.kernel(), vp_count=2)
    failures: list[VtlabError] = []

    def enter() -> None:
        try:
            vtl0.enter(CALL, 1, registers=registers_pb2.Registers(rdi=Service.PING))
        except VtlabError as error:
            failures.append(error)

    take_policy_call(vtl0)
    other = threading.Thread(target=enter)
    other.start()
    vtl0.close()
    other.join(10)
    assert [type(error) for error in failures] == [WrongState]


def request(vtl0: Vtl0, directory: Path, **changes: object) -> vcpu_pb2.AttachRequest:
    fields: dict[str, object] = {
        "vm": "vm",
        "generation": 1,
        "vtl": 1,
        "vp_count": 1,
        "ram_size": image.RAM_SIZE,
        "memory_directory": str(directory),
        "image": boot_image(directory),
    }
    return vcpu_pb2.AttachRequest(**fields | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vm": "other"}, WrongState),
        ({"generation": 0}, Conflict),
        ({"generation": 2, "vtl": 0}, BadArgument),
        ({"generation": 2, "vp_count": 0}, BadArgument),
        ({"generation": 2, "vp_count": 1000}, BadArgument),
        ({"generation": 2, "ram_size": image.RAM_SIZE + 4096}, BadArgument),
        ({"generation": 2, "ram_size": 0}, BadArgument),
        ({"generation": 2, "image": vcpu_pb2.BootImage(path="../image")}, BadArgument),
        ({"generation": 2, "image": vcpu_pb2.BootImage(path="/etc/passwd")}, BadArgument),
        ({"generation": 2, "image": vcpu_pb2.BootImage(path="absent")}, BadImage),
        ({"generation": 2, "image": vcpu_pb2.BootImage(path="image", sha256=bytes(32))}, BadImage),
        ({"generation": 2, "image": vcpu_pb2.BootImage(path="image")}, BadArgument),
    ],
)
def test_refused_attachments_leave_what_is(
    locked: Vtl0, tmp_path: Path, changes: dict[str, object], error: type[VtlabError]
) -> None:
    with pytest.raises(error):
        locked.monitor.attach(request(locked, tmp_path, **changes))
    assert locked.call(Service.PING).value == 0
    assert locked.monitor.policy("vm").locked


def test_attaching_again_changes_nothing_and_a_reset_starts_anew(locked: Vtl0, tmp_path: Path) -> None:
    locked.monitor.attach(request(locked, tmp_path))
    assert locked.monitor.policy("vm").locked
    locked.monitor.attach(request(locked, tmp_path, generation=2))
    status = locked.monitor.policy("vm")
    assert (status.locked, status.source, list(status.rules)) == (False, monitor_pb2.POLICY_SOURCE_NONE, [])
    assert bytes(locked.ram.views[RamFile.PRIVATE]) == bytes(image.RAM_SIZE)
    locked._sequence = [0]
    assert locked.call(Service.LOCK_REGS).value == -errno.EPERM


def test_checking_a_policy_changes_nothing(vtl0: Vtl0) -> None:
    answer = vtl0.monitor.check_policy("vm", POLICY, "p.yaml")
    assert not answer.problems
    assert "cr3: only page-table roots that VTL1 knows; else #GP" in answer.rules
    answer = vtl0.monitor.check_policy("vm", POLICY.replace(".rodata", ".absent"), "p.yaml")
    assert [(one.line, one.key) for one in answer.problems] == [(20, "memory.2.section")]
    assert not vtl0.monitor.check_policy("", POLICY, "").problems
    assert vtl0.monitor.policy("vm").source == monitor_pb2.POLICY_SOURCE_NONE
    with pytest.raises(NotFound):
        vtl0.monitor.check_policy("other", POLICY, "")


def test_an_idle_monitor() -> None:
    monitor = Monitor()
    for operation in (monitor.detach, monitor.policy, monitor.lock_policy):
        with pytest.raises(NotFound):
            operation("vm")
    with pytest.raises(WrongState):
        monitor.run(vcpu_pb2.Enter(sequence=1))


# ----------------------------------------------------------------------------------------------- verdict log


def record(log: VerdictLog, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        log.record(vcpu_pb2.Exit(sequence=number), vcpu_pb2.Resolution(), str(number))


def test_a_watcher_gets_what_is_kept_and_what_comes() -> None:
    log = VerdictLog(capacity=4)
    record(log, 2)
    rows = log.watch(threading.Event())
    assert [(next(rows).rule, 0) for _ in range(2)] == [("0", 0), ("1", 0)]
    record(log, 3, 2)
    assert [next(rows).rule for _ in range(3)] == ["2", "3", "4"]
    log.close()
    assert list(rows) == []


def test_a_slow_watcher_is_told_what_it_missed() -> None:
    log = VerdictLog(capacity=4)
    rows = log.watch(threading.Event())
    record(log, 1)
    assert next(rows).rule == "0"
    record(log, 10, 1)
    assert [(row.rule, row.missed) for row in (next(rows) for _ in range(4))] == [
        ("7", 6),
        ("8", 0),
        ("9", 0),
        ("10", 0),
    ]


def test_a_watcher_that_leaves_ends() -> None:
    log = VerdictLog()
    stop = threading.Event()
    stop.set()
    assert list(log.watch(stop)) == []


# ----------------------------------------------------------------------------------------------- numbers


def test_numbers_count_from_one() -> None:
    session = Session("vCPU 0", lambda enter: vcpu_pb2.Exit(vp_index=7).SerializeToString())
    with pytest.raises(Conflict, match="enter 2 after enter 0"):
        session.answer(vcpu_pb2.Enter(sequence=2))
    answer = vcpu_pb2.Exit.FromString(session.answer(vcpu_pb2.Enter(sequence=1)))
    assert answer == vcpu_pb2.Exit(sequence=1, vp_index=7)
    assert session.last == 1


def test_a_failed_enter_is_not_tried_again() -> None:
    def fail(_enter: vcpu_pb2.Enter) -> bytes:
        raise WrongState("x", "no")

    session = Session("vCPU 0", fail)
    with pytest.raises(WrongState):
        session.answer(vcpu_pb2.Enter(sequence=1))
    with pytest.raises(Conflict, match="failed"):
        session.answer(vcpu_pb2.Enter(sequence=1))
    assert session.running == 0


class Numbers(RuleBasedStateMachine):
    """Whatever numbers arrive, each is executed once, in order, and answered with its own exit."""

    def __init__(self) -> None:
        super().__init__()
        self.executed: list[int] = []
        self.session = Session("vCPU 0", self.execute)

    def execute(self, enter: vcpu_pb2.Enter) -> bytes:
        self.executed.append(enter.sequence)
        return vcpu_pb2.Exit(vp_index=enter.sequence).SerializeToString()

    @rule(sequence=st.integers(0, 6))
    def enter(self, sequence: int) -> None:
        last = self.session.last
        enter = vcpu_pb2.Enter(sequence=sequence)
        if sequence in (last, last + 1) and sequence:
            exit_ = vcpu_pb2.Exit.FromString(self.session.answer(enter))
            assert exit_.vp_index == exit_.sequence == sequence
        else:
            with pytest.raises(Conflict):
                self.session.answer(enter)

    @invariant()
    def once_and_in_order(self) -> None:
        assert self.executed == list(range(1, self.session.last + 1))


TestNumbers = Numbers.TestCase
TestNumbers.settings = settings(max_examples=30, deadline=None)
