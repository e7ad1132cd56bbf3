"""ACPI's fixed hardware: timer, its event, and switching off."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.devices.bench_machine import Machine
from vtl0_guest.cpu.devices.power_management import (
    CONTROL_BLOCK,
    EVENT_BLOCK,
    PORTS,
    SLEEP_TYPE_DISK,
    SLEEP_TYPE_OFF,
    SLEEP_TYPE_RAM,
    TIMER_BLOCK,
    TIMER_HZ,
)
from vtlab.v1 import vcpu_pb2

HALF = (1 << 23) / TIMER_HZ


def read(machine: Machine, port: int, size: int) -> int:
    return machine.platform.ports[port].read(port, size)


def write(machine: Machine, port: int, size: int, value: int) -> None:
    machine.platform.ports[port].write(port, size, value)


def test_the_timer_counts_and_wraps_at_24_bits(machine: Machine) -> None:
    start = read(machine, TIMER_BLOCK, 4)
    machine.clock.advance(0.5)
    assert read(machine, TIMER_BLOCK, 4) - start == TIMER_HZ // 2
    machine.clock.advance(10)
    assert read(machine, TIMER_BLOCK, 4) < 1 << 24
    assert read(machine, TIMER_BLOCK + 3, 1) == 0


def test_its_carry_is_an_event_that_interrupts_if_enabled(machine: Machine) -> None:
    machine.clock.advance(HALF * 1.01)
    assert read(machine, EVENT_BLOCK, 2) == 1
    write(machine, EVENT_BLOCK, 2, 1)
    assert read(machine, EVENT_BLOCK, 2) == 0
    write(machine, EVENT_BLOCK + 2, 2, 1)
    due = machine.platform.next_deadline()
    assert due is not None
    machine.clock.advance(due - machine.clock.now())
    machine.platform.advance(machine.clock.now())
    assert read(machine, EVENT_BLOCK, 2) == 1
    assert machine.platform.pic.slave.irr & 2, "SCI is IRQ 9"
    write(machine, EVENT_BLOCK, 4, 1)
    assert read(machine, EVENT_BLOCK, 4) == 0


def test_enable_bits_stick(machine: Machine) -> None:
    write(machine, EVENT_BLOCK + 2, 2, 0xFFFF)
    assert read(machine, EVENT_BLOCK + 2, 2) == 0x721


def test_the_machine_is_always_in_acpi_mode(machine: Machine) -> None:
    assert read(machine, CONTROL_BLOCK, 2) & 1
    write(machine, CONTROL_BLOCK, 2, 0)
    assert read(machine, CONTROL_BLOCK, 2) & 1


def test_s3_s4_and_s5_end_the_run_and_other_sleep_types_do_not(machine: Machine) -> None:
    exits = {
        SLEEP_TYPE_RAM: vcpu_pb2.Sleep(source="ACPI S3"),
        SLEEP_TYPE_DISK: vcpu_pb2.PowerOff(source="ACPI S4"),
        SLEEP_TYPE_OFF: vcpu_pb2.PowerOff(source="ACPI S5"),
    }
    for kind in range(8):
        write(machine, CONTROL_BLOCK, 2, kind << 10)
        assert machine.platform.take_exit() is None
        write(machine, CONTROL_BLOCK, 2, kind << 10 | 1 << 13)
        assert machine.platform.take_exit() == exits.get(kind)


def test_s5_by_bytes(machine: Machine) -> None:
    write(machine, CONTROL_BLOCK, 1, 0)
    write(machine, CONTROL_BLOCK + 1, 1, SLEEP_TYPE_OFF << 2 | 1 << 5)
    assert machine.platform.take_exit() == vcpu_pb2.PowerOff(source="ACPI S5")


@given(
    st.lists(st.tuples(st.sampled_from(PORTS), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF), st.floats(0, 3)))
)
def test_any_access_is_answered_within_its_size(steps: list[tuple[int, int, int, float]]) -> None:
    machine = Machine()
    for port, size, value, seconds in steps:
        write(machine, port, size, value)
        machine.clock.advance(seconds)
        machine.platform.advance(machine.clock.now())
        assert 0 <= read(machine, port, size) < 1 << 8 * size
