"""The gate: who may enter, who waits for whom."""

from __future__ import annotations

import threading

import pytest

from tests.waiting import wait_until
from vmm.gate import Gate, Place
from vtlab.errors import Cancelled, TimedOut, WrongState


class Vcpu(threading.Thread):
    """Goes round through the gate; inside, it waits until it is kicked."""

    def __init__(self, gates: list[Gate], index: int) -> None:
        super().__init__(daemon=True)
        self.gates = gates
        self.index = index
        self.kicked = threading.Event()
        self.rounds = 0
        self.busy = threading.Event()
        self.busy.set()

    def run(self) -> None:
        gate = self.gates[0]
        sequence = 0
        try:
            while True:
                sequence += 1
                self.kicked.clear()
                if gate.enter(self.index, sequence):
                    self.kicked.set()
                self.kicked.wait()
                self.rounds += 1
                gate.leave(self.index)
                self.busy.wait()
        except Cancelled:
            gate.gone(self.index)


def crew(count: int) -> tuple[Gate, list[Vcpu]]:
    gates: list[Gate] = []
    vcpus = [Vcpu(gates, index) for index in range(count)]
    gate = Gate(count, lambda index, _sequence: vcpus[index].kicked.set())
    gates.append(gate)
    for vcpu in vcpus:
        vcpu.start()
    wait_until(lambda: all(place is Place.INSIDE for place in gate._places))
    return gate, vcpus


def test_none_inside_and_all_parked() -> None:
    gate, vcpus = crew(3)
    with gate.none_inside():
        assert Place.INSIDE not in gate._places
    wait_until(lambda: all(place is Place.INSIDE for place in gate._places))
    with gate.all_parked(), gate.all_parked():
        assert set(gate._places) == {Place.PARKED}
    wait_until(lambda: all(place is Place.INSIDE for place in gate._places))
    gate.close()
    assert set(gate._places) == {Place.GONE}
    for vcpu in vcpus:
        vcpu.join(5)
        assert not vcpu.is_alive()


def test_busy_is_enough_to_move_pages_but_not_to_look() -> None:
    gate, (vcpu,) = crew(1)
    vcpu.busy.clear()
    gate.kick(0)
    wait_until(lambda: gate._places[0] is Place.BUSY)
    with gate.none_inside():
        pass
    with pytest.raises(TimedOut, match="vCPU 0"), gate.all_parked(patience=0.05):
        pass
    vcpu.busy.set()
    wait_until(lambda: gate._places[0] is Place.INSIDE)  # a hold that timed out holds nothing
    gate.close()


def test_flush_lets_through_once() -> None:
    gate, (vcpu,) = crew(1)
    with gate.all_parked():
        before = vcpu.rounds
        gate.flush(0)
        assert gate._places[0] is Place.PARKED
        assert vcpu.rounds == before + 1
    gate.close()
    with pytest.raises(WrongState):
        gate.flush(0)


def test_halt_until_woken() -> None:
    gate, _ = crew(1)
    gate.halt(0)
    gate.kick(0)
    wait_until(lambda: gate._places[0] is Place.PARKED)
    gate.wake(0)
    wait_until(lambda: gate._places[0] is Place.INSIDE)
    gate.close()


def test_a_vcpu_that_does_not_come_out() -> None:
    gate = Gate(1, lambda _index, _sequence: None)
    gate.enter(0, 1)
    with pytest.raises(TimedOut, match="does not leave"), gate.none_inside(patience=0.05):
        pass
    with pytest.raises(TimedOut, match="does not stop"):
        gate.close(patience=0.05)


def test_kicks_are_repeated_until_they_work() -> None:
    """A kick that overtakes its enter is lost; the next one is not."""
    kicks: list[int] = []

    def kick(index: int, sequence: int) -> None:
        kicks.append(sequence)
        if len(kicks) == 3:
            gate.leave(index)

    gate = Gate(1, kick)
    gate.enter(0, 9)
    with gate.none_inside(patience=5):
        assert kicks == [9, 9, 9]
