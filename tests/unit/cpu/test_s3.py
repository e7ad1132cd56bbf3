"""S3: the sleep register, the waking vector, and what a processor is between them."""

from __future__ import annotations

import struct
import threading

import pytest

from tests.unit.cpu.machine import A, Guest, assemble
from tests.waiting import wait_until
from vtl0_guest.cpu.devices.power_management import CONTROL_BLOCK, FACS_ADDRESS, WAKING_VECTOR

ASK = f"mov dx, {CONTROL_BLOCK}; mov ax, 0x2400; out dx, ax"
VECTOR = 0x70010


def prepare(guest: Guest, vector: int = VECTOR) -> None:
    """A FACS, and code at the vector that reports."""
    facs = b"FACS".ljust(WAKING_VECTOR, b"\0") + struct.pack("<I", vector)
    guest.poke(FACS_ADDRESS, facs)
    guest.poke(VECTOR, assemble("out 0x99, al; hlt", 16, 0x10))
    guest.long_mode(f"mov rbx, 0x77; {ASK}; vmmcall")


def sleep_and_wake(guest: Guest) -> str:
    """Lets it fall asleep; the alarm comes once it does."""
    power = guest.platform.power

    def alarm() -> None:
        wait_until(lambda: power.asleep)
        with guest.platform.guard:
            power.clock_event()

    clock = threading.Thread(target=alarm)
    clock.start()
    reason = guest.run(A.ACTION_COMMIT)
    clock.join()
    return reason


def test_the_boot_processor_wakes_in_real_mode_at_the_vector(guest: Guest) -> None:
    prepare(guest)
    assert guest.run() == "sleep"
    assert guest.exit.sleep.source == "ACPI S3"
    assert sleep_and_wake(guest) == "port"
    registers = guest.exit.registers
    assert (registers.cs.selector, registers.cs.base, registers.rip) == (0x7001, 0x70010, 0)
    assert (registers.cr0 & 0x80000001, registers.cr3, registers.cr4, registers.efer) == (0, 0, 0, 0)
    assert guest.platform.ports[0x600].read(0x600, 2) & 1 << 15  # WAK_STS


def test_a_sleep_that_is_refused_did_not_happen(guest: Guest) -> None:
    prepare(guest)
    assert guest.run() == "sleep"
    assert guest.run(A.ACTION_COMPLETE) == "hypercall"
    assert guest.exit.registers.rbx == 0x77


@pytest.mark.parametrize("vector", [0, 1 << 20, 0xFFFFFFFF])
def test_without_a_vector_it_is_a_shutdown(guest: Guest, vector: int) -> None:
    prepare(guest, vector)
    assert guest.run() == "sleep"
    assert sleep_and_wake(guest) == "shutdown"
    assert "waking vector" in guest.exit.shutdown.cause


def test_who_watches_sees_both_states_and_says_how_it_goes_on(guest: Guest) -> None:
    prepare(guest)
    guest.filter(state_loads=True)
    before = guest.processor.state()
    assert guest.run() == "sleep"
    assert sleep_and_wake(guest) == "state_load"
    load = guest.exit.state_load
    assert load.cause == A.STATE_LOAD_CAUSE_WAKE
    assert (load.state.registers.cs.base, load.state.registers.cr0 & 1) == (0x70010, 0)
    assert (load.before.registers.rbx, load.before.registers.cr0) == (0x77, before.registers.cr0)
    state = load.before
    del state.msrs[:]
    update = A.Update(start_processor=A.StartProcessor(state=state))
    assert guest.run(A.ACTION_COMMIT, updates=[update]) == "hypercall"
    assert guest.exit.registers.rbx == 0x77
    assert guest.processor.state().tr == before.tr


def test_who_watches_can_refuse(guest: Guest) -> None:
    prepare(guest)
    guest.filter(state_loads=True)
    assert guest.run() == "sleep"
    assert sleep_and_wake(guest) == "state_load"
    assert guest.run(A.ACTION_DENY) == "shutdown"


def test_the_waking_code_may_run_in_a_window_and_nothing_else(guest: Guest) -> None:
    """Its page executes nowhere else; what the code leaves to is the next exit, with all that it has restored."""
    prepare(guest)
    page, outside = VECTOR >> 12, VECTOR + 0x1000  # CS starts at the vector
    guest.poke(VECTOR, assemble("mov ebx, 0x1234; jmp 0x1000", 16, 0))
    guest.poke(outside, assemble("out 0x99, al; hlt", 16))
    guest.filter(state_loads=True)
    guest.protect(VECTOR & -0x1000, access=A.PageAccess(read=True))
    assert guest.run() == "sleep"
    assert guest.exit.sleep.waking_vector == VECTOR
    assert sleep_and_wake(guest) == "state_load"
    window = A.Update(startup_window=A.StartupWindow(runs=[page, 1]))
    assert guest.run(A.ACTION_COMMIT, updates=[window]) == "state_load"
    load = guest.exit.state_load
    assert (load.cause, load.gpa, load.state.registers.rbx) == (A.STATE_LOAD_CAUSE_STARTUP_END, outside, 0x1234)
    assert guest.run(A.ACTION_COMMIT) == "port"
