"""The I/O APIC: entries, edges and levels, the end-of-interrupt broadcast, and the wires from ISA devices."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.devices.bench_machine import Machine
from vtl0_guest.cpu.devices.ioapic import BASE, INPUTS, IoApic

SVR, EOI, TMR = 0xF0, 0xB0, 0x180
LEVEL, MASKED, REMOTE_IRR = 1 << 15, 1 << 16, 1 << 14


def started(machine: Machine) -> IoApic:
    """With the 8259 pair masked, as kernels that use the I/O APIC leave it."""
    machine.outb(0x21, 0xFF)
    machine.outb(0xA1, 0xFF)
    machine.platform.local_apic(0).mmio_write(SVR, 4, 0x1FF)
    device = machine.platform.mmio[BASE]
    assert isinstance(device, IoApic)
    return device


def read(ioapic: IoApic, register: int) -> int:
    ioapic.mmio_write(0x00, 4, register)
    return ioapic.mmio_read(0x10, 4)


def write(ioapic: IoApic, register: int, value: int) -> None:
    ioapic.mmio_write(0x00, 4, register)
    ioapic.mmio_write(0x10, 4, value)


def end(machine: Machine) -> None:
    machine.platform.local_apic(0).mmio_write(EOI, 4, 0)


def test_registers_after_reset(machine: Machine) -> None:
    ioapic = started(machine)
    assert read(ioapic, 1) == (INPUTS - 1) << 16 | 0x11
    assert {read(ioapic, 0x10 + 2 * number) for number in range(INPUTS)} == {MASKED}
    write(ioapic, 0, 0x5A << 24)
    assert read(ioapic, 0) == 0xA << 24
    assert (ioapic.mmio_read(0x20, 4), read(ioapic, 0x40)) == (0, 0)


def test_an_edge_becomes_one_interrupt(machine: Machine) -> None:
    ioapic = started(machine)
    write(ioapic, 0x10 + 2 * 4, 0x34)
    machine.platform.lines.set(4, True)
    assert machine.take() == 0x34
    machine.platform.lines.set(4, True)
    end(machine)
    assert machine.pending() is None, "the line only stayed up"
    machine.platform.pulse_irq(4)
    machine.platform.pulse_irq(4)
    assert machine.take() == 0x34


def test_an_edge_on_a_masked_input_is_lost(machine: Machine) -> None:
    ioapic = started(machine)
    write(ioapic, 0x10 + 2 * 4, MASKED | 0x34)
    machine.platform.pulse_irq(4)
    write(ioapic, 0x10 + 2 * 4, 0x34)
    assert machine.pending() is None


def test_a_level_interrupts_until_it_falls(machine: Machine) -> None:
    ioapic = started(machine)
    entry = 0x10 + 2 * 9
    write(ioapic, entry, LEVEL | MASKED | 0x49)
    machine.platform.lines.set(9, True)
    assert machine.pending() is None
    write(ioapic, entry, LEVEL | 0x49)
    assert machine.take() == 0x49
    assert read(ioapic, entry) & REMOTE_IRR
    assert machine.platform.local_apic(0).mmio_read(TMR + 0x20, 4) >> 9 & 1, "TMR: vector 0x49 is a level"
    machine.platform.lines.set(9, True)
    assert machine.pending() is None, "not before its end"
    end(machine)
    assert machine.take() == 0x49
    machine.platform.lines.set(9, False)
    end(machine)
    assert machine.pending() is None
    assert not read(ioapic, entry) & REMOTE_IRR


def test_remote_irr_cannot_be_written_and_ends_with_an_edge_entry(machine: Machine) -> None:
    ioapic = started(machine)
    entry = 0x10 + 2 * 9
    write(ioapic, entry, LEVEL | REMOTE_IRR | 0x49)
    assert not read(ioapic, entry) & REMOTE_IRR
    machine.platform.lines.set(9, True)
    write(ioapic, entry, LEVEL | 0x49)
    assert read(ioapic, entry) & REMOTE_IRR
    write(ioapic, entry, 0x49)
    assert not read(ioapic, entry) & REMOTE_IRR


def test_the_timer_is_wired_to_input_2(machine: Machine) -> None:
    ioapic = started(machine)
    write(ioapic, 0x10, 0x30)
    write(ioapic, 0x10 + 2 * 2, 0x32)
    machine.platform.lines.set(0, True)
    assert machine.take() == 0x32


def test_nmi_and_destinations() -> None:
    machine = Machine(vp_count=2)
    ioapic = started(machine)
    machine.platform.local_apic(1).mmio_write(SVR, 4, 0x1FF)
    write(ioapic, 0x10 + 2 * 5, 0x51)
    write(ioapic, 0x11 + 2 * 5, 1 << 24)
    machine.platform.pulse_irq(5)
    assert (machine.platform.pending_vector(0), machine.platform.pending_vector(1)) == (None, 0x51)
    write(ioapic, 0x11 + 2 * 5, 0xFF << 24)
    write(ioapic, 0x10 + 2 * 5, 0x400)
    machine.platform.pulse_irq(5)
    assert machine.platform.take_nmi(0)
    assert machine.platform.take_nmi(1)


@given(st.lists(st.tuples(st.integers(0, 0xFF), st.integers(0, 0xFFFFFFFF), st.integers(0, 15), st.booleans())))
def test_nothing_that_a_guest_writes_breaks_it(steps: list[tuple[int, int, int, bool]]) -> None:
    machine = Machine()
    ioapic = started(machine)
    for register, value, irq, level in steps:
        write(ioapic, register, value)
        machine.platform.lines.set(irq, level)
        assert 0 <= read(ioapic, register) <= 0xFFFFFFFF
        if machine.pending() is not None:
            machine.take()
            end(machine)
