"""A run: what is left out, what is taken from an interrupted one, what order the result has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.matrix.made import Runner, attack, transition
from vtlab.errors import Conflict
from vtlab_matrix.cells import BOOT, Cell, Selection, Verdict
from vtlab_matrix.journal import Journal, digest
from vtlab_matrix.matrix import run_matrix
from vtlab_matrix.outcome import Outcome

SELECTION = Selection(
    ("none", "vtl"), attacks=["cr0-wp", "cr4-smep"], after=[BOOT, "reset-cf9"], transitions=[BOOT, "reset-cf9"]
)
CELLS = 2 * (2 + 2 * 2)


def run(runner: Runner, folder: Path, key: str = "key", fresh: bool = False) -> list[Outcome]:
    with Journal(folder / "journal", key, fresh) as journal:
        outcomes: list[Outcome] = run_matrix(SELECTION, runner, journal, lambda _outcome: None)
        return outcomes


def test_the_result_is_in_the_order_of_the_tables(tmp_path: Path) -> None:
    outcomes = run(Runner(), tmp_path)
    assert len(outcomes) == CELLS
    assert [(one.cell.name, one.cell.after) for one in outcomes if one.cell.design == "vtl"] == [
        ("boot", ""),
        ("reset-cf9", ""),
        ("cr0-wp", ""),
        ("cr0-wp", "reset-cf9"),
        ("cr4-smep", ""),
        ("cr4-smep", "reset-cf9"),
    ]
    assert [one.cell.design for one in outcomes] == ["none"] * 6 + ["vtl"] * 6


def test_no_attack_after_a_transition_that_leaves_no_guest(tmp_path: Path) -> None:
    runner = Runner(transition(Verdict.GUEST_BROKEN, "none", "reset-cf9"))
    outcomes = {one.cell: one for one in run(runner, tmp_path)}
    lost = [Cell(design="none", kind="attack", name=name, after="reset-cf9") for name in ("cr0-wp", "cr4-smep")]
    assert len(outcomes) == CELLS
    for cell in lost:
        assert cell not in runner.ran
        assert outcomes[cell].verdict is Verdict.GUEST_BROKEN
        assert outcomes[cell].evidence.error == "not attempted: none: reset-cf9 leaves no guest"


def test_attacks_go_on_after_a_transition_that_broke_something_else(tmp_path: Path) -> None:
    worn = transition(Verdict.KEPT, "none", "reset-cf9").model_copy(update={"verdict": Verdict.GUEST_BROKEN})
    runner = Runner(worn)
    run(runner, tmp_path)
    assert len(runner.ran) == CELLS


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    class Interrupted(Runner):
        def run(self, tasks):  # type: ignore[no-untyped-def]
            for outcome in super().run(tasks):
                if len(self.ran) == 7:
                    raise KeyboardInterrupt
                yield outcome

    first = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path)
    second = Runner()
    assert len(run(second, tmp_path)) == CELLS
    assert set(second.ran) & set(first.ran) == {first.ran[-1]}
    assert len(second.ran) == CELLS - 6
    with Journal(tmp_path / "journal", "key") as journal:
        journal.finish()
    assert len(run(third := Runner(), tmp_path)) == len(third.ran) == CELLS


@pytest.mark.parametrize(("key", "fresh"), [("other code", False), ("key", True)])
def test_what_does_not_hold_any_more_is_dropped(tmp_path: Path, key: str, fresh: bool) -> None:
    run(Runner(), tmp_path)
    run(again := Runner(), tmp_path, key, fresh)
    assert len(again.ran) == CELLS


def test_a_line_that_was_cut_short_costs_its_cell_alone(tmp_path: Path) -> None:
    run(Runner(), tmp_path)
    file = tmp_path / "journal"
    file.write_bytes(file.read_bytes()[:-20])
    run(again := Runner(), tmp_path)
    assert len(again.ran) == 1


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", "key"), pytest.raises(Conflict, match="another run"):
        Journal(tmp_path / "journal", "key")


def test_a_journal_gives_back_what_it_got(tmp_path: Path) -> None:
    one = attack(Verdict.SUCCEEDED, log="ü\n", seconds=1.5, broken=(attack().evidence,))
    with Journal(tmp_path / "journal", "key") as journal:
        journal.add(one)
    with Journal(tmp_path / "journal", "key") as journal:
        assert journal.done == {one.cell: one}


def test_the_digest_is_of_the_seed_and_the_tree() -> None:
    assert digest(1) == digest(1)
    assert digest(1) != digest(2)
