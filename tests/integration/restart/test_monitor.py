"""The monitor dies at chosen points: its place is taken from the sealed store, and nothing was open in between."""

from __future__ import annotations

import os
import signal

import pytest

from tests.integration.restart import faults
from tests.integration.restart.checks import dies, goes_on, restarted
from tests.waiting import wait_until
from vmm.chaos.observer import Observer
from vmm.launcher import LocalLab
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2


@pytest.mark.parametrize("point", ["enter received", "enter served"])
def test_a_judged_exit_is_judged_once(lab: LocalLab, observer: Observer, point: str) -> None:
    goes_on(observer)
    with restarted(lab, Role.MONITOR):
        faults.arm(lab.directory, "monitor", point, 5)
    goes_on(observer)
    machine = observer.machine.info()
    assert (machine.state, machine.generation) == (vmm_pb2.MACHINE_STATE_RUNNING, 1)


@pytest.mark.parametrize("point", ["enter received", "enter served"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_guarding_is_finished(lab: LocalLab, point: str, count: int) -> None:
    """It dies in the middle of taking the policy."""
    before = lab.supervisor.restarts(Role.MONITOR)
    observer = Observer(lab, 2, on_ready=lambda: faults.arm(lab.directory, "monitor", point, count))
    try:
        dies(lab, Role.MONITOR, before)
        goes_on(observer)
    finally:
        observer.close()


def test_together_with_the_vmm(lab: LocalLab, observer: Observer) -> None:
    goes_on(observer)
    with restarted(lab, Role.MONITOR, Role.VMM):
        for role in ("monitor", "vmm"):
            os.kill(lab.pids[role], signal.SIGKILL)
    goes_on(observer)


def test_a_store_that_was_changed_is_a_reset(lab: LocalLab, observer: Observer) -> None:
    """Fails closed: what cannot be believed is not used, and the machine begins anew, unguarded by a stale policy."""
    goes_on(observer)
    store = lab.directory / "monitor" / "sealed"
    os.kill(lab.pids["monitor"], signal.SIGSTOP)
    data = bytearray(store.read_bytes())
    data[-1] ^= 1
    store.write_bytes(data)
    with restarted(lab, Role.MONITOR):
        os.kill(lab.pids["monitor"], signal.SIGKILL)
    wait_until(lambda: "the sealed store was changed" in observer.machine.info().reason, 60)
    assert observer.machine.info().generation == 2
