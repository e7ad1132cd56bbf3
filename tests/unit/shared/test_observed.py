"""What a client waits for when the machine cannot give it any more."""

from __future__ import annotations

import pytest

from vtlab.client.serial import SILENT_RESETS, Observed, SerialReader
from vtlab.errors import GuestLost, TimedOut
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import SerialOutput


def reset(observed: Observed, generation: int) -> None:
    machine = vmm_pb2.Machine(state=vmm_pb2.MACHINE_STATE_RUNNING, generation=generation, reason="triple fault")
    observed.take(vmm_pb2.WatchEventsResponse(event=vmm_pb2.Event(state=machine)))


def say(observed: Observed, data: bytes) -> None:
    observed.take(vmm_pb2.WatchEventsResponse(event=vmm_pb2.Event(serial=SerialOutput(port=0, data=data))))


def test_a_guest_that_only_resets_itself_is_not_waited_for() -> None:
    observed = Observed("machine 'a'")
    for generation in range(1, SILENT_RESETS + 2):
        reset(observed, generation)
    with pytest.raises(GuestLost, match=r"resets itself again and again \(triple fault\) and says nothing"):
        SerialReader(observed, 0).read_until("ready", timeout=60)


def test_resets_of_a_guest_that_speaks_between_them_are_no_loop() -> None:
    observed = Observed("machine 'a'")
    for generation in range(1, 3 * SILENT_RESETS):
        reset(observed, generation)
        say(observed, b"starting\n")
    with pytest.raises(TimedOut):
        SerialReader(observed, 0).read_until("ready", timeout=0.01)


def test_what_came_before_the_loop_is_found() -> None:
    observed = Observed("machine 'a'")
    say(observed, b"ready")
    for generation in range(1, 2 * SILENT_RESETS):
        reset(observed, generation)
    assert SerialReader(observed, 0).read_until("ready", timeout=1) == "ready"
