"""Guarding from outside: VTL1 without the guest's hypercalls."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.vmm.fakes import FakeLevel, returns
from vmm.guarding import guard
from vmm.machine import Machine
from vmm.states import Operation
from vtlab.errors import Refused, WrongState
from vtlab.v1 import vcpu_pb2
from vtlab.v1.vcpu_pb2 import InterceptFilter, Update

Make = Callable[..., tuple[Machine, FakeLevel, FakeLevel]]
COMMIT, DENY = vcpu_pb2.ACTION_COMMIT, vcpu_pb2.ACTION_DENY


def test_vtl1_is_enabled_as_for_a_client_and_its_filter_holds(make_machine: Make) -> None:
    machine, _, monitor = make_machine(vp_count=2)
    machine.start()
    watched = Update(intercepts=InterceptFilter(cr4_mask=1 << 20))
    monitor.say(returns(watched, action=COMMIT), returns(watched, action=COMMIT))
    with machine.doing(Operation.GUARD, parked=True) as board:
        guard(board)
        assert board.vtl.enabled == 3
        assert [processor.watched.filter.cr4_mask for processor in board.processors] == [1 << 20] * 2
    entered = monitor.wait_entered(2)
    assert {enter.reason for enter in entered} == {vcpu_pb2.ENTER_REASON_ENABLE}
    assert {enter.intercept.origin for enter in entered} == {vcpu_pb2.ORIGIN_CLIENT}
    assert machine.describe().vtl1_enabled
    with machine.doing(Operation.GUARD, parked=True) as board, pytest.raises(WrongState, match="already"):
        guard(board)


def test_a_refusal_changes_nothing(make_machine: Make) -> None:
    machine, _, monitor = make_machine()
    machine.start()
    monitor.say(returns(action=DENY, reason="no operator's policy"))
    with machine.doing(Operation.GUARD, parked=True) as board, pytest.raises(Refused, match="no operator's policy"):
        guard(board)
    assert board.vtl.enabled == 1
    assert not machine.describe().vtl1_enabled


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"vtl1": False}, "without VTL1"), ({"personality": vcpu_pb2.PERSONALITY_GUEST_CODE}, "own code")],
)
def test_machines_that_cannot_be_guarded(make_machine: Make, fields: dict[str, object], match: str) -> None:
    machine, _, _ = make_machine(**fields)
    machine.start()
    with machine.doing(Operation.GUARD, parked=True) as board, pytest.raises(WrongState, match=match):
        guard(board)


def test_it_has_to_run(make_machine: Make) -> None:
    machine, _, _ = make_machine()
    with pytest.raises(WrongState, match="guard"), machine.doing(Operation.GUARD, parked=True):
        pass
