"""The synthetic MSRs that the core answers itself, as one table: index -> read, write, and the rule for people.

Per processor and level, but for the clocks. GUEST_OS_ID, HYPERCALL, RESET and the crash MSRs are the machine's and
exit (TLFS, "Synthetic MSRs"; vtlab.hyperv.msrs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vtl0_guest.cpu.devices.apic_registers import Register
from vtl0_guest.cpu.devices.apic_timer import BUS_HZ
from vtl0_guest.cpu.devices.bus import GeneralProtection
from vtl0_guest.cpu.hyperv.virtual_processor import VirtualProcessor
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.synic import SINT_COUNT, TIMER_COUNT

SVERSION = 1
_LOW = 0xFFFF_FFFF


class Row(NamedTuple):
    """`read` or `write` None: #GP. Either may raise GeneralProtection, with nothing changed."""

    read: Callable[[VirtualProcessor], int] | None
    write: Callable[[VirtualProcessor, int], None] | None
    rule: str


def _idle(vp: VirtualProcessor) -> int:
    vp.idle = True
    return 0


def _sint(sint: int) -> Row:
    return Row(
        lambda vp: vp.synic.sints[sint],
        lambda vp, value: vp.synic.set_sint(sint, value),
        "vector [7:0], masked 16, auto-EOI 17, polling 18; a vector below 16 that is not masked is #GP",
    )


def _timer(index: int) -> dict[int, Row]:
    config, count = HvMsr.STIMER0_CONFIG + 2 * index, HvMsr.STIMER0_COUNT + 2 * index
    return {
        config: Row(
            lambda vp: vp.timers[index].config,
            lambda vp, value: vp.timers[index].set_config(value),
            "SINT 0 without direct mode stays disabled; a one-shot that expires is disabled",
        ),
        count: Row(
            lambda vp: vp.timers[index].count,
            lambda vp, value: vp.timers[index].set_count(value),
            "0 disables; with auto-enable any other value enables",
        ),
    }


def _write_icr(vp: VirtualProcessor, value: int) -> None:
    vp.apic.shortcut_write(Register.ICR_HIGH, value >> 32)
    vp.apic.shortcut_write(Register.ICR_LOW, value & _LOW)


def _read_icr(vp: VirtualProcessor) -> int:
    return vp.apic.shortcut_read(Register.ICR_HIGH) << 32 | vp.apic.shortcut_read(Register.ICR_LOW)


TABLE: dict[int, Row] = {
    HvMsr.VP_INDEX: Row(lambda vp: vp.vp_index, None, "read-only"),
    HvMsr.VP_RUNTIME: Row(lambda vp: vp.runtime.value(), None, "read-only, units of 100 ns"),
    HvMsr.TIME_REF_COUNT: Row(lambda vp: vp.instant.reference_time(), None, "read-only, units of 100 ns"),
    HvMsr.REFERENCE_TSC: Row(
        lambda vp: vp.partition.tsc_page.msr,
        lambda vp, value: vp.partition.tsc_page.set(value),
        "enable 0, page number [63:12]; a page that the level cannot write is #GP",
    ),
    HvMsr.TSC_FREQUENCY: Row(lambda vp: vp.partition.reference.tsc_hz, None, "read-only, Hz"),
    HvMsr.APIC_FREQUENCY: Row(lambda _vp: round(BUS_HZ), None, "read-only, Hz"),
    HvMsr.EOI: Row(None, lambda vp, value: vp.apic.shortcut_write(Register.EOI, value & _LOW), "write-only"),
    HvMsr.ICR: Row(_read_icr, _write_icr, "high half of the ICR in [63:32]"),
    HvMsr.TPR: Row(
        lambda vp: vp.apic.shortcut_read(Register.TPR),
        lambda vp, value: vp.apic.shortcut_write(Register.TPR, value & 0xFF),
        "[7:0]",
    ),
    HvMsr.VP_ASSIST_PAGE: Row(
        lambda vp: vp.assist.msr,
        lambda vp, value: vp.assist.set(value),
        "enable 0, page number [63:12]; a page that the level cannot write is #GP; zeroed when enabled",
    ),
    HvMsr.SCONTROL: Row(lambda vp: vp.synic.scontrol, lambda vp, value: vp.synic.set_scontrol(value), "enable 0"),
    HvMsr.SVERSION: Row(lambda _vp: SVERSION, None, "read-only"),
    HvMsr.SIEFP: Row(
        lambda vp: vp.synic.events.msr,
        lambda vp, value: vp.synic.events.set(value),
        "as VP_ASSIST_PAGE",
    ),
    HvMsr.SIMP: Row(
        lambda vp: vp.synic.messages.msr,
        lambda vp, value: vp.synic.set_message_page(value),
        "as VP_ASSIST_PAGE",
    ),
    HvMsr.EOM: Row(lambda _vp: 0, lambda vp, _value: vp.synic.rescan(), "reads 0; a write rescans the queues"),
    **{HvMsr.SINT0 + sint: _sint(sint) for sint in range(SINT_COUNT)},
    **{index: row for timer in range(TIMER_COUNT) for index, row in _timer(timer).items()},
    HvMsr.GUEST_IDLE: Row(_idle, None, "a read waits for an interrupt, whether RFLAGS.IF lets it in or not"),
}

# Reads that change something, or never give the same twice.
_NO_STATE = frozenset({HvMsr.EOM, HvMsr.ICR, HvMsr.GUEST_IDLE, HvMsr.VP_RUNTIME, HvMsr.TIME_REF_COUNT})
# What a listing of the processor's state contains, read-only ones too.
PLAIN = frozenset(int(index) for index, row in TABLE.items() if row.read and index not in _NO_STATE)


def read(vp: VirtualProcessor, index: int) -> int:
    """Raises GeneralProtection for a write-only MSR; KeyError for one that is not in the table."""
    row = TABLE[index]
    if row.read is None:
        raise GeneralProtection(f"MSR {index:#x} cannot be read")
    with vp.guard:
        return row.read(vp)


def write(vp: VirtualProcessor, index: int, value: int) -> None:
    """Raises GeneralProtection for a read-only MSR or a value it refuses; KeyError for one not in the table."""
    row = TABLE[index]
    if row.write is None:
        raise GeneralProtection(f"MSR {index:#x} cannot be written")
    with vp.guard:
        row.write(vp, value)
