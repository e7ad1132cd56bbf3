"""The 8259 pair: priorities, end of interrupt, modes, spurious interrupts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.devices.bench_machine import Machine


def test_irq_reaches_the_processor_and_needs_eoi(machine: Machine) -> None:
    machine.start_pic()
    machine.platform.pulse_irq(4)
    assert machine.pending() == 0x24
    assert machine.woken == [0]
    assert machine.take() == 0x24
    machine.platform.pulse_irq(5)
    assert machine.pending() is None, "a lower priority waits for the end of the higher one"
    machine.outb(0x20, 0x20)
    assert machine.pending() == 0x25


def test_pending_acknowledges_nothing(machine: Machine) -> None:
    machine.start_pic()
    machine.platform.pulse_irq(1)
    assert [machine.pending(), machine.pending(), machine.take(), machine.pending()] == [0x21, 0x21, 0x21, None]


def test_masked_irq_waits(machine: Machine) -> None:
    machine.start_pic(masks=(0xFF, 0xFF))
    machine.platform.pulse_irq(3)
    assert machine.pending() is None
    machine.outb(0x21, 0xF7)
    assert machine.pending() == 0x23
    assert machine.inb(0x21) == 0xF7


def test_slave_comes_through_the_cascade_with_irq2_priority(machine: Machine) -> None:
    machine.start_pic()
    machine.platform.pulse_irq(3)
    machine.platform.pulse_irq(12)
    machine.platform.pulse_irq(8)
    assert machine.take() == 0x28
    machine.outb(0xA0, 0x20)
    machine.outb(0x20, 0x20)
    assert machine.take() == 0x2C
    machine.outb(0xA0, 0x20)
    machine.outb(0x20, 0x20)
    assert machine.take() == 0x23


def test_two_slave_interrupts_under_auto_eoi(machine: Machine) -> None:
    machine.start_pic(icw4=3)
    machine.platform.pulse_irq(9)
    machine.platform.pulse_irq(10)
    assert [machine.take(), machine.take(), machine.pending()] == [0x29, 0x2A, None]


def test_isr_and_irr_are_read_by_ocw3(machine: Machine) -> None:
    machine.start_pic()
    machine.platform.pulse_irq(1)
    machine.platform.pulse_irq(6)
    machine.take()
    machine.outb(0x20, 0x0B)
    assert machine.inb(0x20) == 0x02
    machine.outb(0x20, 0x0A)
    assert machine.inb(0x20) == 0x40


def test_specific_eoi_and_rotation(machine: Machine) -> None:
    machine.start_pic()
    machine.platform.pulse_irq(3)
    machine.take()
    machine.outb(0x20, 0xE0 | 3)  # rotate on specific EOI: 3 becomes the lowest
    machine.platform.pulse_irq(3)
    machine.platform.pulse_irq(4)
    assert machine.take() == 0x24


def test_special_mask_mode_lets_lower_priorities_through(machine: Machine) -> None:
    machine.start_pic()
    machine.platform.pulse_irq(1)
    machine.take()
    machine.platform.pulse_irq(5)
    assert machine.pending() is None
    machine.outb(0x20, 0x68)
    machine.outb(0x21, 0x02)
    assert machine.pending() == 0x25


def test_interrupt_that_vanished_is_spurious(machine: Machine) -> None:
    machine.start_pic()
    pic = machine.platform.pic
    assert pic.acknowledge() == 0x27
    machine.outb(0x20, 0x0B)
    assert machine.inb(0x20) == 0, "a spurious interrupt is not in service"


def test_poll_mode(machine: Machine) -> None:
    machine.start_pic()
    machine.platform.pulse_irq(6)
    machine.outb(0x20, 0x0C)
    assert machine.inb(0x20) == 0x86
    machine.outb(0x20, 0x0C)
    assert machine.inb(0x20) == 0


def test_level_triggered_line_asks_until_it_falls(machine: Machine) -> None:
    machine.start_pic()
    machine.outb(0x4D0, 0xFF)
    assert machine.inb(0x4D0) == 0xF8, "IRQ 0 to 2 stay edge triggered"
    pic = machine.platform.pic
    pic.set_irq(5, True)
    machine.take()
    machine.outb(0x20, 0x20)
    assert machine.pending() == 0x25
    pic.set_irq(5, False)
    assert machine.pending() is None


@given(st.lists(st.tuples(st.sampled_from(["pulse", "take", "eoi", "mask"]), st.integers(0, 255)), max_size=40))
def test_service_is_nested_by_priority(steps: list[tuple[str, int]]) -> None:
    """Against a model of the master alone: the in-service set is always a strictly rising chain of priorities."""
    machine = Machine()
    machine.start_pic(masks=(0, 0xFF))
    requested: set[int] = set()
    serving: list[int] = []
    mask = 0
    for step, value in steps:
        irq = value % 8
        if step == "pulse" and irq != 2:
            machine.platform.pulse_irq(irq)
            requested.add(irq)
        elif step == "mask":
            mask = value & ~4
            machine.outb(0x21, mask)
        elif step == "eoi":
            machine.outb(0x20, 0x20)
            if serving:
                serving.remove(min(serving))
        ready = [irq for irq in requested if not mask >> irq & 1 and (not serving or irq < min(serving))]
        assert machine.pending() == (0x20 + min(ready) if ready else None)
        if step == "take" and ready:
            assert machine.take() == 0x20 + min(ready)
            requested.remove(min(ready))
            serving.append(min(ready))


@pytest.mark.parametrize("port", [0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1])
@given(values=st.lists(st.integers(0, 255), max_size=20))
def test_no_sequence_of_writes_breaks_it(port: int, values: list[int]) -> None:
    machine = Machine()
    machine.outb(port, *values)
    machine.platform.pulse_irq(0)
    machine.platform.pulse_irq(15)
    machine.pending()
    assert 0 <= machine.take() <= 0xFF
    assert 0 <= machine.inb(port) <= 0xFF
