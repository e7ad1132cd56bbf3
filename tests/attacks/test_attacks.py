"""Each attack and each control on a fresh machine: protected, nothing changes; unprotected, the attack is real."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtlab.client import Lab
from vtlab_attacks.evidence import Attack, Control, Outcome
from vtlab_attacks.guest import boot
from vtlab_attacks.table import ATTACKS, CONTROLS


def names(entry: Attack | Control) -> str:
    return str(entry.name)


def test_names_are_unique() -> None:
    every = [entry.name for entry in [*ATTACKS, *CONTROLS]]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_blocked_when_protected(lab: Lab, attack: Attack) -> None:
    with boot(lab, True, attack.vp_count) as guest:
        evidence = attack.run(guest.machine, guest.driver, guest.symbols)
        guest.driver.ping()
    assert evidence.outcome is Outcome.BLOCKED, evidence


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
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
