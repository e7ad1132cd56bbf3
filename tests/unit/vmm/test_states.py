"""Every cell of the table of state moves, on a real machine between fake levels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.unit.vmm.fakes import FakeLevel
from tests.waiting import wait_until
from vmm.board import reset_wanted
from vmm.machine import Machine
from vmm.states import CREATED, FAILED, MOVES, PAUSED, RUNNING, STATES, STOPPED, Operation, after, state_name
from vtlab.errors import GuestMisbehaved, NotFound, WrongState
from vtlab.v1.vcpu_pb2 import DebugExit, Exit, ResetRequest
from vtlab.v1.vmm_pb2 import HijackRequest

Parts = tuple[Machine, FakeLevel, FakeLevel]

INSIDE = {Operation.GUEST_ENDS, Operation.GUEST_RESETS, Operation.BREAK}
ASKED: dict[Operation, Callable[[Machine], object]] = {
    Operation.START: lambda machine: machine.start(),
    Operation.PAUSE: lambda machine: machine.pause(),
    Operation.RESUME: lambda machine: machine.resume(),
    Operation.STOP: lambda machine: machine.stop(),
    Operation.RESET: lambda machine: machine.reset(),
    Operation.HIJACK: lambda machine: machine.hijack(HijackRequest(resume=machine.describe().state == RUNNING)),
}


def look(machine: Machine, operation: Operation) -> None:
    with machine.doing(operation, parked=True):
        pass


def bring_to(parts: Parts, state: int) -> Machine:
    machine, guest, _ = parts
    if state == CREATED:
        return machine
    machine.start()
    if state == PAUSED:
        machine.pause()
    if state == STOPPED:
        machine.stop()
    if state == FAILED:
        guest.say(GuestMisbehaved("guest", "on purpose"))
        wait_until(lambda: machine.describe().state == FAILED)
    return machine


@pytest.mark.parametrize("operation", [o for o in Operation if o not in INSIDE and o is not Operation.DESTROY])
@pytest.mark.parametrize("state", STATES, ids=state_name)
def test_every_cell(make_machine: Callable[..., Parts], state: int, operation: Operation) -> None:
    machine = bring_to(make_machine(), state)
    act = ASKED.get(operation) or partial(look, operation=operation)
    if operation in MOVES[state]:  # type: ignore[index]
        act(machine)
        assert machine.describe().state == MOVES[state][operation]  # type: ignore[index]
        return
    with pytest.raises(WrongState) as caught:
        act(machine)
    assert caught.value.state == state_name(state)  # type: ignore[arg-type]
    assert caught.value.operation == operation
    assert machine.vm in caught.value.subject
    assert machine.describe().state == state


@pytest.mark.parametrize("state", STATES, ids=state_name)
def test_destroy_is_always_legal(make_machine: Callable[..., Parts], state: int) -> None:
    machine = bring_to(make_machine(), state)
    machine.destroy()
    assert not machine._directory.exists()
    with pytest.raises(NotFound):
        machine.destroy()


def test_the_table_has_no_state_without_an_exit() -> None:
    for state in STATES:
        assert Operation.DESTROY in MOVES[state]
        assert Operation.BREAK in MOVES[state]
    for operation in (Operation.START, Operation.RESUME):
        assert sum(operation in MOVES[state] for state in STATES) == 1


def test_debug_exit_stops_with_its_value(machine_parts: Parts) -> None:
    machine, guest, _ = machine_parts
    guest.say(Exit(debug_exit=DebugExit(value=0)))
    machine.start()
    wait_until(lambda: machine.describe().state == STOPPED)
    description = machine.describe()
    assert description.HasField("debug_exit")
    assert description.debug_exit == 0
    assert "debug-exit" in description.reason


@pytest.mark.parametrize(("stop_on_reset", "state", "generation"), [(False, RUNNING, 2), (True, STOPPED, 1)])
def test_reset_request_resets_or_stops(
    make_machine: Callable[..., Parts], stop_on_reset: bool, state: int, generation: int
) -> None:
    machine, guest, _ = make_machine(stop_on_reset=stop_on_reset)
    guest.say(Exit(reset_request=ResetRequest(source="0xcf9")))
    machine.start()

    def ended() -> bool:
        description = machine.describe()
        return (description.state, description.generation) == (state, generation) and "0xcf9" in description.reason

    wait_until(ended)


def test_a_reset_that_was_under_way_does_not_end_a_pause(machine_parts: Parts) -> None:
    machine, _, _ = machine_parts
    machine.start()
    machine.pause()
    machine._conclude(machine._board, reset_wanted(machine.spec, "0xcf9"))
    assert (machine.describe().state, machine.describe().generation) == (PAUSED, 2)
    assert machine._board.gate._places[0].name != "INSIDE"
    machine.resume()
    wait_until(lambda: machine._board.gate._places[0].name == "INSIDE")


class Lifecycle(RuleBasedStateMachine):
    """Random operations: the machine's state is always the table's, and its vCPU runs only when RUNNING."""

    make: Callable[..., Parts]

    def __init__(self) -> None:
        super().__init__()
        self.machine, self.guest, _ = type(self).make()
        self.state: int = CREATED

    @rule(operation=st.sampled_from(sorted(ASKED)))
    def ask(self, operation: Operation) -> None:
        try:
            self.state = after(self.state, operation)  # type: ignore[arg-type]
        except WrongState:
            with pytest.raises(WrongState):
                ASKED[operation](self.machine)
        else:
            ASKED[operation](self.machine)
        self.agrees()

    @precondition(lambda self: self.state == RUNNING)
    @rule()
    def guest_ends(self) -> None:
        self.guest.say(Exit(debug_exit=DebugExit(value=1)))
        wait_until(lambda: self.machine.describe().state == STOPPED)
        self.state = STOPPED

    def agrees(self) -> None:
        assert self.machine.describe().state == self.state
        if self.state == RUNNING:
            wait_until(lambda: self.machine._board.gate._places[0].name == "INSIDE")
        else:
            assert self.machine._board.gate._places[0].name in ("PARKED", "GONE", "BUSY")

    def teardown(self) -> None:
        self.machine.destroy()
        assert not self.machine._directory.exists()


def test_lifecycle(make_machine: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lifecycle, "make", staticmethod(make_machine), raising=False)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Lifecycle, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))
