"""The interval timer and the real-time clock, in manual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.devices.bench_machine import Machine
from vtl0_guest.cpu.devices import pit
from vtl0_guest.cpu.devices.clock import ManualClock

TICK = 1 / pit.HZ


def program(machine: Machine, counter: int, mode: int, count: int) -> None:
    machine.outb(0x43, counter << 6 | 0x30 | mode << 1)
    machine.outb(0x40 + counter, count & 0xFF, count >> 8)


def read_latched(machine: Machine, counter: int) -> int:
    machine.outb(0x43, counter << 6)
    return machine.inb(0x40 + counter) | machine.inb(0x40 + counter) << 8


def test_rate_generator_interrupts_at_each_period(machine: Machine) -> None:
    machine.start_pic(masks=(0xFE, 0xFF))
    program(machine, 0, 2, 11932)
    if machine.pending():
        machine.take()
        machine.outb(0x20, 0x20)
    taken = 0
    for _ in range(100):
        machine.pass_time(11932 * TICK)
        if machine.pending() == 0x20:
            machine.take()
            machine.outb(0x20, 0x20)
            taken += 1
    assert taken in (99, 100)
    assert machine.rearmed


def test_terminal_count_interrupts_once(machine: Machine) -> None:
    machine.start_pic(masks=(0xFE, 0xFF))
    program(machine, 0, 0, 1000)
    machine.pass_time(999 * TICK)
    assert machine.pending() is None
    machine.pass_time(2 * TICK)
    assert machine.take() == 0x20
    machine.outb(0x20, 0x20)
    assert machine.platform.next_deadline() is None


def test_missed_periods_are_one_interrupt(machine: Machine) -> None:
    machine.start_pic(masks=(0xFE, 0xFF))
    program(machine, 0, 2, 1000)
    machine.clock.advance(1.0)
    machine.platform.advance(machine.clock.now())
    machine.take()
    machine.outb(0x20, 0x20)
    assert machine.pending() is None
    deadline = machine.platform.next_deadline()
    assert deadline is not None
    assert 0 < deadline - machine.clock.now() <= 1001 * TICK


def test_shortest_period_is_bounded(machine: Machine) -> None:
    program(machine, 0, 2, 1)
    start = machine.rearmed
    machine.pass_time(0.01)
    assert 50 < machine.rearmed - start <= 101


def test_latched_count_stays_until_read(machine: Machine) -> None:
    program(machine, 0, 2, 10000)
    machine.clock.advance(100.4 * TICK)
    machine.outb(0x43, 0)
    machine.clock.advance(500 * TICK)
    machine.outb(0x43, 0)
    assert machine.inb(0x40) | machine.inb(0x40) << 8 == 9900
    assert read_latched(machine, 0) == 9400


def test_read_back_gives_status_before_count(machine: Machine) -> None:
    program(machine, 0, 3, 1000)
    machine.clock.advance(10.4 * TICK)
    machine.outb(0x43, 0xC0 | 1 << 1)  # count and status of counter 0
    status, count = machine.inb(0x40), machine.inb(0x40) | machine.inb(0x40) << 8
    assert status == 0x80 | 0x30 | 3 << 1
    assert count == 980, "mode 3 counts by two"


def test_port_61_gate_and_output(machine: Machine) -> None:
    """The way kernels measure the TSC: gate counter 2, mode 0, wait for OUT."""
    machine.outb(0x61, 0)
    program(machine, 2, 0, 1193)
    machine.clock.advance(1.0)
    assert not machine.inb(0x61) & 0x20, "the gate is closed"
    machine.outb(0x61, 1)
    machine.clock.advance(1192.5 * TICK)
    assert machine.inb(0x61) & 0x21 == 0x01
    machine.clock.advance(1 * TICK)
    assert machine.inb(0x61) & 0x21 == 0x21


def test_one_shot_starts_on_the_gate() -> None:
    clock = ManualClock()
    counter = pit.Counter(clock, gate=False)
    counter.control(3, 1)
    counter.write(10)
    counter.write(0)
    assert counter.output()
    counter.set_gate(True)
    assert not counter.output()
    clock.advance(10.5 * TICK)
    assert counter.output()


@given(st.integers(0, 7), st.integers(1, 3), st.integers(0, 65535), st.floats(0, 2), st.booleans())
def test_any_programming_gives_a_consistent_counter(
    mode: int, access: int, count: int, later: float, gate: bool
) -> None:
    clock = ManualClock()
    counter = pit.Counter(clock, gate)
    counter.control(access, mode)
    for byte in (count & 0xFF, count >> 8):
        counter.write(byte)
    clock.advance(later)
    assert 0 <= counter.value() <= 0xFFFF
    assert 1 <= counter.count <= 0x10000
    rise = counter.next_rise()
    if rise is not None:
        assert rise > clock.now() - 1e-8
        clock.advance(rise - clock.now() + 1e-8)
        assert counter.output()


# ------------------------------------------------------------------------------------------------------------- RTC


def cmos(machine: Machine, index: int) -> int:
    machine.outb(0x70, index)
    return machine.inb(0x71)


def set_cmos(machine: Machine, index: int, value: int) -> None:
    machine.outb(0x70, index)
    machine.outb(0x71, value)


def test_time_is_bcd_utc(machine: Machine) -> None:
    # ManualClock starts at 2000-01-01 00:00:00, a Saturday.
    machine.clock.advance(13 * 3600 + 45 * 60 + 27)
    assert [cmos(machine, index) for index in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [0x27, 0x45, 0x13, 7, 1, 1, 0, 0x20]


def test_twelve_hour_and_binary_formats(machine: Machine) -> None:
    set_cmos(machine, 0x0B, 0x04)
    assert cmos(machine, 4) == 12, "midnight is 12 AM"
    machine.clock.advance(12 * 3600)
    assert cmos(machine, 4) == 0x80 | 12
    machine.clock.advance(3600 + 59)
    assert (cmos(machine, 4), cmos(machine, 0)) == (0x81, 59)


def test_setting_the_time(machine: Machine) -> None:
    set_cmos(machine, 0x0B, 0x82)
    for index, value in ((0, 0x58), (2, 0x59), (4, 0x23), (7, 0x31), (8, 0x12), (9, 0x99), (0x32, 0x20)):
        set_cmos(machine, index, value)
    machine.clock.advance(100)
    assert cmos(machine, 0) == 0x58, "time stands still while SET"
    set_cmos(machine, 0x0B, 0x02)
    machine.clock.advance(3)
    assert [cmos(machine, index) for index in (0, 2, 4, 7, 8, 9, 0x32)] == [0x01, 0, 0, 1, 1, 0, 0x21]


def test_update_in_progress_only_at_the_end_of_a_second(machine: Machine) -> None:
    assert not cmos(machine, 0x0A) & 0x80
    machine.clock.advance(0.9999)
    assert cmos(machine, 0x0A) & 0x80
    machine.clock.advance(0.0002)
    assert not cmos(machine, 0x0A) & 0x80


@pytest.mark.parametrize(
    ("ram", "bytes_"),
    [
        (64 << 20, {0x15: 0x80, 0x16: 0x02, 0x17: 0x00, 0x18: 0xFC, 0x34: 0x00, 0x35: 0x03, 0x5B: 0}),
        (5 << 30, {0x17: 0xFF, 0x18: 0xFF, 0x34: 0x00, 0x35: 0xFF, 0x5B: 0x00, 0x5C: 0x40, 0x5D: 0x00}),
    ],
)
def test_memory_sizes(ram: int, bytes_: dict[int, int]) -> None:
    machine = Machine(ram_size=ram)
    assert {index: cmos(machine, index) for index in bytes_} == bytes_


def test_periodic_interrupt_until_register_c_is_read(machine: Machine) -> None:
    machine.start_pic(masks=(0xFB, 0xFE))
    set_cmos(machine, 0x0B, 0x42)
    machine.pass_time(1.5 / 1024)
    assert machine.take() == 0x28
    machine.outb(0xA0, 0x20)
    machine.outb(0x20, 0x20)
    machine.pass_time(5 / 1024)
    assert machine.pending() is None, "no new edge before register C is read"
    assert cmos(machine, 0x0C) == 0xC0
    machine.pass_time(1 / 1024)
    assert machine.pending() == 0x28


def test_alarm_and_update_interrupts(machine: Machine) -> None:
    machine.start_pic(masks=(0xFB, 0xFE))
    for index, value in ((1, 0x03), (3, 0xC0), (5, 0xFF)):
        set_cmos(machine, index, value)
    set_cmos(machine, 0x0B, 0x22)
    machine.pass_time(2.5)
    assert machine.pending() is None
    machine.pass_time(1)
    assert machine.pending() == 0x28
    assert cmos(machine, 0x0C) == 0xB0


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=30))
def test_no_sequence_of_writes_breaks_the_clock(writes: list[tuple[int, int]]) -> None:
    machine = Machine()
    for index, value in writes:
        set_cmos(machine, index, value)
        machine.pass_time(0.01)
    assert all(0 <= cmos(machine, index) <= 0xFF for index in range(128))
