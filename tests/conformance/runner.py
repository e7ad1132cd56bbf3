"""Runs scenarios on machines of a laboratory and reads what the guest says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vtlab.client import Lab
from vtlab.errors import TimedOut, WrongState
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import PERSONALITY_GUEST_CODE, PERSONALITY_UNSPECIFIED
from vtlab_conformance.image import image
from vtlab_conformance.layout import RAM
from vtlab_conformance.scenarios import Scenario
from vtlab_conformance.steps import Row

TIMEOUT = 60.0  # seconds that a scenario may take
VPS = 2
# Connections of HvCallPostMessage and HvCallSignalEvent are made by this device.
_DEVICES = ("hyperv-testdev",)
_LINE = re.compile(r"^ROW (\S+) (ok|FAIL (.*))$", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """Attributes:
    detail: what differed; empty if nothing did.
    """

    profile: str
    scenario: str
    row: Row
    detail: str

    @property
    def ok(self) -> bool:
        return not self.detail


def judge(profile: str, scenario: str, rows: Sequence[Row], output: str, ending: str) -> list[Result]:
    """A row that the guest did not report has failed, with what else it said last."""
    said = {match[1]: match[3] or "" for match in _LINE.finditer(output)}
    panic = next((line for line in output.splitlines() if line.startswith("PANIC")), "")
    lost = panic or f"the guest ended before it: {ending}"
    return [Result(profile, scenario, row, said.get(row.name, lost)) for row in rows]


def run_scenario(lab: Lab, profile: str, scenario: Scenario, rows: Sequence[Row] | None = None) -> list[Result]:
    """One boot. `rows` replaces the scenario's."""
    chosen = scenario.rows(profile) if rows is None else rows
    with lab.create(
        image(chosen),
        ram=RAM,
        vp_count=VPS,
        vtl1=scenario.vsm,
        stop_on_reset=True,
        personality=PERSONALITY_GUEST_CODE if scenario.vsm else PERSONALITY_UNSPECIFIED,
        vsm_profile=profile,
        devices=_DEVICES,
    ) as machine:
        machine.start()
        try:
            end = machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED, timeout=TIMEOUT)
            ending = end.reason
        except TimedOut:
            ending = f"it did not end in {TIMEOUT:g} s"
        except WrongState as error:
            ending = str(error)
        return judge(profile, scenario.name, chosen, machine.serial(0), ending)
