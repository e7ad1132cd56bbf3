"""Machine checks: the bank, #MC, and what makes them a shutdown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cpu.machine import DATA, A
from tests.unit.cpu.test_smp import Machine
from vtlab.ram import Ram

ERROR = A.Update(
    event=A.PendingEvent(machine_check=A.MachineCheck(status=0xBD00_0000_0000_00C0, address=0x5000, mcg_status=1))
)
SET_MCE = "mov rax, cr4; or eax, 0x40; mov cr4, rax"
# Reports count, status, address and MCG_STATUS, and is done with it.
HANDLER = (
    "push rax; push rcx; push rdx; inc qword ptr [0x200000];"
    "mov ecx, 0x401; rdmsr; mov [0x200008], eax; mov [0x20000c], edx; xor eax, eax; xor edx, edx; wrmsr;"
    "mov ecx, 0x402; rdmsr; mov [0x200010], eax; mov ecx, 0x17a; rdmsr; mov [0x200018], eax;"
    "xor eax, eax; xor edx, edx; wrmsr; pop rdx; pop rcx; pop rax; iretq"
)


@pytest.fixture
def machine(ram: Ram, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(ram, tmp_path, vp_count=1)
    machine.handler(18, HANDLER)
    yield machine
    machine.close()


def run(machine: Machine, *updates: A.Update) -> A.Exit:
    enter = A.Enter(reason=A.ENTER_REASON_RESUME, resolution=A.Resolution(action=A.ACTION_SKIP), updates=updates)
    return A.Exit.FromString(machine.processor.run(enter))


@pytest.mark.parametrize("state", ["cli", "sti", "cli; mov ss, bx"])
def test_it_is_taken_whatever_is_held_back(machine: Machine, state: str) -> None:
    machine.boot(f"{SET_MCE}; mov ebx, 0x10; vmmcall; {state}; mov ecx, 9; vmmcall")
    assert run(machine).WhichOneof("reason") == "hypercall"
    assert run(machine, ERROR).registers.rcx == 9
    assert machine.peek(DATA) == 1
    assert machine.peek(DATA + 8) == 0xBD00_0000_0000_00C0
    assert machine.peek(DATA + 16) == 0x5000
    assert machine.peek(DATA + 24) & 0xFFFF == 5, "RIPV, MCIP"


def test_what_the_open_exit_was_about_ends_first(machine: Machine) -> None:
    """The write that was judged is committed before the handler sees the processor."""
    machine.handler(18, f"mov rax, cr4; mov [0x200020], rax; {HANDLER}")
    machine.boot(f"{SET_MCE}; vmmcall; mov rbx, cr4; or ebx, 0x800; mov cr4, rbx; vmmcall")
    run(machine)
    filter_ = A.Update(intercepts=A.InterceptFilter(cr4_mask=0x800))
    assert run(machine, filter_).WhichOneof("reason") == "register_write"
    enter = A.Enter(
        reason=A.ENTER_REASON_RESUME, resolution=A.Resolution(action=A.ACTION_COMMIT), updates=[ERROR, filter_]
    )
    machine.processor.run(enter)
    assert machine.peek(DATA + 32) & 0x800


def test_in_hlt_with_interrupts_off(machine: Machine) -> None:
    machine.boot(f"{SET_MCE}; vmmcall; cli; hlt; vmmcall")
    run(machine)
    halted = run(machine)
    assert halted.WhichOneof("reason") == "halt"
    enter = A.Enter(reason=A.ENTER_REASON_RESUME, resolution=A.Resolution(action=A.ACTION_COMMIT), updates=[ERROR])
    assert A.Exit.FromString(machine.processor.run(enter)).WhichOneof("reason") == "hypercall"
    assert machine.peek(DATA) == 1


def test_without_cr4_mce_it_is_a_shutdown(machine: Machine) -> None:
    machine.boot("vmmcall; nop; vmmcall")
    run(machine)
    assert "CR4.MCE is clear" in run(machine, ERROR).shutdown.cause


def test_a_second_one_before_the_first_is_dealt_with_is_a_shutdown(machine: Machine) -> None:
    machine.handler(18, "l: jmp l")
    machine.boot(f"{SET_MCE}; vmmcall; nop; vmmcall")
    run(machine)
    assert "in progress" in run(machine, ERROR, ERROR).shutdown.cause


def write_msr(index: int, low: int, high: int) -> str:
    return f"mov ecx, {index}; mov eax, {low}; mov edx, {high}; wrmsr"


def test_the_bank_is_read_and_written_as_registers(machine: Machine) -> None:
    """A status other than 0 where HWCR.McStatusWrEn is set."""
    machine.boot(
        f"mov ecx, 0x179; rdmsr; mov ebx, eax; {write_msr(0xC0010015, 1 << 18, 0)}; {write_msr(0x401, 7, 0)};"
        "rdmsr; vmmcall"
    )
    registers = run(machine).registers
    assert (registers.rbx & 0xFF, registers.rax) == (1, 7)


@pytest.mark.parametrize(
    ("index", "low", "high", "refused"),
    [
        (0x400, 0, 0, False),
        (0x400, 0xFFFFFFFF, 0xFFFFFFFF, False),
        (0x400, 0xFFFFFFFF, 0, True),
        (0x401, 0, 0, False),
        (0x401, 1, 0, True),
        (0x401, 0, 0x80000000, True),
        (0x402, 1, 1, False),
    ],
)
def test_what_the_bank_does_not_take_is_gp(machine: Machine, index: int, low: int, high: int, refused: bool) -> None:
    machine.handler(13, "mov ebx, 13; vmmcall")
    machine.boot(f"xor ebx, ebx; {write_msr(index, low, high)}; vmmcall")
    assert run(machine).registers.rbx == (13 if refused else 0)
