"""The example policies, as an operator's override, do what their comments say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtlab.client import Lab
from vtlab.client.driver import READY, Driver
from vtlab.v1.monitor_pb2 import POLICY_SOURCE_OPERATOR
from vtlab_attacks.evidence import Attack, Outcome
from vtlab_attacks.guest import RAM, kernel_symbols, modules
from vtlab_attacks.table import ATTACKS

POLICIES = Path(__file__).parents[3] / "deploy/policies"
BY_NAME: dict[str, Attack] = {attack.name: attack for attack in ATTACKS}


@pytest.mark.parametrize(
    ("policy", "attack", "outcome"),
    [
        ("registers", "cr4-smep", Outcome.BLOCKED),
        ("registers", "text-write", Outcome.BLOCKED),
        ("registers", "text-remap", Outcome.SUCCEEDED),
        ("watch", "cr4-smep", Outcome.SUCCEEDED),
    ],
)
def test_example_policy(lab: Lab, policy: str, attack: str, outcome: Outcome) -> None:
    symbols = kernel_symbols()
    with lab.create(symbols.image, ram=RAM, command_line="heki=1", modules=modules()) as machine:
        lab.policy.set(machine, (POLICIES / f"{policy}.yaml").read_text(), f"{policy}.yaml")
        machine.start()
        machine.wait_serial(READY, timeout=30)
        assert lab.policy.get(machine).source == POLICY_SOURCE_OPERATOR
        assert BY_NAME[attack].run(machine, Driver(machine), symbols).outcome is outcome
