"""INIT and SIPI under the filter: whoever sends them, they exit before they are delivered; without it, none does."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.cpu.machine import DATA, PDPT, A, assemble
from tests.unit.cpu.test_smp import TRAMPOLINE, X2APIC, Machine, icr, wait_for
from vtl0_guest.cpu.devices.apic_registers import Delivery
from vtl0_guest.cpu.devices.local_apic import Startup
from vtlab.errors import BadArgument
from vtlab.ram import Ram

INIT, STARTUP = 0x4500, 0x4600 | TRAMPOLINE >> 12
MARK = 0x300
FILTER = A.Update(intercepts=A.InterceptFilter(startups=True))
APIC = 0xFEE0_0000


def synthetic(low: int, destination: int = 1) -> str:
    return f"mov ecx, 0x40000071; mov edx, {destination << 24}; mov eax, {low}; wrmsr"


def mmio(low: int, destination: int = 1) -> str:
    return f"mov rdi, {APIC}; mov dword ptr [rdi + 0x310], {destination << 24}; mov dword ptr [rdi + 0x300], {low}"


# Each sends INIT and SIPI to processor 1: (preparation, one message).
PATHS: dict[str, tuple[str, Callable[[int], str]]] = {
    "x2APIC MSR": (X2APIC, icr),
    "synthetic ICR": ("nop", synthetic),
    "xAPIC registers": ("nop", mmio),
    "all but self": (X2APIC, lambda low: icr(low | 3 << 18, 0)),
    # INIT clears the logical destination that it was sent to.
    "logical": ("nop", lambda low: mmio(low | 1 << 11, 2) if low == INIT else mmio(low)),
}


@pytest.fixture
def machine(ram: Ram, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(ram, tmp_path, vp_count=2)
    # Real mode: writes a mark and halts.
    machine.poke(TRAMPOLINE, assemble(f"xor ax, ax; mov ds, ax; mov byte ptr [{MARK}], 0x77; l: hlt; jmp l", 16, 0))
    yield machine
    machine.close()


def boot(machine: Machine, program: str) -> None:
    machine.boot(program)
    machine.platform.local_apic(1).mmio_write(0xD0, 4, 2 << 24)  # the logical destination 2
    # The last 2 MiB below 4 GiB: where the registers of the local APIC are.
    machine.poke(PDPT + 8 * 3, struct.pack("<Q", 0x14000 | 7))
    machine.poke(0x14000 + 8 * (APIC >> 21 & 511), struct.pack("<Q", APIC & ~0x1FFFFF | 0x83))


def startup(exit_: A.Exit) -> tuple[int, int, int]:
    return exit_.startup.target_vp, exit_.startup.kind, exit_.startup.vector


def waits(machine: Machine, vp_index: int = 1) -> bool:
    return machine.core.processor(vp_index).context.waits_for_startup


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exits_from_the_sender_and_commit_delivers(machine: Machine, path: str) -> None:
    prepare, send = PATHS[path]
    boot(machine, f"{prepare}; {send(INIT)}; {send(STARTUP)}; l: pause; cmp byte ptr [{MARK}], 0x77; jne l; vmmcall")
    assert machine.run(updates=[FILTER]) == "startup"
    assert startup(machine.exit) == (1, A.STARTUP_KIND_INIT, 0)
    assert not machine.platform.urgent(1), "not delivered yet"
    assert machine.run(A.ACTION_COMMIT) == "startup"
    assert startup(machine.exit) == (1, A.STARTUP_KIND_SIPI, TRAMPOLINE >> 12)
    with machine.running(1):
        assert machine.peek(MARK, 1) == 0
        assert machine.run(A.ACTION_COMMIT) == "hypercall"
    assert machine.peek(MARK, 1) == 0x77


@pytest.mark.parametrize("path", PATHS)
def test_without_the_filter_nothing_exits(machine: Machine, path: str) -> None:
    prepare, send = PATHS[path]
    boot(machine, f"{prepare}; {send(INIT)}; {send(STARTUP)}; l: pause; cmp byte ptr [{MARK}], 0x77; jne l; vmmcall")
    with machine.running(1):
        assert machine.run() == "hypercall"


@pytest.mark.parametrize(
    "action", [A.ACTION_UNSPECIFIED, A.ACTION_DENY, A.ACTION_SKIP, A.ACTION_RETRY], ids=A.Action.Name
)
def test_what_is_not_committed_is_dropped_and_the_sender_goes_on(machine: Machine, action: A.Action.ValueType) -> None:
    boot(machine, f"{X2APIC}; {icr(INIT)}; {icr(STARTUP)}; vmmcall")
    assert machine.run(updates=[FILTER]) == "startup"
    assert machine.exit.registers.rip != 0
    assert machine.run(action) == "startup"
    assert machine.run(action) == "hypercall"
    assert machine.vector is None, "no exception"
    assert not machine.platform.urgent(1)


def test_rip_is_behind_the_instruction_that_sent_it(machine: Machine) -> None:
    boot(machine, f"{X2APIC}; {icr(INIT)}; mov rbx, 5; vmmcall")
    machine.run(updates=[FILTER])
    sent = machine.exit.registers.rip
    assert machine.memory[sent - 2 : sent] == bytes.fromhex("0f30")
    assert (machine.exit.instruction, machine.exit.instruction_length) == (b"", 0)


def test_a_denial_may_have_an_exception(machine: Machine) -> None:
    boot(machine, f"{X2APIC}; {icr(INIT)}; vmmcall")
    machine.run(updates=[FILTER])
    sent = machine.exit.registers.rip
    assert machine.run(A.ACTION_DENY, exception=A.Exception(vector=13, error_code=0)) == "hypercall"
    assert machine.vector == 13
    assert machine.frame(2) == [0, sent]


def test_replace_chooses_the_page(machine: Machine) -> None:
    boot(machine, f"{X2APIC}; {icr(INIT)}; {icr(0x4600)}; l: pause; cmp byte ptr [{MARK}], 0x77; jne l; vmmcall")
    machine.run(updates=[FILTER])
    machine.run(A.ACTION_COMMIT)
    with machine.running(1):
        assert machine.run(A.ACTION_REPLACE, TRAMPOLINE >> 12) == "hypercall"


def test_a_message_to_all_is_an_exit_for_each(machine: Machine) -> None:
    """Also for the sender itself, whose INIT would reset the machine."""
    boot(machine, f"{X2APIC}; {icr(INIT | 2 << 18, 0)}; vmmcall")
    assert machine.run(updates=[FILTER]) == "startup"
    assert startup(machine.exit) == (0, A.STARTUP_KIND_INIT, 0)
    assert machine.run(A.ACTION_SKIP) == "startup"
    assert startup(machine.exit) == (1, A.STARTUP_KIND_INIT, 0)
    assert machine.run(A.ACTION_SKIP) == "hypercall"


def test_a_committed_init_of_the_boot_processor_resets_the_machine(machine: Machine) -> None:
    boot(machine, f"{X2APIC}; {icr(INIT, 0)}; l: jmp l")
    assert machine.run(updates=[FILTER]) == "startup"
    assert machine.run(A.ACTION_COMMIT) == "reset_request"


def test_level_deassert_and_other_interrupts_pass(machine: Machine) -> None:
    boot(machine, f"{X2APIC}; {icr(0x8500)}; {icr(0x4400)}; {icr(0x4040)}; vmmcall")
    assert machine.run(updates=[FILTER]) == "hypercall"


def test_a_sender_without_the_filter_meets_that_of_the_target(machine: Machine) -> None:
    boot(machine, f"{X2APIC}; {icr(INIT)}; vmmcall")
    target = machine.core.processor(1)
    target.context.waits_for_startup = False
    target._resolver.prepare([FILTER])
    assert machine.run() == "hypercall"
    assert not target.context.waits_for_startup
    exit_ = A.Exit.FromString(target.run(A.Enter()))
    assert startup(exit_) == (1, A.STARTUP_KIND_INIT, 0)


@pytest.mark.parametrize("delivery", [Delivery.INIT, Delivery.STARTUP])
def test_a_device_that_sends_one_meets_the_filter_of_the_target(machine: Machine, delivery: Delivery) -> None:
    """An entry of the I/O APIC can have that delivery mode: the line of ISA IRQ 4 is its input 4."""
    select, window = 0xFEC0_0000, 0xFEC0_0010
    assert select >> 21 != APIC >> 21
    boot(machine, "vmmcall")
    ioapic = machine.platform.mmio[select]
    for register, value in ((0x19, 1 << 24), (0x18, delivery << 8 | TRAMPOLINE >> 12)):
        ioapic.mmio_write(0, 4, register)
        ioapic.mmio_write(window & 0xFFF, 4, value)
    machine.core.processor(1)._resolver.prepare([FILTER])
    machine.platform.pulse_irq(4)
    assert machine.platform.take_startup(1) == (False, None)
    exit_ = A.Exit.FromString(machine.core.processor(1).run(A.Enter()))
    kind = A.STARTUP_KIND_INIT if delivery is Delivery.INIT else A.STARTUP_KIND_SIPI
    assert startup(exit_)[:2] == (1, kind)


def test_lint0_in_mode_init_meets_the_filter(machine: Machine) -> None:
    boot(machine, "vmmcall")
    apic = machine.platform.local_apic(1)
    apic.mmio_write(0xF0, 4, 0x1FF)
    apic.mmio_write(0x350, 4, Delivery.INIT << 8)
    apic.holds_startups = True
    apic.set_lint0(True)
    assert machine.platform.take_startup(1) == (False, None)
    held = machine.platform.take_held_startup(1)
    assert held == Startup(apic, Delivery.INIT, 0)


def test_messages_without_end_are_dropped_not_kept(machine: Machine) -> None:
    apic = machine.platform.local_apic(1)
    apic.holds_startups = True
    for _ in range(1000):
        apic.receive(Delivery.INIT, 0)
    assert len(apic.held_startups) == 64


def test_the_filter_outlives_init(machine: Machine) -> None:
    """What a higher level set stays in force (SDM: INIT changes none of it)."""
    apic = machine.platform.local_apic(1)
    apic.holds_startups = True
    apic.init()
    assert apic.holds_startups


def test_with_an_exit_open_a_kick_loses_nothing(machine: Machine) -> None:
    boot(machine, f"{X2APIC}; {icr(INIT)}; {icr(STARTUP)}; vmmcall")
    assert machine.run(updates=[FILTER]) == "startup"
    machine.processor.kick()
    assert machine.run(A.ACTION_COMMIT) == "kicked"
    assert machine.run() == "startup"
    assert startup(machine.exit)[1] == A.STARTUP_KIND_SIPI
    machine.run(A.ACTION_SKIP)
    with machine.running(1):
        wait_for(lambda: waits(machine))
    assert machine.peek(DATA) == 0


# ------------------------------------------------------------------------------------------------ the window after SIPI

WINDOW = A.Update(
    intercepts=A.InterceptFilter(startup_window=True, cr0_mask=1 << 16, cr4_mask=1 << 20, idtr_writes=True)
)
OUTSIDE = 0xC000
SMEP = 1 << 20
JUMP = struct.pack("<BHH", 0xEA, 0, OUTSIDE >> 4)  # far, to another page


def pages(*runs: int) -> A.Update:
    return A.Update(startup_window=A.StartupWindow(runs=runs))


def message(machine: Machine, delivery: Delivery) -> None:
    """INIT or SIPI for processor 1, from outside."""
    with machine.platform._guard:
        machine.platform.local_apic(1).receive(delivery, TRAMPOLINE >> 12)


class Ap:
    """Processor 1, started by SIPI under a filter that wants a window."""

    def __init__(self, machine: Machine, code: str) -> None:
        boot(machine, "l: jmp l")
        machine.poke(TRAMPOLINE, assemble(code, 16, 0))
        self.processor = machine.core.processor(1)
        self.processor._resolver.prepare([WINDOW])
        message(machine, Delivery.STARTUP)
        self.exit = A.Exit()

    def run(self, action: A.Action.ValueType = A.ACTION_UNSPECIFIED, *updates: A.Update) -> str:
        resolution = A.Resolution(action=action)
        self.exit = A.Exit.FromString(self.processor.run(A.Enter(resolution=resolution, updates=updates)))
        return self.exit.WhichOneof("reason") or ""


STEPS = f"mov eax, cr4; or eax, {SMEP}; mov cr4, eax; mov byte ptr [{MARK}], 1; lidt [0]"
MARKS = f"xor ax, ax; mov ds, ax; mov byte ptr [{MARK}], 0x77; cli; hlt"


def far(machine: Machine) -> Ap:
    """The trampoline stores, sets CR4.SMEP, loads IDTR and jumps to another page, which stores and halts."""
    machine.poke(OUTSIDE, assemble(MARKS, 16, 0))
    code = assemble(STEPS, 16, 0) + JUMP
    ap = Ap(machine, "nop")
    machine.poke(TRAMPOLINE, code)
    return ap


def test_the_first_fetch_after_sipi_exits(machine: Machine) -> None:
    ap = far(machine)
    assert ap.run() == "state_load"
    load = ap.exit.state_load
    assert (load.cause, load.gpa) == (A.STATE_LOAD_CAUSE_STARTUP_END, TRAMPOLINE)
    assert (load.state.registers.cs.base, load.state.registers.rip) == (TRAMPOLINE, 0)


def test_only_pages_of_the_window_run_and_pins_are_suspended_in_it(machine: Machine) -> None:
    ap = far(machine)
    ap.run()
    assert ap.run(A.ACTION_RETRY, pages(TRAMPOLINE >> 12, 1)) == "state_load"
    assert (ap.exit.state_load.gpa, ap.exit.state_load.state.registers.cr4) == (OUTSIDE, SMEP)
    assert machine.peek(MARK, 1) == 1, "the trampoline ran, the page behind it did not"
    assert ap.run(A.ACTION_RETRY) == "state_load", "nothing was allowed"
    assert ap.run(A.ACTION_COMMIT) == "halt"
    assert machine.peek(MARK, 1) == 0x77


@pytest.mark.parametrize("action", [A.ACTION_UNSPECIFIED, A.ACTION_DENY, A.ACTION_SKIP], ids=A.Action.Name)
def test_who_may_not_leave_waits_for_sipi_again(machine: Machine, action: A.Action.ValueType) -> None:
    ap = far(machine)
    ap.run()
    ap.run(A.ACTION_RETRY, pages(TRAMPOLINE >> 12, 1))
    operation = ap.processor._open
    assert operation is not None
    resolution = A.Resolution(action=action, exception=A.Exception(vector=13, error_code=0))
    assert ap.processor._resolver.resolve(operation, resolution) is None
    assert waits(machine)
    assert ap.processor.context.window is None
    assert ap.processor.state().registers.cr4 == 0
    assert machine.peek(MARK, 1) == 1


def test_data_outside_the_window_has_its_own_rights(machine: Machine) -> None:
    """Stores pass; those that the nested table refuses are refused as ever."""
    machine.protect(OUTSIDE, access=A.PageAccess(read=True), store=A.PAGE_STORE_SEALED)
    ap = Ap(machine, f"mov ax, {OUTSIDE >> 4}; mov ds, ax; mov byte ptr [8], 1; hlt")
    ap.run()
    assert ap.run(A.ACTION_RETRY, pages(TRAMPOLINE >> 12, 1)) == "memory_fault"
    assert ap.exit.memory_fault.gpa == OUTSIDE + 8


def test_the_window_is_this_processors_own(machine: Machine) -> None:
    """Others run all they could, while it is open."""
    ap = far(machine)
    ap.run()
    machine.boot(f"mov byte ptr [{DATA}], 5; vmmcall")
    assert machine.run() == "hypercall"
    assert machine.peek(DATA, 1) == 5


def test_pins_are_back_when_the_window_ends(machine: Machine) -> None:
    ap = Ap(machine, "nop")
    code = assemble(f"mov eax, {SMEP}; mov cr4, eax", 16, 0) + JUMP
    machine.poke(TRAMPOLINE, code)
    machine.poke(OUTSIDE, assemble("xor eax, eax; mov cr4, eax; l: jmp l", 16, 0))
    ap.run()
    ap.run(A.ACTION_RETRY, pages(TRAMPOLINE >> 12, 1))
    assert ap.run(A.ACTION_COMMIT) == "register_write"
    assert ap.exit.register_write.old_value == SMEP


def test_a_window_that_cannot_be_is_refused(machine: Machine) -> None:
    ap = far(machine)
    ap.run()
    for runs in ([1], [1 << 40, 1], [0, 1, 512, 1, 1024, 1, 1536, 1, 2048, 1]):
        with pytest.raises(BadArgument, match="StartupWindow"):
            ap.processor._resolver.prepare([pages(*runs)])


def test_init_closes_the_window_and_the_next_sipi_opens_it_anew(machine: Machine) -> None:
    ap = far(machine)
    ap.run()
    ap.run(A.ACTION_RETRY, pages(TRAMPOLINE >> 12, 1))
    message(machine, Delivery.INIT)
    message(machine, Delivery.STARTUP)
    assert ap.run(A.ACTION_RETRY) == "state_load"
    assert ap.exit.state_load.gpa == TRAMPOLINE


def test_a_processor_tells_whether_its_target_is_parked(machine: Machine) -> None:
    boot(machine, f"{X2APIC}; {icr(INIT)}; {icr(INIT)}; vmmcall")
    target = machine.core.processor(1).context
    machine.run(updates=[FILTER])
    assert machine.exit.startup.target_parked
    target.waits_for_startup = False
    machine.run(A.ACTION_SKIP)
    assert not machine.exit.startup.target_parked
