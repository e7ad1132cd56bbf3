"""VTL1 and a vCPU after SIPI: what it may execute, and what it holds when it leaves that."""

from __future__ import annotations

import pytest

from tests.unit.monitor.test_guard import LINUX, guard
from tests.unit.monitor.vtl0 import CR0, CR4, EFER, Vtl0
from vtl1_monitor.policy.problems import PolicyProblems
from vtl1_monitor.policy.text import parse
from vtlab.ram import RamFile
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer

PAGE = 0x9000
OUTSIDE = 0x300000
NAMED = """\
version: 1
name: named
registers:
  cr4: {must_be_1: [SMEP]}
memory:
  - {name: trampoline, gpa: 0x9000, size: 8192, access: r-x}
startup: {trampoline: trampoline}
"""


def guarded(vtl0: Vtl0, text: str) -> Vtl0:
    vtl0.monitor.set_policy("vm", text, "policy")
    assert guard(vtl0).resolution.action == vcpu_pb2.ACTION_COMMIT
    return vtl0


def fetch(vtl0: Vtl0, gpa: int, *, cr0: int = 0x10, cr4: int = 0, efer: int = 0, rip: int = 0) -> vcpu_pb2.VtlReturn:
    """The vCPU fetches from outside its window; VTL1's answer."""
    registers = registers_pb2.Registers(cr0=cr0, cr4=cr4, efer=efer, rip=rip)
    state = registers_pb2.ProcessorState(registers=registers)
    load = vcpu_pb2.StateLoad(cause=vcpu_pb2.STATE_LOAD_CAUSE_STARTUP_END, state=state, gpa=gpa)
    exit_ = vcpu_pb2.Exit(origin=vcpu_pb2.ORIGIN_VCPU, registers=registers, state_load=load)
    answer = vtl0.enter(vcpu_pb2.ENTER_REASON_INTERCEPT, intercept=exit_)
    while answer.WhichOneof("reason") == "protect":
        for update in answer.protect.protections:
            vtl0.apply(update)
        vtl0.protects += 1
        vtl0.before_resume(vtl0.protects)
        answer = vtl0.enter(vcpu_pb2.ENTER_REASON_RESUME, status=vtl0.protect_status)
    return answer.vtl_return


def window(returned: vcpu_pb2.VtlReturn) -> list[int]:
    return [number for update in returned.updates for number in update.startup_window.runs]


def test_startups_exit_once_the_policy_is_locked(vtl0: Vtl0) -> None:
    vtl0.monitor.set_policy("vm", NAMED, "policy")
    filters = [update.intercepts for update in guard(vtl0).updates if update.HasField("intercepts")]
    assert [(one.startups, one.startup_window) for one in filters] == [(True, True)]


def test_allowed_startups_do_not_exit(vtl0: Vtl0) -> None:
    vtl0.monitor.set_policy("vm", NAMED.replace("{trampoline: trampoline}", "allow"), "policy")
    filters = [update.intercepts for update in guard(vtl0).updates if update.HasField("intercepts")]
    assert [(one.startups, one.startup_window) for one in filters] == [(False, False)]


def test_the_named_trampoline_runs_and_nothing_else_without_pins(vtl0: Vtl0) -> None:
    guarded(vtl0, NAMED)
    for page in (PAGE, PAGE + 0x1000):
        returned = fetch(vtl0, page)
        assert (returned.resolution.action, window(returned)) == (vcpu_pb2.ACTION_RETRY, [9, 2])
    refused = fetch(vtl0, OUTSIDE)
    assert refused.resolution.action == vcpu_pb2.ACTION_DENY
    assert not refused.updates
    assert fetch(vtl0, OUTSIDE, cr4=CR4).resolution.action == vcpu_pb2.ACTION_COMMIT


def test_low_memory_runs_if_it_is_what_it_was(vtl0: Vtl0) -> None:
    vtl0.write(PAGE, b"trampoline")
    guarded(vtl0, LINUX)
    returned = fetch(vtl0, PAGE)
    assert (returned.resolution.action, window(returned)) == (vcpu_pb2.ACTION_RETRY, [9, 1])
    assert (vtl0.file(PAGE), vtl0.rights(PAGE)) == (RamFile.SEALED, "rk")
    assert window(fetch(vtl0, PAGE + 0x1000, rip=0x1000)) == [9, 1, 10, 1], "it grows"
    assert window(fetch(vtl0, PAGE)) == [9, 1], "and begins anew with the next SIPI"


@pytest.mark.parametrize("moment", ["before SIPI", "while it is sealed"])
def test_low_memory_that_changed_does_not_run_and_stays_the_guests(vtl0: Vtl0, moment: str) -> None:
    vtl0.write(PAGE, b"trampoline")
    guarded(vtl0, LINUX)
    if moment == "before SIPI":
        vtl0.write(PAGE, b"attack")
    else:
        sealed = vtl0.ram.views[RamFile.SEALED]
        vtl0.before_resume = lambda number: number == 1 and sealed.__setitem__(slice(PAGE, PAGE + 6), b"attack")
    returned = fetch(vtl0, PAGE)
    assert returned.resolution.action == vcpu_pb2.ACTION_DENY
    assert "not what it was" in returned.resolution.reason
    assert not window(returned)
    assert (vtl0.file(PAGE), vtl0.rights(PAGE)) == (RamFile.WRITABLE, "rwku")


def test_a_page_that_cannot_be_sealed_breaks_the_machine(vtl0: Vtl0) -> None:
    guarded(vtl0, LINUX)
    vtl0.protect_status = 5
    assert fetch(vtl0, PAGE).resolution.action == vcpu_pb2.ACTION_HALT
    assert fetch(vtl0, OUTSIDE, cr4=CR4).resolution.action == vcpu_pb2.ACTION_HALT


def test_pins_are_set_and_kept_until_the_vcpu_sets_them(vtl0: Vtl0) -> None:
    guarded(vtl0, LINUX)
    bare = int(Cr0.PG | Cr0.PE)
    returned = fetch(vtl0, OUTSIDE, cr0=bare, cr4=int(Cr4.PAE), efer=int(Efer.LME | Efer.LMA))
    assert returned.resolution.action == vcpu_pb2.ACTION_COMMIT
    values = {update.register.name: update.register.value for update in returned.updates if update.HasField("register")}
    assert values == {
        registers_pb2.REGISTER_NAME_CR0: bare | Cr0.WP,
        registers_pb2.REGISTER_NAME_CR4: CR4,
        registers_pb2.REGISTER_NAME_EFER: int(Efer.LME | Efer.LMA | Efer.NXE),
    }
    (filter_,) = [update.intercepts for update in returned.updates if update.HasField("intercepts")]
    assert filter_.cr4_mask == (1 << 64) - 1

    def write(value: int) -> vcpu_pb2.VtlReturn:
        name = registers_pb2.REGISTER_NAME_CR4
        return vtl0.intercept(register_write=vcpu_pb2.RegisterWrite(name=name, old_value=CR4, new_value=value))

    kept = write(int(Cr4.PAE | Cr4.PGE)).resolution
    assert (kept.action, kept.value) == (vcpu_pb2.ACTION_REPLACE, CR4 | Cr4.PGE)
    assert write(int(Cr4.PGE)).resolution.action == vcpu_pb2.ACTION_DENY, "the mode is the vCPU's own"
    ended = write(CR4 | Cr4.PGE)
    assert ended.resolution.action == vcpu_pb2.ACTION_COMMIT
    (filter_,) = [update.intercepts for update in ended.updates if update.HasField("intercepts")]
    assert filter_.cr4_mask != (1 << 64) - 1
    assert write(int(Cr4.PAE)).resolution.action == vcpu_pb2.ACTION_DENY


def test_without_paging_no_pins_can_be_set(vtl0: Vtl0) -> None:
    guarded(vtl0, LINUX)
    returned = fetch(vtl0, OUTSIDE)
    assert returned.resolution.action == vcpu_pb2.ACTION_DENY
    assert not returned.updates


def test_a_vcpu_that_runs_without_paging_is_not_guarded(vtl0: Vtl0) -> None:
    """One that waits for SIPI is; it is recognized by what INIT leaves."""
    vtl0.registers.cr0, vtl0.registers.efer = CR0 & ~Cr0.PG & 0xFFFFFFFF, EFER
    vtl0.monitor.set_policy("vm", LINUX, "linux.yaml")
    assert guard(vtl0).resolution.action == vcpu_pb2.ACTION_DENY


@pytest.mark.parametrize(
    ("startup", "complaint"),
    [
        ("sometimes", "must be 'deny', 'allow'"),
        ("{trampoline: nothing}", "no memory rule is called"),
        ("{trampoline: data}", "is not memory that the kernel executes"),
        ("{trampoline: low_memory, pins: never}", "must be one of"),
        ("{pins: set}", "trampoline"),
    ],
)
def test_bad_policies_are_told(startup: str, complaint: str) -> None:
    text = NAMED.replace("{trampoline: trampoline}", startup)
    text = text.replace("startup:", "  - {name: data, gpa: 0xc000, size: 4096, access: r--}\nstartup:")
    with pytest.raises(PolicyProblems, match=complaint):
        parse(text, "policy")
