"""Several vCPUs of one machine: filters and rights reach all of them before any runs on, and halts wait in the core."""

from __future__ import annotations

import threading

import pytest

from tests.unit.vmm.fakes import FakeLevel, returns
from vmm.board import Board
from vmm.exits import serve
from vmm.processor import Processor
from vmm.vtl import VTL1
from vtlab.errors import GuestMisbehaved
from vtlab.v1 import vcpu_pb2
from vtlab.v1.registers_pb2 import REGISTER_NAME_CR0
from vtlab.v1.vcpu_pb2 import (
    Enter,
    Exit,
    Halt,
    InterceptFilter,
    PageAccess,
    PeerUpdate,
    ProtectionUpdate,
    RegisterWrite,
    Update,
    VtlReturn,
)
from vtlab.v1.vmm_pb2 import MachineSpec

FILTER = Update(intercepts=InterceptFilter(cr0_mask=1))
WRITE = Exit(register_write=RegisterWrite(name=REGISTER_NAME_CR0))


@pytest.fixture
def spec() -> MachineSpec:
    return MachineSpec(ram_size=2 << 20, vp_count=3, vtl1=True)


class Other:
    """vCPU 1, whose thread runs VTL0 until it is kicked, again and again."""

    def __init__(self, board: Board) -> None:
        self.exits = 0
        self._processor = board.processors[1]
        self._gate = board.gate
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._processor.run(self._processor.resume())
                self.exits += 1
        except Exception:  # noqa: BLE001 - the gate was closed
            self._gate.gone(1)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def peers(*updates: PeerUpdate, stop_all: bool) -> Exit:
    verdict = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT)
    return Exit(vtl_return=VtlReturn(resolution=verdict, peers=updates, stop_all=stop_all))


@pytest.mark.parametrize("stop_all", [False, True])
def test_a_filter_for_another_vcpu(board: Board, guest: FakeLevel, monitor: FakeLevel, stop_all: bool) -> None:
    board.processors[0].vtl.enabled |= 1 << VTL1
    board.gate.gone(2)
    other = Other(board)
    guest.wait_entered(1)
    monitor.say(peers(PeerUpdate(vp_index=1, update=FILTER), stop_all=stop_all))
    answer = serve(board, board.processors[0], WRITE)
    assert isinstance(answer, Enter)
    if stop_all:
        entered = guest.wait_entered(2)
        assert list(entered[1].updates) == [FILTER]
    else:
        assert other.exits == 0
        assert board.processors[1].waiting == 1
    assert board.processors[1].watched.filter == FILTER.intercepts
    board.gate.gone(0)
    board.gate.close(5)
    other.join()


def test_another_vcpu_is_parked_before_rights_are_given(board: Board, guest: FakeLevel, monitor: FakeLevel) -> None:
    """What it was doing must not go on in the memory that VTL1 puts in place."""
    board.processors[0].vtl.enabled |= 1 << VTL1
    board.gate.gone(2)
    other = Other(board)
    guest.wait_entered(1)
    park = Update(park_processor=vcpu_pb2.ParkProcessor())
    opened = ProtectionUpdate(runs=[1, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)
    verdict = vcpu_pb2.Resolution(action=vcpu_pb2.ACTION_COMMIT)
    answer = VtlReturn(resolution=verdict, updates=[Update(protection=opened)], stop_all=True)
    answer.peers.append(PeerUpdate(vp_index=1, update=park))
    monitor.say(Exit(vtl_return=answer))
    serve(board, board.processors[0], WRITE)
    given = [update for enter in guest.wait_entered(2)[1:] for update in enter.updates]
    assert given[0] == park
    board.gate.gone(0)
    board.gate.close(5)
    other.join()


def test_vtl1_is_told_the_whole_state_when_it_asks(board: Board, guest: FakeLevel, monitor: FakeLevel) -> None:
    board.processors[0].vtl.enabled |= 1 << VTL1
    guest.processor_state.gdtr.base = 0x1234
    monitor.say(Exit(state_request=vcpu_pb2.StateRequest()), returns(action=vcpu_pb2.ACTION_COMMIT))
    serve(board, board.processors[0], WRITE)
    asked, told = monitor.entered[-2:]
    assert (told.reason, told.state.gdtr.base) == (vcpu_pb2.ENTER_REASON_RESUME, 0x1234)
    assert (told.cause, told.cause_vp_index) == (asked.cause, asked.cause_vp_index)


@pytest.mark.parametrize("peer", [PeerUpdate(vp_index=3, update=FILTER), PeerUpdate(vp_index=1, update=Update())])
def test_nonsense_for_another_vcpu(board: Board, monitor: FakeLevel, peer: PeerUpdate) -> None:
    board.processors[0].vtl.enabled |= 1 << VTL1
    monitor.say(peers(peer, stop_all=False))
    with pytest.raises(GuestMisbehaved, match="updates vCPU"):
        serve(board, board.processors[0], WRITE)


def test_rights_reach_a_running_vcpu_before_anybody_goes_on(board: Board, guest: FakeLevel) -> None:
    board.gate.gone(2)
    other = Other(board)
    guest.wait_entered(1)
    update = ProtectionUpdate(runs=[5, 1], access=PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_SEALED)
    board.protect([update])
    assert [list(processor._pending) for processor in (board.processors[0], board.processors[2])] == [
        [Update(protection=update)]
    ] * 2
    assert list(guest.wait_entered(2)[1].updates) == [Update(protection=update)]
    board.gate.gone(0)
    board.gate.close(5)
    other.join()


def test_a_policy_judges_every_vcpu_once_one_has_enabled_it(board: Board, monitor: FakeLevel) -> None:
    second = board.processors[1]
    answer = serve(board, second, WRITE)
    assert isinstance(answer, Enter)
    assert answer.resolution.action == vcpu_pb2.ACTION_DENY
    assert not monitor.entered
    board.processors[0].vtl.enabled |= 1 << VTL1
    monitor.say(returns(action=vcpu_pb2.ACTION_COMMIT, reason="rule"))
    answer = serve(board, second, WRITE)
    assert isinstance(answer, Enter)
    assert answer.resolution.action == vcpu_pb2.ACTION_COMMIT


def test_halt_waits_in_the_core_where_another_vcpu_can_end_it(board: Board) -> None:
    answer = serve(board, board.processors[1], Exit(halt=Halt(interrupts_enabled=False)))
    assert isinstance(answer, Enter)
    assert answer.resolution.action == vcpu_pb2.ACTION_COMMIT


def test_exits_are_served_one_at_a_time(board: Board, monitor: FakeLevel) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(_enter: Enter) -> Exit:
        entered.set()
        release.wait(10)
        return returns(action=vcpu_pb2.ACTION_COMMIT)

    board.processors[0].vtl.enabled |= 1 << VTL1
    monitor.say(slow)
    done: list[Processor] = []

    def handle(processor: Processor, exit_: Exit) -> None:
        serve(board, processor, exit_)
        done.append(processor)

    first = threading.Thread(target=handle, args=(board.processors[0], WRITE))
    first.start()
    assert entered.wait(10)
    second = threading.Thread(target=handle, args=(board.processors[1], Exit(halt=Halt())))
    second.start()
    second.join(0.05)
    assert not done
    release.set()
    first.join(10)
    second.join(10)
    assert done == board.processors[:2]
