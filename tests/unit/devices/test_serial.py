"""The UARTs: what a driver sees, and what the core collects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.devices.bench_machine import Machine
from vtlab.v1 import vcpu_pb2

COM1 = 0x3F8
COM2 = 0x2F8


def test_output_is_collected_in_batches_with_the_time_of_its_first_byte(machine: Machine) -> None:
    serial = machine.platform.serial
    machine.clock.advance(1)
    machine.outb(COM1, *b"ab")
    machine.clock.advance(1)
    machine.outb(COM2, *b"c")
    assert (serial.first_unsent, serial.unsent) == (101.0, 3)
    assert serial.drain() == [
        vcpu_pb2.SerialOutput(port=0, data=b"ab"),
        vcpu_pb2.SerialOutput(port=1, data=b"c"),
    ]
    assert (serial.first_unsent, serial.unsent, serial.drain()) == (None, 0, [])


def test_input_is_read_in_order(machine: Machine) -> None:
    assert machine.inb(COM2 + 5) == 0x60
    machine.platform.serial.receive(1, b"hi")
    assert machine.inb(COM2 + 5) == 0x61
    assert bytes([machine.inb(COM2), machine.inb(COM2)]) == b"hi"
    assert machine.inb(COM2 + 5) == 0x60
    assert machine.inb(COM1 + 5) == 0x60, "the other port has none"


def test_unknown_port_is_named(machine: Machine) -> None:
    with pytest.raises(IndexError, match="serial port 2"):
        machine.platform.serial.receive(2, b"x")


def test_receive_interrupt(machine: Machine) -> None:
    machine.start_pic()
    machine.outb(COM1 + 1, 1)
    machine.platform.serial.receive(0, b"x")
    assert machine.pending() is None, "OUT2 gates the line"
    machine.outb(COM1 + 4, 0x08)
    assert machine.take() == 0x24
    assert machine.inb(COM1 + 2) == 0x04
    machine.inb(COM1)
    assert machine.inb(COM1 + 2) == 0x01


@pytest.mark.parametrize(("count", "source"), [(1, 0xC), (7, 0xC), (8, 0x4), (30, 0x4)])
def test_fifo_trigger_and_timeout(machine: Machine, count: int, source: int) -> None:
    machine.outb(COM1 + 2, 0x81)
    machine.outb(COM1 + 1, 1)
    machine.platform.serial.receive(0, bytes(count))
    assert machine.inb(COM1 + 2) == 0xC0 | source


def test_transmit_interrupt_is_cleared_by_reading_iir(machine: Machine) -> None:
    machine.start_pic()
    machine.outb(COM1 + 4, 0x08)
    machine.outb(COM1 + 1, 2)
    assert machine.take() == 0x24
    machine.outb(0x20, 0x20)
    assert [machine.inb(COM1 + 2), machine.inb(COM1 + 2)] == [0x02, 0x01]
    machine.outb(COM1, 0x41)
    assert machine.take() == 0x24


def test_clearing_the_fifo_keeps_what_has_not_arrived(machine: Machine) -> None:
    machine.platform.serial.receive(0, bytes(range(20)))
    machine.outb(COM1 + 2, 0x01)
    assert machine.inb(COM1) == 16


def test_divisor_and_scratch(machine: Machine) -> None:
    machine.outb(COM1 + 3, 0x83)
    machine.outb(COM1, 0x34)
    machine.outb(COM1 + 1, 0x12)
    assert (machine.inb(COM1), machine.inb(COM1 + 1)) == (0x34, 0x12)
    machine.outb(COM1 + 3, 0x03)
    machine.outb(COM1 + 7, 0xA5)
    assert (machine.inb(COM1 + 3), machine.inb(COM1 + 7), machine.inb(COM1 + 1)) == (0x03, 0xA5, 0)
    assert machine.platform.serial.unsent == 0


def test_loopback(machine: Machine) -> None:
    assert machine.inb(COM1 + 6) == 0xB0
    machine.outb(COM1 + 4, 0x1A)  # LOOP, OUT2, RTS: the usual probe
    assert machine.inb(COM1 + 6) & 0xF0 == 0x90
    machine.outb(COM1, 0x55)
    assert machine.platform.serial.unsent == 0
    assert machine.inb(COM1 + 5) & 1
    machine.outb(COM1, 0x66)
    assert machine.inb(COM1 + 5) & 2, "overrun"
    assert machine.inb(COM1) == 0x55


def test_modem_changes_are_reported_once(machine: Machine) -> None:
    machine.outb(COM1 + 1, 8)
    machine.outb(COM1 + 4, 0x10)
    assert machine.inb(COM1 + 2) == 0x00
    assert machine.inb(COM1 + 6) == 0x0B
    assert machine.inb(COM1 + 6) == 0x00
    assert machine.inb(COM1 + 2) == 0x01


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.integers(0, 255)), max_size=40))
def test_no_sequence_of_accesses_breaks_it(steps: list[tuple[int, bool, int]]) -> None:
    machine = Machine()
    for register, write, value in steps:
        if write:
            machine.outb(COM1 + register, value)
        assert 0 <= machine.inb(COM1 + register) <= 0xFF
    machine.platform.serial.drain()
    assert machine.platform.serial.first_unsent is None
