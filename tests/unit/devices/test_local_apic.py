"""The local APIC: priorities, modes, timer, messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.devices.bench_machine import Machine
from vtl0_guest.cpu.devices.bus import GeneralProtection
from vtl0_guest.cpu.devices.local_apic import LocalApic

BASE = 0xFEE00000
ENABLED = 1 << 11
X2APIC = 1 << 10
BSP = 1 << 8
SVR, TPR, PPR, EOI, ESR, ICR, ICR_HIGH = 0xF0, 0x80, 0xA0, 0xB0, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, INITIAL, CURRENT, DIVIDE = 0x320, 0x350, 0x380, 0x390, 0x3E0
TSC_DEADLINE = 0x6E0


def started(machine: Machine, index: int = 0) -> LocalApic:
    apic = machine.platform.local_apic(index)
    apic.mmio_write(SVR, 4, 0x1FF)
    return apic


def in_x2apic_mode(machine: Machine) -> LocalApic:
    apic = machine.platform.local_apic(0)
    apic.msr_write(0x1B, BASE | ENABLED | X2APIC | BSP)
    apic.msr_write(0x80F, 0x1FF)
    return apic


def self_ipi(apic: LocalApic, vector: int) -> None:
    apic.mmio_write(ICR, 4, 1 << 18 | vector)


def test_reset_state(machine: Machine) -> None:
    apic = machine.platform.local_apic(0)
    assert apic.msr_read(0x1B) == BASE | ENABLED | BSP
    assert apic.mmio_base == BASE
    assert apic.mmio_read(0x20, 4) == 0
    assert apic.mmio_read(0x30, 4) & 0xFF in range(0x10, 0x16)
    assert apic.mmio_read(SVR, 4) == 0xFF
    assert apic.mmio_read(LVT_TIMER, 4) == 0x10000


def test_self_ipis_are_taken_by_priority_and_nest(machine: Machine) -> None:
    apic = started(machine)
    for vector in (0x31, 0x80, 0x45):
        self_ipi(apic, vector)
    assert machine.woken
    assert machine.take() == 0x80
    assert machine.pending() is None
    assert apic.mmio_read(PPR, 4) == 0x80
    self_ipi(apic, 0x8F)
    assert machine.pending() is None, "the same class does not preempt"
    self_ipi(apic, 0x90)
    assert machine.take() == 0x90
    for expected in (None, 0x8F):
        apic.mmio_write(EOI, 4, 0)
        assert machine.pending() == expected


def test_tpr_holds_back_its_class_and_below(machine: Machine) -> None:
    apic = started(machine)
    apic.tpr = 0x40
    self_ipi(apic, 0x4F)
    assert machine.pending() is None
    machine.woken.clear()
    apic.tpr = 0x3F
    assert machine.pending() == 0x4F
    assert machine.woken == [0]
    assert apic.mmio_read(TPR, 4) == 0x3F


def test_disabled_apic_holds_interrupts_back(machine: Machine) -> None:
    apic = machine.platform.local_apic(0)
    self_ipi(apic, 0x50)
    assert machine.pending() is None
    apic.mmio_write(SVR, 4, 0x1EF)
    assert machine.pending() is None, "it was not accepted at all"
    assert machine.take() == 0xEF, "spurious"


def test_disabling_masks_every_lvt_entry(machine: Machine) -> None:
    apic = started(machine)
    apic.mmio_write(LVT_TIMER, 4, 0x30)
    apic.mmio_write(SVR, 4, 0xFF)
    assert apic.mmio_read(LVT_TIMER, 4) == 0x10030
    apic.mmio_write(LVT_TIMER, 4, 0x30)
    assert apic.mmio_read(LVT_TIMER, 4) == 0x10030


def test_virtual_wire(machine: Machine) -> None:
    """Interrupt controllers reach the processor at reset, through LINT0 as ExtINT, and not through a masked LINT0."""
    machine.start_pic()
    machine.platform.pulse_irq(1)
    assert machine.pending() == 0x21
    apic = started(machine)
    assert machine.pending() == 0x21
    apic.mmio_write(LVT_LINT0, 4, 0x10700)
    assert machine.pending() is None
    apic.mmio_write(LVT_LINT0, 4, 0x700)
    self_ipi(apic, 0x99)
    assert [machine.take(), machine.take()] == [0x99, 0x21], "the APIC's own come first"


def test_lint0_in_fixed_mode(machine: Machine) -> None:
    machine.start_pic()
    apic = started(machine)
    apic.mmio_write(LVT_LINT0, 4, 0x55)
    machine.platform.pulse_irq(3)
    assert machine.take() == 0x55


def test_interrupt_controllers_without_apic(machine: Machine) -> None:
    machine.start_pic()
    machine.platform.local_apic(0).msr_write(0x1B, BASE | BSP)
    assert machine.platform.local_apic(0).mmio_base is None
    machine.platform.pulse_irq(1)
    assert machine.take() == 0x21


def test_one_shot_timer(machine: Machine) -> None:
    apic = started(machine)
    apic.mmio_write(DIVIDE, 4, 0xB)  # by 1
    apic.mmio_write(LVT_TIMER, 4, 0x40)
    apic.mmio_write(INITIAL, 4, 1_000_000)
    assert machine.rearmed
    assert machine.platform.next_deadline() == pytest.approx(100.001)
    machine.pass_time(0.0005)
    assert apic.mmio_read(CURRENT, 4) == pytest.approx(500_000, abs=2)
    assert machine.pending() is None
    machine.pass_time(0.0006)
    assert machine.take() == 0x40
    assert apic.mmio_read(CURRENT, 4) == 0
    assert machine.platform.next_deadline() is None


@pytest.mark.parametrize(("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_divide_configuration(machine: Machine, code: int, divisor: int) -> None:
    apic = started(machine)
    apic.mmio_write(DIVIDE, 4, code)
    apic.mmio_write(INITIAL, 4, 1000)
    assert machine.platform.next_deadline() == pytest.approx(100 + divisor * 1e-6)
    assert apic.mmio_read(DIVIDE, 4) == code


def test_periodic_timer_keeps_its_phase(machine: Machine) -> None:
    apic = started(machine)
    apic.mmio_write(DIVIDE, 4, 0xB)
    apic.mmio_write(LVT_TIMER, 4, 0x20040)
    apic.mmio_write(INITIAL, 4, 1_000_000)
    for _ in range(3):
        machine.pass_time(0.001)
        assert machine.take() == 0x40
        apic.mmio_write(EOI, 4, 0)
    machine.clock.advance(0.0105)
    machine.platform.advance(machine.clock.now())
    assert machine.platform.next_deadline() == pytest.approx(100.014)
    assert machine.take() == 0x40
    apic.mmio_write(EOI, 4, 0)
    assert machine.pending() is None, "missed periods are one interrupt"
    apic.mmio_write(INITIAL, 4, 0)
    assert machine.platform.next_deadline() is None


def test_shortest_period_is_bounded(machine: Machine) -> None:
    apic = started(machine)
    apic.mmio_write(LVT_TIMER, 4, 0x20040)
    apic.mmio_write(INITIAL, 4, 1)
    start = machine.rearmed
    machine.pass_time(0.01)
    assert 50 < machine.rearmed - start <= 101


def test_tsc_deadline(machine: Machine) -> None:
    apic = started(machine)
    apic.msr_write(TSC_DEADLINE, 1 << 40)
    assert apic.msr_read(TSC_DEADLINE) == 0, "ignored in another mode"
    apic.mmio_write(LVT_TIMER, 4, 0x40041)
    deadline = machine.clock.tsc() + 5_000_000
    apic.msr_write(TSC_DEADLINE, deadline)
    assert apic.msr_read(TSC_DEADLINE) == deadline
    assert machine.platform.next_deadline() == pytest.approx(100.005)
    machine.pass_time(0.006)
    assert machine.take() == 0x41
    assert apic.msr_read(TSC_DEADLINE) == 0
    apic.msr_write(TSC_DEADLINE, 1)
    machine.pass_time(0)
    apic.mmio_write(EOI, 4, 0)
    assert machine.take() == 0x41, "a deadline in the past fires at once"


def test_masked_timer_does_not_interrupt(machine: Machine) -> None:
    apic = started(machine)
    apic.mmio_write(LVT_TIMER, 4, 0x10040)
    apic.mmio_write(INITIAL, 4, 10)
    machine.pass_time(1)
    assert machine.pending() is None


def test_illegal_vectors_are_reported_in_esr(machine: Machine) -> None:
    apic = started(machine)
    apic.mmio_write(0x370, 4, 0xE0)
    self_ipi(apic, 5)
    assert apic.mmio_read(ESR, 4) == 0, "ESR shows errors after it is written"
    assert machine.pending() == 0xE0
    apic.mmio_write(ESR, 4, 0)
    assert apic.mmio_read(ESR, 4) == 0x60
    apic.mmio_write(ESR, 4, 0)
    assert apic.mmio_read(ESR, 4) == 0


def test_nmi_to_self(machine: Machine) -> None:
    apic = started(machine)
    apic.mmio_write(ICR_HIGH, 4, 0)
    apic.mmio_write(ICR, 4, 0x4400)
    assert machine.pending() is None
    assert [machine.platform.take_nmi(0), machine.platform.take_nmi(0)] == [True, False]


def test_messages_between_processors() -> None:
    machine = Machine(vp_count=3)
    apics = [started(machine, index) for index in range(3)]

    def pending() -> list[int | None]:
        return [machine.platform.pending_vector(index) for index in range(3)]

    apics[0].mmio_write(ICR_HIGH, 4, 2 << 24)
    apics[0].mmio_write(ICR, 4, 0x41)
    assert pending() == [None, None, 0x41]
    apics[1].mmio_write(ICR, 4, 3 << 18 | 0x42)
    assert pending() == [0x42, None, 0x42]
    for index, apic in enumerate(apics):
        apic.mmio_write(0xD0, 4, 1 << 24 + index)
    apics[2].mmio_write(ICR_HIGH, 4, 0b110 << 24)
    apics[2].mmio_write(ICR, 4, 1 << 11 | 0x43)
    assert pending() == [0x42, 0x43, 0x43]
    apics[0].mmio_write(ICR_HIGH, 4, 0xFF << 24)
    apics[0].mmio_write(ICR, 4, 0x50)
    assert pending() == [0x50, 0x50, 0x50]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BASE | ENABLED | X2APIC, BASE | ENABLED),
        (BASE, BASE | X2APIC | ENABLED),
        (BASE | ENABLED, BASE | X2APIC),
        (BASE | ENABLED, BASE | ENABLED | 1),
        (BASE | ENABLED, BASE | ENABLED | 1 << 40),
    ],
)
def test_forbidden_changes_of_apic_base(machine: Machine, before: int, after: int) -> None:
    apic = machine.platform.local_apic(0)
    apic.msr_write(0x1B, before)
    with pytest.raises(GeneralProtection):
        apic.msr_write(0x1B, after)
    assert apic.msr_read(0x1B) == before


def test_apic_base_can_be_moved(machine: Machine) -> None:
    apic = machine.platform.local_apic(0)
    apic.msr_write(0x1B, 0xFED40000 | ENABLED | BSP)
    assert apic.mmio_base == 0xFED40000


def test_x2apic_registers(machine: Machine) -> None:
    apic = in_x2apic_mode(machine)
    assert apic.mmio_base is None
    assert apic.msr_read(0x802) == 0
    assert apic.msr_read(0x80D) == 1
    apic.msr_write(0x83F, 0x66)
    assert machine.take() == 0x66
    apic.msr_write(0x80B, 0)
    apic.msr_write(0x830, 1 << 18 | 0x67)
    assert apic.msr_read(0x830) == 1 << 18 | 0x67
    assert machine.take() == 0x67


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0x802, 0),  # ID is read-only
        (0x80B, 1),  # EOI takes only zero
        (0x808, 0x100),
        (0x80E, 0),  # no DFR
        (0x831, 0),  # no ICR high
        (0x839, 0),
        (0x83F, 0x100),
        (0x8FF, 0),
        (0x80F, 0x200),
    ],
)
def test_x2apic_refuses_writes(machine: Machine, index: int, value: int) -> None:
    apic = in_x2apic_mode(machine)
    with pytest.raises(GeneralProtection):
        apic.msr_write(index, value)


@pytest.mark.parametrize("index", [0x80B, 0x83F, 0x80E, 0x831, 0x800, 0x8FF])
def test_x2apic_refuses_reads(machine: Machine, index: int) -> None:
    with pytest.raises(GeneralProtection):
        in_x2apic_mode(machine).msr_read(index)


def test_x2apic_msrs_do_not_exist_in_xapic_mode(machine: Machine) -> None:
    with pytest.raises(GeneralProtection):
        machine.platform.local_apic(0).msr_read(0x802)


@given(st.lists(st.tuples(st.integers(0, 0xFFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)), max_size=30))
def test_no_sequence_of_mmio_breaks_it(steps: list[tuple[int, int, int]]) -> None:
    machine = Machine(vp_count=2)
    apic = started(machine)
    for offset, size, value in steps:
        apic.mmio_write(offset, size, value)
        apic.mmio_write(offset & 0xFF0, 4, value)
        assert 0 <= apic.mmio_read(offset, size) < 1 << 8 * size
        machine.pass_time(1e-4)
    vector = machine.pending()
    if vector is not None:
        assert machine.take() == vector


def test_read_only_bits_of_an_lvt_entry_may_be_written_and_are_not_kept(machine: Machine) -> None:
    apic = in_x2apic_mode(machine)
    apic.msr_write(0x835, 0x5700)
    assert apic.msr_read(0x835) == 0x0700
    with pytest.raises(GeneralProtection):
        apic.msr_write(0x835, 1 << 20)
