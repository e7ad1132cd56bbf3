"""The guest process dies: that alone resets a machine, and it is said why."""

from __future__ import annotations

import os
import signal

import pytest

from tests.integration.restart.checks import goes_on, restarted
from vmm.chaos.observer import Observer
from vmm.launcher import LocalLab
from vtlab.trust.roles import Role
from vtlab.v1 import vmm_pb2


def test_the_machine_is_reset_and_says_why(lab: LocalLab, observer: Observer) -> None:
    goes_on(observer)
    with restarted(lab, Role.GUEST):
        os.kill(lab.pids["guest"], signal.SIGKILL)
    goes_on(observer, resets=1)
    machine = observer.machine.info()
    assert (machine.state, machine.generation) == (vmm_pb2.MACHINE_STATE_RUNNING, 2)
    assert "crashed, and VTL0's CPU with it" in machine.reason
    states = [event.state for event in observer.machine.events(["state"], until_now=True)]
    assert states[-1].reason == machine.reason


@pytest.mark.parametrize("others", [("vmm",), ("monitor",), ("vmm", "monitor")])
def test_two_and_all_three_at_once(lab: LocalLab, observer: Observer, others: tuple[str, ...]) -> None:
    goes_on(observer)
    with restarted(lab, Role.GUEST, *map(Role, others)):
        for role in (*others, "guest"):
            os.kill(lab.pids[role], signal.SIGKILL)
    goes_on(observer, resets=1)


def test_while_it_is_paused(lab: LocalLab, observer: Observer) -> None:
    goes_on(observer)
    observer.machine.pause()
    with restarted(lab, Role.GUEST):
        os.kill(lab.pids["guest"], signal.SIGKILL)
    observer.machine.resume()
    goes_on(observer, resets=1)
