"""VTL1 as the guest's own code, while the VMM dies: between switches, in VTL1, before and after what it is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.restart import faults
from tests.integration.vsm import guest
from vmm.launcher import LocalLab
from vtlab.client import Machine
from vtlab.errors import PeerUnavailable
from vtlab.v1 import vmm_pb2

STOPPED = vmm_pb2.MACHINE_STATE_STOPPED
PATIENCE = 120.0
GOOD = 0x2A
BODY = f"mov r8d, 5; call enter; mov qword ptr [{guest.RESULT + 56}], r8"
# Exits until the body begins are some ten: both halves are met.
DEATHS = [
    (point, count) for point in ("exit received", "exit served", "after the transaction") for count in (5, 10, 14)
]


@pytest.fixture
def machine(lab: LocalLab) -> Iterator[Machine]:
    with guest.create(lab, guest.assemble(BODY)) as made:
        yield made


def start(machine: Machine) -> None:
    """The VMM may die before it answers; then it does it all the same when it is back, or it had been done."""
    try:
        machine.start()
    except PeerUnavailable:
        machine.wait_state(vmm_pb2.MACHINE_STATE_RUNNING, STOPPED, timeout=PATIENCE)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: f"{death[0]} {death[1]}")
def test_both_levels_go_on_where_they_were(lab: LocalLab, machine: Machine, death: tuple[str, int]) -> None:
    faults.arm(lab.directory, "vmm", *death)
    start(machine)
    end = machine.wait_state(STOPPED, timeout=PATIENCE)
    assert not (lab.directory / "vmm" / faults.FILE).exists(), "nobody died"
    assert end.debug_exit == GOOD, end.reason
