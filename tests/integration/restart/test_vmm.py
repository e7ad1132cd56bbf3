"""The VMM dies at chosen points; the machine goes on where it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.integration.restart import faults
from tests.integration.restart.checks import TIMEOUT, dies, goes_on
from tests.waiting import wait_until
from vmm.chaos.observer import Observer
from vmm.launcher import LocalLab
from vtlab.errors import PeerUnavailable
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2


@pytest.mark.parametrize(
    "point",
    ["exit received", "exit served", "before the transaction", "after the transaction", "before VTL1", "after VTL1"],
)
def test_a_running_machine_goes_on(lab: LocalLab, observer: Observer, point: str) -> None:
    goes_on(observer)
    before = lab.supervisor.restarts(Role.VMM)
    faults.arm(lab.directory, "vmm", point, 7)
    dies(lab, Role.VMM, before)
    goes_on(observer)
    machine = observer.machine.info()
    assert (machine.state, machine.generation, machine.vtl1_enabled) == (vmm_pb2.MACHINE_STATE_RUNNING, 1, True)


@pytest.mark.parametrize(
    "point", ["pages moved", "before the wipe", "after VTL1", "before the transaction", "after the transaction"]
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_guarding_is_finished(lab: LocalLab, point: str, count: int) -> None:
    """The VMM dies while VTL1 protects the machine for a client: it is protected all the same, and wholly."""
    before = lab.supervisor.restarts(Role.VMM)
    observer = Observer(lab, 2, on_ready=lambda: faults.arm(lab.directory, "vmm", point, count))
    try:
        dies(lab, Role.VMM, before)
        goes_on(observer)
    finally:
        observer.close()


def test_killed_again_and_again(lab: LocalLab, observer: Observer) -> None:
    for number in range(4):
        before = lab.supervisor.restarts(Role.VMM)
        if number % 2:
            faults.arm(lab.directory, "vmm", "before the levels are asked")  # it dies again at once
        os.kill(lab.pids["vmm"], signal.SIGKILL)
        dies(lab, Role.VMM, before)
        goes_on(observer)


def test_a_paused_machine_stays_paused(lab: LocalLab, observer: Observer) -> None:
    goes_on(observer)
    observer.machine.pause()
    frozen = observer.statuses()
    before = lab.supervisor.restarts(Role.VMM)
    os.kill(lab.pids["vmm"], signal.SIGKILL)
    dies(lab, Role.VMM, before)
    assert observer.machine.info().state == vmm_pb2.MACHINE_STATE_PAUSED
    assert observer.statuses() == frozen
    observer.machine.resume()
    goes_on(observer)


def test_a_created_machine_can_be_started(lab: LocalLab, image: Path) -> None:
    with lab.create(image) as machine:
        before = lab.supervisor.restarts(Role.VMM)
        os.kill(lab.pids["vmm"], signal.SIGKILL)
        dies(lab, Role.VMM, before)
        machine.start()
        machine.wait_serial("selfguard: ready", timeout=TIMEOUT)


def test_events_go_on_without_gap_or_repetition(lab: LocalLab, observer: Observer) -> None:
    goes_on(observer)
    kinds = ("state", "serial", "protection")
    seen = [event.sequence for event in observer.machine.events(kinds, until_now=True)]
    before = lab.supervisor.restarts(Role.VMM)
    os.kill(lab.pids["vmm"], signal.SIGKILL)
    dies(lab, Role.VMM, before)
    observer.wait_progress(9)  # a line every eight rounds
    after = [event.sequence for event in observer.machine.events(kinds, until_now=True)]
    assert after[: len(seen)] == seen
    assert after == sorted(set(after))
    assert len(after) > len(seen)


def test_a_reset_is_done_again(lab: LocalLab, observer: Observer) -> None:
    before = lab.supervisor.restarts(Role.VMM)
    faults.arm(lab.directory, "vmm", "after the transaction", 3)
    try:
        observer.machine.reset()
    except PeerUnavailable:
        dies(lab, Role.VMM, before)
    goes_on(observer, resets=1)


def test_asked_to_end_it_leaves_the_machine_between_two_exits(lab: LocalLab, observer: Observer) -> None:
    observer.wait_progress(1)
    for _ in range(3):
        restarts = lab.supervisor.restarts(Role.VMM)
        faults.arm(lab.directory, "vmm", faults.DRAINED)
        os.kill(lab.pids["vmm"], signal.SIGTERM)
        assert lab.supervisor.wait_restarted(Role.VMM, restarts + 1, TIMEOUT)
        observer.wait_progress(2)
        observer.check()
    assert observer.findings.problems == []
    assert observer.findings.resets == []
    log = (lab.directory / "vmm.log").read_text()
    assert log.count("is written down at an exit") == 3


def test_asked_twice_it_ends_at_once(lab: LocalLab, observer: Observer) -> None:
    """Whatever it waits for: here, for VTL0's process, which is stopped."""
    restarts = lab.supervisor.restarts(Role.VMM)
    log = lab.directory / "vmm.log"
    os.kill(lab.pids["guest"], signal.SIGSTOP)
    try:
        vmm = lab.pids["vmm"]
        drains = log.read_text().count("vmm drains")
        os.kill(vmm, signal.SIGTERM)
        wait_until(lambda: log.read_text().count("vmm drains") > drains, TIMEOUT)
        os.kill(vmm, signal.SIGTERM)
    finally:
        os.kill(lab.pids["guest"], signal.SIGCONT)
    assert lab.supervisor.wait_restarted(Role.VMM, restarts + 1, TIMEOUT)
    observer.wait_progress(2)
    observer.check()
    assert observer.findings.problems == []
