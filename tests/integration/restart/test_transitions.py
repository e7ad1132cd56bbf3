"""VMM or monitor die in the middle of a transition of the guest's life: it is completed, and the guest protected."""

from __future__ import annotations

import pytest

from tests.integration.restart import faults
from vmm.launcher import LocalLab
from vtlab_attacks.evidence import Outcome
from vtlab_attacks.guest import boot
from vtlab_attacks.table import ATTACKS, TRANSITIONS

# The first exits of each belong to the command that asks for it, which is the client's to repeat or not.
DEATHS = [("vmm", "exit served", 6), ("vmm", "after VTL1", 1), ("monitor", "enter received", 1)]
NAMES = ["smi", "s3", "kexec", "kdump", "ap-start"]
AFTER = [attack for attack in ATTACKS if attack.name in ("cr0-wp", "text-write")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: f"{death[0]} {death[1]}")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_completed(lab: LocalLab, name: str, death: tuple[str, str, int]) -> None:
    transition = next(one for one in TRANSITIONS if one.name == name)
    with boot(lab, True, transition.vp_count) as guest:
        faults.arm(lab.directory, *death)
        following, evidence = transition.run(guest)
        assert not (lab.directory / death[0] / faults.FILE).exists(), "nobody died"
        assert evidence.kept, evidence
        outcomes = [attack.run(following.machine, following.driver, following.symbols).outcome for attack in AFTER]
        following.driver.ping()
    assert outcomes == [Outcome.BLOCKED] * len(AFTER)
