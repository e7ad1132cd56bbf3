"""An attack counts as blocked only by evidence: state unchanged and a denial taken."""

from __future__ import annotations

import pytest

from vtlab.client.driver import GuestFault, GuestRefusal
from vtlab.errors import Refused
from vtlab_attacks.evidence import Attempts, Evidence, Outcome, observe
from vtlab_attacks.guest import kernel_symbols, modules


@pytest.mark.parametrize(
    ("reached", "intact", "denial", "outcome"),
    [
        (True, False, "", Outcome.SUCCEEDED),
        (True, False, "#GP(0x0)", Outcome.SUCCEEDED),
        (True, True, "#GP(0x0)", Outcome.SUCCEEDED),  # as it was, and that is what the attack wants
        (False, True, "#GP(0x0)", Outcome.BLOCKED),
        (False, True, "", Outcome.UNCLEAR),
        (False, False, "#GP(0x0)", Outcome.UNCLEAR),  # damaged, if not as intended
        (False, False, "", Outcome.UNCLEAR),
    ],
)
def test_outcome(reached: bool, intact: bool, denial: str, outcome: Outcome) -> None:
    assert Evidence("CR0.WP", "1", "?", reached, intact, denial).outcome is outcome


@pytest.mark.parametrize(("reached", "denial", "kept"), [(True, "", True), (False, "", False), (True, "#GP", False)])
def test_a_control_is_kept_only_without_objection(reached: bool, denial: str, kept: bool) -> None:
    assert Evidence("CR0.TS", "0", "1", reached, not reached, denial).kept is kept


def test_attempts_remember_every_refusal_and_name_the_place() -> None:
    symbols = kernel_symbols()

    def faults() -> None:
        raise GuestFault(13, 0, symbols["gadget_mov_cr4"], 0)

    def refuses() -> None:
        raise GuestRefusal(13)

    def client() -> None:
        raise Refused("GPA 0x1000", "is sealed")

    attempts = Attempts(symbols)
    assert attempts.step(lambda: None)
    assert not attempts.step(faults)
    assert not attempts.step(refuses)
    assert not attempts.step(client)
    attempts.note("")
    attempts.note("HV_STATUS_ACCESS_DENIED")
    attempts.note("HV_STATUS_ACCESS_DENIED")
    assert attempts.denials == [
        "#GP(0x0) at gadget_mov_cr4",
        "refused -EACCES",
        "client refused: is sealed",
        "HV_STATUS_ACCESS_DENIED",
        "HV_STATUS_ACCESS_DENIED",
    ]
    assert str(attempts) == (
        "#GP(0x0) at gadget_mov_cr4; refused -EACCES; client refused: is sealed; HV_STATUS_ACCESS_DENIED (×2)"
    )


def test_observe_reads_the_state_around_the_steps() -> None:
    state = [1]

    def steps(attempts: Attempts) -> None:
        attempts.step(lambda: state.append(0))

    evidence = observe("bit", lambda: state[-1], steps, kernel_symbols())
    assert evidence == Evidence("bit", "1", "0", reached=True, intact=False)


def test_modules_differ_where_they_should() -> None:
    (good, _), (unsigned, _), (tampered, _), *kernels = modules()
    assert [name for _, name in kernels] == ["next", "old", "forged"]
    assert good.startswith(unsigned)
    assert len(good) == len(tampered)
    assert sum(a != b for a, b in zip(good, tampered, strict=True)) == 1
