"""Each attack and each control on a fresh machine: protected, nothing changes; unprotected, the attack is real."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtlab.client import Lab
from vtlab.client.driver import Driver
from vtlab_attacks.evidence import Attack, Control, Outcome, Transition
from vtlab_attacks.guest import boot
from vtlab_attacks.table import ATTACKS, CONTROLS, TRANSITION_ATTACKS, TRANSITIONS

EVERY_ATTACK = [*ATTACKS, *TRANSITION_ATTACKS]
# One of each kind, done again after a transition.
AFTER_TRANSITION = [
    attack
    for attack in ATTACKS
    if attack.name in ("cr0-wp", "cr4-smep", "cr3-forged", "msr-lstar", "idt-gate", "text-write", "vtl1-read")
]


def names(entry: Attack | Control | Transition) -> str:
    return str(entry.name)


def test_names_are_unique() -> None:
    every = [entry.name for entry in [*EVERY_ATTACK, *CONTROLS, *TRANSITIONS]]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=names)
def test_blocked_when_protected(lab: Lab, attack: Attack) -> None:
    with boot(lab, True, attack.vp_count) as guest:
        evidence = attack.run(guest.machine, guest.driver, guest.symbols)
        Driver(guest.machine).ping()
    assert evidence.outcome is Outcome.BLOCKED, evidence


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=names)
def test_real_when_unprotected(lab: Lab, attack: Attack) -> None:
    with boot(lab, False, attack.vp_count) as guest:
        evidence = attack.run(guest.machine, guest.driver, guest.symbols)
    expected = Outcome.BLOCKED if attack.impossible_unprotected else Outcome.SUCCEEDED
    assert evidence.outcome is expected, evidence


@pytest.mark.parametrize("control", CONTROLS, ids=names)
def test_kept_when_protected(lab: Lab, control: Control) -> None:
    with boot(lab, protected=True) as guest:
        evidence = control.run(guest.machine, guest.driver, guest.symbols)
        guest.driver.ping()
    assert evidence.kept, evidence


@pytest.mark.parametrize("transition", TRANSITIONS, ids=names)
def test_protected_again_after_a_transition(lab: Lab, transition: Transition) -> None:
    with boot(lab, True, transition.vp_count) as guest:
        following, evidence = transition.run(guest)
        assert evidence.kept, evidence
        outcomes = {
            attack.name: attack.run(following.machine, following.driver, following.symbols)
            for attack in AFTER_TRANSITION
        }
        if transition.vp_count > 1:
            attack = next(one for one in TRANSITION_ATTACKS if one.name == "cr4-on-cpu1")
            outcomes[attack.name] = attack.run(following.machine, following.driver, following.symbols)
        following.driver.ping()
    assert len(outcomes) == len(AFTER_TRANSITION) + (transition.vp_count > 1) > 0
    assert {name: one for name, one in outcomes.items() if one.outcome is not Outcome.BLOCKED} == {}


@pytest.mark.parametrize("transition", TRANSITIONS, ids=names)
def test_a_transition_needs_no_protection(lab: Lab, transition: Transition) -> None:
    with boot(lab, False, transition.vp_count) as guest:
        following, evidence = transition.run(guest)
        assert evidence.kept, evidence
        following.driver.ping()


SECRET = b"a secret that VTL0 gives to VTL1"
ON_VTL1_MEMORY = [attack for attack in ATTACKS if attack.name.startswith(("vtl1-", "vmsave-"))]


@pytest.mark.parametrize("attack", ON_VTL1_MEMORY, ids=names)
def test_the_file_of_vtl1_keeps_its_bytes(lab: Lab, attack: Attack) -> None:
    """A witness beside the SDK, which may not read them: the memory files themselves."""
    with boot(lab, protected=True) as guest:
        folder: Path = lab.directory  # type: ignore[attr-defined]  # of a laboratory on this machine
        memory = next(folder.glob(f"**/{guest.machine.name}"))
        start = guest.symbols.physical("vtl1_memory")
        place = slice(start, start + guest.symbols.sections[".vtl1_memory"].size)
        before = (memory / "private").read_bytes()[place]
        assert before.startswith(SECRET)
        attack.run(guest.machine, guest.driver, guest.symbols)
        assert (memory / "private").read_bytes()[place] == before
        for file in ("ram.rw", "ram.ro"):
            assert not any((memory / file).read_bytes()[place]), file
