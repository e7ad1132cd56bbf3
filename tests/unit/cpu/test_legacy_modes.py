"""Real mode, 32-bit protected mode, compatibility mode, and the way from one to the other."""

from __future__ import annotations

import struct

import pytest

from tests.unit.cpu.machine import (
    CODE,
    CODE32,
    GDT,
    HANDLERS,
    IDT,
    KERNEL_CS,
    KERNEL_DS,
    KERNEL_STACK,
    PD,
    PDPT,
    PML4,
    STACK,
    TSS,
    USER_CS,
    USER_DS,
    USER_STACK,
    A,
    Guest,
    assemble,
    descriptor,
    gate32,
)


def test_real_mode_interrupt_through_the_vector_table(guest: Guest) -> None:
    guest.real_mode("mov ax, 0x1234; int 0x21; mov bx, 0x55; hlt")
    assert guest.run() == "halt"
    registers = guest.exit.registers
    assert registers.rip == 0x2000 + 0x21 * 4
    assert registers.rsp == 0x7000 - 6
    assert guest.frame(2, 2) == [0x1000 + 5, 0]
    assert guest.run(A.ACTION_SKIP) == "halt"
    assert guest.exit.registers.rbx == 0x55
    assert guest.exit.registers.rsp == 0x7000


def test_real_mode_divide_error(guest: Guest) -> None:
    guest.real_mode("xor cx, cx; div cx")
    assert guest.run() == "halt"
    assert guest.exit.registers.rip == 0x2000
    assert guest.frame(1, 2) == [0x1002]


def test_real_mode_undefined_opcode_for_protected_mode_instructions(guest: Guest) -> None:
    guest.real_mode(bytes.fromhex("0f00d8"))  # ltr ax
    assert guest.run() == "halt"
    assert guest.exit.registers.rip == 0x2000 + 6 * 4


def test_real_mode_segments(guest: Guest) -> None:
    guest.real_mode("mov ax, 0x4000; mov ds, ax; mov byte ptr [0x10], 0x5a; hlt")
    guest.run()
    assert guest.peek(0x40010, 1) == 0x5A


def test_sixteen_bit_stack_pointer_wraps(guest: Guest) -> None:
    guest.real_mode("mov sp, 0; int 0x21")
    guest.run()
    assert guest.exit.registers.rsp == 0xFFFA


def test_protected_mode_fault_and_return(guest: Guest) -> None:
    guest.protected_mode("int3; mov eax, 7; vmmcall")
    guest.run()
    assert guest.vector == 3
    assert guest.frame(3, 4)[:2] == [CODE + 1, KERNEL_CS]
    assert guest.exit.registers.rsp == STACK - 12
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 7


def test_protected_mode_stack_switch(guest: Guest) -> None:
    guest.protected_mode("int 0x80; mov eax, 9; int 0x80", cpl=3)
    guest.run()
    assert guest.vector == 0x80
    assert guest.exit.registers.rsp == KERNEL_STACK - 20
    assert guest.exit.registers.ss.selector == KERNEL_DS
    rip, cs, _flags, esp, ss = guest.frame(5, 4)
    assert (rip, cs, esp, ss) == (CODE + 2, USER_CS, USER_STACK, USER_DS)
    guest.run()
    assert guest.vector == 0x80
    assert guest.exit.registers.rax == 9


def test_protected_mode_general_protection_with_selector(guest: Guest) -> None:
    guest.protected_mode("mov eax, 0x4321; mov es, ax")
    guest.run()
    assert guest.vector == 13
    assert guest.frame(1, 4) == [0x4320]


def test_sixteen_bit_gate(guest: Guest) -> None:
    guest.protected_mode("int 0x30")
    guest.poke(0x9000, bytes.fromhex("0f01d9"))
    guest.poke(IDT + 8 * 0x30, gate32(0x9000, kind=0x6))
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rip == 0x9000
    assert guest.exit.registers.rsp == STACK - 6
    assert guest.frame(2, 2) == [(CODE + 2) & 0xFFFF, KERNEL_CS]


def test_task_gate_is_refused(guest: Guest) -> None:
    guest.protected_mode("int 0x30")
    guest.poke(IDT + 8 * 0x30, gate32(0, kind=0x5, selector=0x28))
    guest.run()
    assert guest.vector == 13
    assert guest.frame(1, 4) == [0x30 * 8 + 2]


def test_hardware_task_switch_stops_the_processor(guest: Guest) -> None:
    guest.protected_mode(b"\xea\0\0\0\0\x30\x00\xf4")  # jmp 0x30:0
    second = 0x7800
    guest.poke(GDT + 0x30, struct.pack("<Q", descriptor(0x0089, second, 0x67)))
    guest.poke(second + 0x20, struct.pack("<II", CODE + 7, 2))
    selectors = struct.pack("<6I", 0x10, 8, 0x10, 0x10, 0x10, 0x10)
    guest.poke(second + 0x48, selectors)
    state = guest.processor.state()
    state.gdtr.limit = 0x37
    guest.processor.load_state(state)
    assert guest.run() == "failure"
    assert "task switch" in guest.exit.failure.message


def test_virtual_8086_mode_interrupts_go_through_the_gate(guest: Guest) -> None:
    # IRETD to VM86: EFLAGS.VM with IOPL 3, so that INT n goes to the protected-mode gate.
    code = assemble(
        """push 0x4000; push 0x4000; push 0x4000; push 0x4000
        push 0x4000; push 0x7000; push 0x23002; push 0; push 0x3000; iretd""",
        32,
    )
    guest.protected_mode(code)
    guest.poke(0x3000, bytes.fromhex("cd80"))
    guest.run()
    assert guest.vector == 0x80
    frame = guest.frame(9, 4)
    assert frame[:2] == [0x3002, 0]
    assert frame[2] & 0x20000
    assert frame[3:] == [0x7000, 0x4000, 0x4000, 0x4000, 0x4000, 0x4000]
    assert guest.exit.registers.ds.selector == 0


def _paging_on(table: int, cr4: int) -> str:
    return f"""mov eax, {table}; mov cr3, eax; mov eax, {cr4}; mov cr4, eax
    mov eax, 0x80000011; mov cr0, eax; mov ebx, dword ptr [0x400000]; mov ecx, dword ptr [0x800000]; vmmcall"""


def test_two_level_paging(guest: Guest) -> None:
    guest.protected_mode(_paging_on(PML4, 0x10))
    guest.poke(PML4, struct.pack("<III", 0x83, PDPT | 3, 0))
    guest.poke(PDPT, struct.pack("<I", 0x300003))
    guest.poke(0x300000, struct.pack("<I", 0xFEED))
    guest.run()
    assert guest.vector == 14
    assert guest.exit.registers.rbx == 0xFEED
    assert guest.exit.registers.cr2 == 0x800000


def test_pae_paging(guest: Guest) -> None:
    guest.protected_mode(_paging_on(PML4, 0x20))
    guest.poke(PML4, struct.pack("<4Q", PD | 1, 0, 0, 0))
    guest.poke(PD, struct.pack("<4Q", 0x83, 0x200083, 0x600083, 0))
    guest.poke(0x600000, struct.pack("<I", 0xBEEF))
    guest.run()
    assert guest.vector == 14
    assert guest.exit.registers.rbx == 0xBEEF
    assert guest.frame(1, 4) == [0]


def test_from_protected_to_long_mode_and_compatibility_mode(guest: Guest) -> None:
    guest.long_mode("nop")  # builds the tables
    entry = """mov eax, 0x20; mov cr4, eax; mov eax, 0x10000; mov cr3, eax
    mov ecx, 0xc0000080; mov eax, 0x100; xor edx, edx; wrmsr
    mov eax, 0x80000011; mov cr0, eax"""
    code32 = assemble(entry, 32)
    far = CODE + len(code32) + 7
    code = code32 + b"\xea" + struct.pack("<IH", far, KERNEL_CS)
    code64 = assemble("mov r8, 0x1122334455667788; vmmcall", at=far)
    # retf to a 32-bit code segment: compatibility mode.
    code64 += assemble(f"push {CODE32}; lea rax, [rip + 3]; push rax", at=far + len(code64)) + b"\x48\xcb"
    guest.poke(
        GDT,
        struct.pack(
            "<8Q",
            0,
            descriptor(0xA09B),
            descriptor(0xC093),
            0,
            0,
            descriptor(0x8B, TSS, 0x67),
            0,
            descriptor(0xC09B),
        ),
    )
    tail = assemble("mov eax, 0x12345678; inc eax; vmmcall", 32)
    guest.poke(CODE, code + code64 + tail)
    state = guest.processor.state()
    state.registers.cr0, state.registers.cr4, state.registers.efer, state.registers.cr3 = 0x11, 0, 0, 0
    state.registers.cs.selector, state.registers.cs.attributes = CODE32, 0xC09B
    guest.processor.load_state(state)
    assert guest.run() == "hypercall", guest.exit
    assert guest.exit.registers.r8 == 0x1122334455667788
    assert guest.exit.registers.efer & 0x400
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 0x12345679
    assert guest.exit.registers.cs.selector == CODE32


@pytest.mark.parametrize("vector", [0, 13])
def test_interrupt_without_a_table_is_a_shutdown_in_real_mode(guest: Guest, vector: int) -> None:
    guest.real_mode(bytes([0xCD, vector]))
    state = guest.processor.state()
    state.idtr.limit = 0
    guest.processor.load_state(state)
    assert guest.run() == "shutdown"


def test_handlers_are_where_the_tests_think(guest: Guest) -> None:
    guest.protected_mode("ud2")
    guest.run()
    assert guest.exit.registers.rip == HANDLERS + 6 * 16
