"""Ways to end a run, and the keyboard controller."""

from __future__ import annotations

import pytest

from tests.unit.devices.bench_machine import Machine
from vtlab.v1 import vcpu_pb2


@pytest.mark.parametrize(
    ("writes", "source"),
    [
        ([(0x64, 0xFE)], "0x64"),
        ([(0x64, 0xF0)], "0x64"),
        ([(0x64, 0xD1), (0x60, 0x02)], "0x64"),
        ([(0x92, 0x01)], "0x92"),
        ([(0xCF9, 0x02), (0xCF9, 0x06)], "0xcf9"),
        ([(0xCF9, 0x0E)], "0xcf9"),
    ],
)
def test_resets(machine: Machine, writes: list[tuple[int, int]], source: str) -> None:
    for port, value in writes[:-1]:
        machine.outb(port, value)
    assert machine.platform.take_exit() is None
    machine.outb(*writes[-1])
    assert machine.platform.take_exit() == vcpu_pb2.ResetRequest(source=source)
    assert machine.platform.take_exit() is None


@pytest.mark.parametrize(
    "writes",
    [
        [(0x64, 0xFF)],
        [(0x64, 0xF1)],
        [(0x64, 0xD1), (0x60, 0x03)],
        [(0x64, 0xD1), (0x64, 0xAE), (0x60, 0x00)],
        [(0x92, 0x02)],
        [(0xCF9, 0x0A)],
        [(0x80, 0xFE)],
    ],
)
def test_what_does_not_reset(machine: Machine, writes: list[tuple[int, int]]) -> None:
    for port, value in writes:
        machine.outb(port, value)
    assert machine.platform.take_exit() is None


def test_reset_control_keeps_the_kind_of_reset(machine: Machine) -> None:
    machine.outb(0xCF9, 0xFB)
    assert machine.inb(0xCF9) == 0x0A


def test_debug_exit_carries_the_value(machine: Machine) -> None:
    machine.platform.ports[0xF4].write(0xF4, 4, 0x12345678)
    machine.outb(0xF4, 1)
    assert machine.platform.take_exit() == vcpu_pb2.DebugExit(value=0x12345678), "the first one wins"


def test_controller_answers_a_probe(machine: Machine) -> None:
    assert machine.inb(0x64) & 1 == 0
    machine.outb(0x64, 0xAA)
    assert machine.inb(0x64) & 1
    assert machine.inb(0x60) == 0x55
    assert machine.inb(0x64) & 1 == 0
    machine.outb(0x64, 0x60)
    machine.outb(0x60, 0x47)
    machine.outb(0x64, 0x20)
    assert machine.inb(0x60) == 0x47


def test_keyboard_identifies_itself_with_an_interrupt_for_each_byte(machine: Machine) -> None:
    machine.start_pic()
    machine.outb(0x60, 0xF2)
    answer = []
    while machine.pending() == 0x21:
        machine.take()
        answer.append(machine.inb(0x60))
        machine.outb(0x20, 0x20)
    assert answer == [0xFA, 0xAB, 0x83]
