"""The guard, callbacks, and clocks."""

from __future__ import annotations

import threading
import time

from tests.unit.devices.bench_machine import Machine
from vtl0_guest.cpu.devices.clock import HostClock


def test_callbacks_run_without_the_lock(machine: Machine) -> None:
    """A callback may wait for a thread that itself uses the platform, as the core's condition variable does."""
    reached = []

    def on_wake(vp_index: int) -> None:
        other = threading.Thread(target=lambda: reached.append(machine.platform.pending_vector(vp_index)))
        other.start()
        other.join(timeout=5)

    machine.start_pic()
    machine.platform.on_wake = on_wake
    machine.platform.pulse_irq(1)
    assert reached[:1] == [0x21]


def test_advance_and_ports_from_two_threads(machine: Machine) -> None:
    machine.start_pic()
    machine.outb(0x43, 0x34)
    machine.outb(0x40, 10, 0)
    machine.platform.on_wake = lambda _vp_index: None
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            machine.clock.advance(1e-3)
            machine.platform.advance(machine.clock.now())

    timer = threading.Thread(target=tick)
    timer.start()
    taken = 0
    end = time.monotonic() + 60
    while taken < 20 and time.monotonic() < end:
        if machine.pending() == 0x20:
            assert machine.take() == 0x20
            machine.outb(0x20, 0x20)
            taken += 1
    stop.set()
    timer.join()
    assert taken == 20


def test_host_clock_measures_its_counter() -> None:
    clock = HostClock()
    frequency = clock.tsc_hz()
    before, counter = clock.now(), clock.tsc()
    while clock.now() < before + 0.02:
        pass
    measured = (clock.tsc() - counter) / (clock.now() - before)
    assert abs(measured / frequency - 1) < 0.1
