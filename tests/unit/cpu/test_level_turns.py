"""Turns between the levels of a machine: one runs, the other is let in soon."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vtl0_guest.cpu.level_turns import LevelTurns
from vtlab.ram import TURN_FILE, create_turn_file

TIMEOUT = 10
Make = Callable[[int, Callable[[], None]], LevelTurns]


@pytest.fixture
def level(tmp_path: Path) -> Iterator[Make]:
    create_turn_file(tmp_path)
    made: list[LevelTurns] = []

    def make(vtl: int, preempt: Callable[[], None]) -> LevelTurns:
        made.append(LevelTurns(tmp_path / TURN_FILE, vtl, preempt))
        return made[-1]

    yield make
    for turns in made:
        turns.close()


def test_a_level_that_runs_is_asked_to_give_way(level: Make) -> None:
    asked = threading.Event()
    lower, upper = level(0, asked.set), level(1, lambda: None)
    lower.acquire()
    entered = threading.Event()

    def run() -> None:
        upper.acquire()
        entered.set()
        upper.release()

    thread = threading.Thread(target=run)
    thread.start()
    assert asked.wait(TIMEOUT)
    assert not entered.is_set()
    lower.release()
    assert entered.wait(TIMEOUT)
    thread.join(TIMEOUT)


def test_levels_never_run_at_once(level: Make) -> None:
    """Counts without `lock`: an increment is lost if both are inside."""
    counted = [0]
    enough = threading.Barrier(2)

    def run(turns: LevelTurns) -> None:
        enough.wait(TIMEOUT)
        for _ in range(200):
            turns.acquire()
            before = counted[0]
            threading.Event().wait(0.00001)
            counted[0] = before + 1
            turns.release()

    threads = [threading.Thread(target=run, args=(level(vtl, lambda: None),)) for vtl in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counted == [400]
