"""64-bit code: exceptions, their frames and error codes, system calls, interrupts."""

from __future__ import annotations

import struct

import pytest

from tests.unit.cpu.machine import (
    CODE,
    DATA,
    HANDLERS,
    IDT,
    IST_STACK,
    KERNEL_CS,
    KERNEL_DS,
    KERNEL_STACK,
    PDPT,
    PT,
    STACK,
    TSS,
    USER_CS,
    USER_DS,
    USER_STACK,
    A,
    Guest,
    assemble,
    gate64,
)
from vtl0_guest.cpu import state

PAGE_FAULT, GENERAL_PROTECTION = 14, 13


def test_flat_code_runs_until_its_hypercall(guest: Guest) -> None:
    guest.long_mode("mov rax, 41; inc rax; vmmcall; hlt")
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 42
    assert guest.exit.registers.rip == CODE + len(assemble("mov rax, 41; inc rax"))
    assert guest.exit.instruction == bytes.fromhex("0f01d9")
    assert guest.exit.instruction_length == 3
    assert guest.run(value=7) == "halt"
    assert guest.exit.registers.rax == 7


def test_vmcall_is_the_same_hypercall(guest: Guest) -> None:
    guest.long_mode(bytes.fromhex("0f01c1"))
    assert guest.run() == "hypercall"


def test_hypercall_from_user_mode_is_undefined(guest: Guest) -> None:
    guest.long_mode("vmmcall", cpl=3)
    guest.run()
    assert guest.vector == 6


def test_divide_error_pushes_the_faulting_instruction(guest: Guest) -> None:
    guest.long_mode("xor ecx, ecx; div ecx")
    guest.run()
    assert guest.vector == 0
    rip, cs, flags, rsp, ss = guest.frame(5)
    assert (rip, cs, rsp, ss) == (CODE + 2, KERNEL_CS, STACK, KERNEL_DS)
    assert flags & 0x10000, "faults push RF"


def test_breakpoint_pushes_the_next_instruction_and_iretq_returns_there(guest: Guest) -> None:
    guest.long_mode("int3; mov eax, 5; vmmcall", cpl=0)
    guest.run()
    assert guest.vector == 3
    assert guest.frame(1) == [CODE + 1]
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 5
    assert guest.exit.registers.rsp == STACK


def test_stack_is_switched_from_user_mode_and_ss_becomes_null(guest: Guest) -> None:
    guest.long_mode("int 0x80; nop", cpl=3)
    guest.run()
    assert guest.vector == 0x80
    assert guest.exit.registers.rsp == KERNEL_STACK - 40
    assert guest.exit.registers.ss.selector == 0
    assert guest.exit.registers.cpl == 0
    rip, cs, _flags, rsp, ss = guest.frame(5)
    assert (rip, cs, rsp, ss) == (CODE + 2, USER_CS, USER_STACK, USER_DS)


def test_interrupt_gate_of_too_low_privilege_is_general_protection(guest: Guest) -> None:
    guest.long_mode("int 0x21", cpl=3)
    guest.run()
    assert guest.vector == GENERAL_PROTECTION
    assert guest.frame(2) == [0x21 * 8 + 2, CODE]


def test_interrupt_stack_table(guest: Guest) -> None:
    guest.long_mode("ud2")
    guest.poke(IDT + 16 * 6, gate64(HANDLERS + 16 * 6, ist=1))
    guest.run()
    assert guest.vector == 6
    assert guest.exit.registers.rsp == IST_STACK - 40
    assert guest.frame(4)[3] == STACK


@pytest.mark.parametrize(
    ("code", "entry", "cpl", "error"),
    [
        ("mov rax, [0x1f0000]", 0, 0, 0),
        ("mov qword ptr [0x1f0000], rax", 0, 0, 2),
        ("mov rax, [0x1f0000]", 0x1F0003, 3, 5),
        ("mov qword ptr [0x1f0000], rax", 0x1F0005, 3, 7),
        ("mov qword ptr [0x1f0000], rax", 0x1F0001, 0, 3),
        ("mov eax, 0x1f0000; jmp rax", 0x1F0003 | 1 << 63, 0, 0x11),
        ("mov eax, 0x1f0000; jmp rax", 0, 3, 0x14),
        ("mov rax, [0x1f0000]", 0x1F0003 | 1 << 45, 0, 9),
        ("push rax", 0x1F0007, 0, None),
    ],
)
def test_page_fault_error_codes(guest: Guest, code: str, entry: int, cpl: int, error: int | None) -> None:
    guest.long_mode(code, cpl=cpl)
    guest.poke(PT + 8 * 0x1F0, struct.pack("<Q", entry))
    guest.poke(CODE + len(assemble(code)), b"\x0f\x01\xd9")
    guest.run()
    if error is None:
        assert guest.vector is None
        return
    assert guest.vector == PAGE_FAULT
    assert guest.frame(1)[0] == error
    assert guest.exit.registers.cr2 == 0x1F0000


def test_supervisor_mode_access_prevention(guest: Guest) -> None:
    guest.long_mode("mov rax, cr4; or eax, 0x200000; mov cr4, rax; mov rax, [0x1f0000]; nop")
    for page in range(512):  # supervisor pages, but for the one that is touched
        guest.poke(PT + 8 * page, struct.pack("<Q", page << 12 | (7 if page == 0x1F0 else 3)))
    guest.run()
    assert guest.vector == PAGE_FAULT
    assert guest.frame(1)[0] == 1


def test_load_of_a_selector_outside_the_table(guest: Guest) -> None:
    guest.long_mode("mov eax, 0x1238; mov ds, ax")
    guest.run()
    assert guest.vector == GENERAL_PROTECTION
    assert guest.frame(1)[0] == 0x1238


def test_page_fault_in_delivery_of_a_page_fault_is_a_double_fault(guest: Guest) -> None:
    guest.long_mode("mov rsp, 0x40000000; mov rax, [0x50000000]")
    guest.poke(IDT + 16 * 8, gate64(HANDLERS + 16 * 8, ist=1))
    guest.run()
    assert guest.vector == 8
    assert guest.frame(1)[0] == 0


def test_triple_fault_is_a_shutdown(guest: Guest) -> None:
    guest.long_mode("lidt [0x1f0000]; ud2")
    guest.poke(0x1F0000, b"\0" * 10)
    assert guest.run() == "shutdown"
    assert "#DF" in guest.exit.shutdown.cause
    assert guest.run() == "shutdown", "stays stopped"


def test_not_present_gate(guest: Guest) -> None:
    guest.long_mode("int 0x30")
    guest.poke(IDT + 16 * 0x30, b"\0" * 16)
    guest.run()
    assert guest.vector == GENERAL_PROTECTION, "type 0 is no gate"
    guest.long_mode("int 0x30")
    gate = bytearray(gate64(HANDLERS))
    gate[5] &= 0x7F
    guest.poke(IDT + 16 * 0x30, bytes(gate))
    guest.run()
    assert guest.vector == 11
    assert guest.frame(1)[0] == 0x30 * 8 + 2


def test_single_step(guest: Guest) -> None:
    guest.long_mode("pushfq; or qword ptr [rsp], 0x100; popfq; nop; nop")
    guest.run()
    assert guest.vector == 1
    rip = guest.frame(1)[0]
    assert rip == CODE + len(assemble("pushfq; or qword ptr [rsp], 0x100; popfq; nop"))


def test_single_step_over_an_emulated_instruction(guest: Guest) -> None:
    code = "pushfq; or qword ptr [rsp], 0x100; xor eax, eax; popfq; cpuid"
    guest.long_mode(code + "; nop")
    guest.run()
    assert guest.vector == 1
    assert guest.frame(1)[0] == CODE + len(assemble(code))


def test_syscall_and_sysret(guest: Guest) -> None:
    code = assemble("mov eax, 1; syscall; mov ebx, 0x77; int 0x80")
    guest.long_mode(code, cpl=3)
    kernel = 0x1A0000
    guest.poke(kernel, bytes.fromhex("0f01d9480f07"))
    for index, value in ((0xC0000081, 0x0013000800000000), (0xC0000082, kernel), (0xC0000084, 0x200)):
        state.set_msr(guest.processor.context, index, value)
    assert guest.run() == "hypercall"
    registers = guest.exit.registers
    assert (registers.rip, registers.cpl, registers.rcx) == (kernel, 0, CODE + 7)
    assert registers.cs.selector == 8
    assert registers.ss.selector == 0x10
    guest.run()
    assert guest.vector == 0x80
    assert guest.exit.registers.rbx == 0x77
    assert guest.frame(2)[1] == 0x23


_ARM_TIMER_AND_HALT = """mov edi, 0xfee00000
mov dword ptr [rdi + 0xf0], 0x1ff
mov dword ptr [rdi + 0x320], 0x40
mov dword ptr [rdi + 0x3e0], 0xb
mov dword ptr [rdi + 0x380], 1000
sti
hlt"""


def test_timer_interrupt_wakes_a_halted_processor(guest: Guest) -> None:
    guest.long_mode(_ARM_TIMER_AND_HALT + "; vmmcall")
    directory = 0x14000
    guest.poke(PDPT + 8 * 3, struct.pack("<Q", directory | 7))
    guest.poke(directory + 8 * (0xFEE00000 >> 21 & 0x1FF), struct.pack("<Q", 0xFEE00083))
    guest.run()
    assert guest.vector == 0x40
    assert guest.frame(1)[0] == CODE + len(assemble(_ARM_TIMER_AND_HALT))


def test_external_interrupt_waits_for_the_flag_and_the_shadow(guest: Guest) -> None:
    guest.long_mode("mov ecx, 1000; l: dec ecx; jnz l; sti; nop; nop; vmmcall")
    event = A.Update(event=A.PendingEvent(interrupt_vector=0x55))
    assert guest.run(updates=[event]) == "hypercall"
    assert guest.vector == 0x55
    after_nop = CODE + len(assemble("mov ecx, 1000; l: dec ecx; jnz l; sti; nop"))
    assert guest.frame(1)[0] == after_nop


def test_nmi_ignores_the_flag_and_blocks_the_next_until_iret(guest: Guest) -> None:
    guest.long_mode("nop; nop; mov eax, 9; vmmcall")
    nmi = A.Update(event=A.PendingEvent(nmi=True))
    guest.run(updates=[nmi])
    assert guest.vector == 2
    guest.run(updates=[nmi])
    assert guest.vector == 2, "delivered after IRET"
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 9


def test_user_port_access_obeys_the_permission_bitmap(guest: Guest) -> None:
    guest.long_mode("in al, 0x21; in al, 0x22", cpl=3)
    guest.poke(TSS + 0x66, struct.pack("<H", 0x68))
    present = guest.processor.state()
    present.tr.limit = 0x68 + 0x100
    guest.poke(TSS + 0x68, b"\0\0\0\0\x04" + b"\xff" * 0x80)
    guest.processor.load_state(present)
    guest.run()
    assert guest.vector == GENERAL_PROTECTION
    assert guest.frame(2) == [0, CODE + 2]


def test_serial_output_rides_on_the_next_exit(guest: Guest) -> None:
    guest.long_mode("mov edx, 0x3f8; mov al, 0x48; out dx, al; mov al, 0x69; out dx, al; vmmcall")
    assert guest.run() == "hypercall"
    assert [(part.port, part.data) for part in guest.exit.serial] == [(0, b"Hi")]


def test_string_output(guest: Guest) -> None:
    guest.long_mode("mov edx, 0x3f8; mov esi, 0x200000; mov ecx, 5; cld; rep outsb; vmmcall")
    guest.poke(DATA, b"hello")
    assert guest.run() == "hypercall"
    assert guest.exit.serial[0].data == b"hello"
    assert (guest.exit.registers.rcx, guest.exit.registers.rsi) == (0, DATA + 5)


def test_unclaimed_port_exits_both_ways(guest: Guest) -> None:
    guest.long_mode("mov edx, 0x510; mov eax, 0x1234; out dx, ax; in eax, dx; vmmcall")
    assert guest.run() == "port"
    port = guest.exit.port
    assert (port.port, port.write, port.size, port.value) == (0x510, True, 2, 0x1234)
    assert guest.run() == "port"
    assert (guest.exit.port.write, guest.exit.port.size) == (False, 4)
    guest.run(value=0xCAFEBABE)
    assert guest.exit.registers.rax == 0xCAFEBABE


def test_debug_exit(guest: Guest) -> None:
    guest.long_mode("mov al, 3; out 0xf4, al; vmmcall")
    assert guest.run() == "debug_exit"
    assert guest.exit.debug_exit.value == 3
    assert guest.run() == "hypercall"
