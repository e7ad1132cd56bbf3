"""Turns of the processors of a machine: order, waking, and that only one runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from vtl0_guest.cpu.turns import Outcome, Seat, Turns


class Script:
    """A runner whose turns end as told; `body` runs in each of them."""

    def __init__(self, turns: Turns, name: str, log: list[str], outcomes: list[Outcome]) -> None:
        self.seat: Seat = turns.seat(self)
        self.name = name
        self.log = log
        self.outcomes = outcomes
        self.asked = threading.Event()
        self.contended: list[bool] = []
        self.body: Callable[[], object] = lambda: None

    def begin_turn(self, contended: bool) -> None:
        self.asked.clear()
        self.contended.append(contended)

    kicked = False

    def turn(self) -> Outcome:
        self.log.append(self.name)
        self.body()
        return self.outcomes.pop(0)

    def end_turn(self) -> None:
        self.asked.set()


@pytest.fixture
def log() -> list[str]:
    return []


def start(turns: Turns, runner: Script) -> threading.Thread:
    thread = threading.Thread(target=turns.run, args=(runner.seat,), daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_a_runner_alone_runs_until_it_is_done(log: list[str]) -> None:
    turns = Turns()
    alone = Script(turns, "a", log, [Outcome.OVER, Outcome.OVER, Outcome.DONE])
    turns.run(alone.seat)
    assert log == ["a", "a", "a"]
    assert alone.contended == [False, False, False]
    turns.close()


def test_runners_alternate_and_one_thread_drives_both(log: list[str]) -> None:
    turns = Turns()
    over, done = Outcome.OVER, Outcome.DONE
    first, second = Script(turns, "a", log, [over] * 6 + [done]), Script(turns, "b", log, [over] * 3 + [done])
    drivers: set[int] = set()

    def first_body() -> None:
        drivers.add(threading.get_ident())
        if len(log) == 1:
            first.asked.wait(10)

    first.body = first_body
    second.body = lambda: drivers.add(threading.get_ident())
    threads = [start(turns, first)]
    wait_for(lambda: log == ["a"])
    threads.append(start(turns, second))
    join(*threads)
    assert log == list("abababab") + list("aaa")
    assert len(drivers) == 1
    assert second.contended == [True] * 4
    turns.close()


def test_who_becomes_ready_ends_the_turn_of_the_other(log: list[str]) -> None:
    turns = Turns()
    spinner = Script(turns, "s", log, [Outcome.OVER, Outcome.DONE])
    spinner.body = lambda: spinner.asked.wait(10) if log == ["s"] else None
    late = Script(turns, "l", log, [Outcome.DONE])
    one = start(turns, spinner)
    wait_for(lambda: log == ["s"])
    join(start(turns, late), one)
    assert log == ["s", "l", "s"]
    turns.close()


def test_a_slice_ends_by_itself_while_others_wait(log: list[str]) -> None:
    turns = Turns()
    runners = [Script(turns, name, log, [Outcome.OVER] * 5 + [Outcome.DONE]) for name in "ab"]
    for runner in runners:
        runner.body = lambda runner=runner: runner.asked.wait(10) or pytest.fail("nobody asked")  # type: ignore[misc]
    runners[0].outcomes[:] = [Outcome.OVER] * 6
    threads = [start(turns, runner) for runner in runners]
    wait_for(lambda: log.count("a") == 6)
    runners[0].outcomes.append(Outcome.DONE)
    runners[0].body = lambda: None
    join(*threads)
    assert log.count("b") == 6
    turns.close()


def test_idle_runners_wait_and_a_wake_during_the_turn_is_not_lost(log: list[str]) -> None:
    turns = Turns()
    runner = Script(turns, "a", log, [Outcome.IDLE, Outcome.IDLE, Outcome.DONE])
    runner.body = lambda: turns.wake(runner.seat) if len(log) == 1 else None
    thread = start(turns, runner)
    wait_for(lambda: len(log) == 2)
    time.sleep(0.02)
    assert len(log) == 2
    turns.wake(runner.seat)
    join(thread)
    turns.close()


def test_a_done_driver_hands_over_to_the_thread_of_another(log: list[str]) -> None:
    turns = Turns()
    release = threading.Event()
    first = Script(turns, "a", log, [Outcome.DONE])
    first.body = lambda: release.wait(10)
    second = Script(turns, "b", log, [Outcome.OVER, Outcome.IDLE, Outcome.DONE])
    threads = [start(turns, first)]
    wait_for(lambda: log == ["a"])
    threads.append(start(turns, second))
    wait_for(lambda: len(turns._ready) == 1)
    release.set()
    join(threads[0])
    wait_for(lambda: log == ["a", "b", "b"])
    turns.wake(second.seat)
    join(threads[1])
    turns.close()


def test_actions_run_between_turns(log: list[str]) -> None:
    turns = Turns()
    turns.between(lambda: log.append("at once"))
    runner = Script(turns, "a", log, [Outcome.OVER, Outcome.DONE])
    runner.body = lambda: runner.asked.wait(10) if log[-1] == "a" and "later" not in log else None
    thread = start(turns, runner)
    wait_for(lambda: log[-1] == "a")
    turns.between(lambda: log.append("later"))
    join(thread)
    assert log == ["at once", "a", "later", "a"]
    turns.close()


def test_a_turn_ends_soon_once_it_has_done_what_another_one_waits_for(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Turns, "SLICE", 100.0)
    turns = Turns()
    first, second = Script(turns, "a", log, [Outcome.OVER, Outcome.DONE]), Script(turns, "b", log, [Outcome.DONE])
    queued = threading.Event()

    def body() -> None:
        if len(log) > 1:
            return
        assert queued.wait(10)
        first.asked.clear()  # by whoever became ready
        turns.hand_over_soon()
        assert first.asked.wait(10)

    first.body = body
    threads = [start(turns, first)]
    wait_for(lambda: log == ["a"])
    threads.append(start(turns, second))
    wait_for(first.asked.is_set)
    queued.set()
    join(*threads)
    assert log == ["a", "b", "a"]
    turns.close()
