"""What public test kernels found wrong, each as a small guest."""

from __future__ import annotations

import pytest

from tests.unit.cpu.machine import CODE, Guest


def test_icebp_is_a_trap_like_debug_exception(guest: Guest) -> None:
    """The engine takes F1 for an undefined opcode."""
    guest.long_mode(b"\xf1\x90")
    guest.run()
    assert guest.vector == 1
    assert guest.frame(1) == [CODE + 1]


@pytest.mark.parametrize(("msr", "value"), [(0x179, 1), (0x17A, 0)])
def test_machine_check_msrs_exist_where_cpuid_says_so(guest: Guest, msr: int, value: int) -> None:
    """One bank."""
    guest.long_mode(f"mov ecx, {msr:#x}; mov eax, -1; mov edx, -1; rdmsr; vmmcall")
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rip > CODE
    assert (guest.exit.registers.rax, guest.exit.registers.rdx) == (value, 0)


def test_misc_enable_keeps_what_is_written(guest: Guest) -> None:
    guest.long_mode("mov ecx, 0x1a0; mov eax, 0x51889; mov edx, 4; wrmsr; xor eax, eax; rdmsr; vmmcall")
    assert guest.run() == "hypercall"
    assert (guest.exit.registers.rax, guest.exit.registers.rdx) == (0x51889, 4)


def test_pushf_stores_no_resume_flag(guest: Guest) -> None:
    """IRET may set RF; the next PUSHF stores it clear."""
    guest.long_mode(
        "mov rbx, rsp; push 0x10; push rbx; push 0x10002; push 8; lea rax, [rip + 3]; push rax; iretq;"
        "pushfq; pop rax; vmmcall"
    )
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 2
