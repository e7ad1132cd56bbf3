"""Control registers, descriptor tables and MSRs: what the processor refuses, what exits, what each decision does."""

from __future__ import annotations

import struct

import pytest

from tests.unit.cpu.machine import CODE, GDT, STACK, TSS_SELECTOR, A, Guest, assemble
from vtlab.v1 import registers_pb2
from vtlab.x86.registers import Cr0, Cr4, Efer, Msr

R = registers_pb2
UNDEFINED_OPCODE, GENERAL_PROTECTION = 6, 13


def runs(guest: Guest, code: str, cpl: int = 0) -> int | None:
    """The exception that the code takes; None if it reaches its end."""
    guest.long_mode(code + ("; int 0x80" if cpl else "; vmmcall"), cpl=cpl)
    assert guest.run() == "hypercall", guest.exit
    return None if guest.vector == 0x80 else guest.vector


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("mov rax, cr0; bts rax, 32; mov cr0, rax", True),
        ("mov rax, cr0; btr rax, 0; mov cr0, rax", True),
        ("mov rax, cr0; bts rax, 29; mov cr0, rax", True),
        ("mov rax, cr0; bts rax, 30; bts rax, 29; mov cr0, rax", False),
        ("mov rax, cr0; bts rax, 10; mov cr0, rax", False),
        ("mov rax, cr0; btr rax, 31; mov cr0, rax", True),
        ("mov rax, cr4; bts rax, 63; mov cr4, rax", True),
        ("mov rax, cr4; bts rax, 13; mov cr4, rax", True),
        ("mov rax, cr4; bts rax, 12; mov cr4, rax", True),
        ("mov rax, cr4; bts rax, 17; mov cr4, rax", True),
        ("mov rax, cr4; btr rax, 5; mov cr4, rax", True),
        ("mov rax, cr3; bts rax, 50; mov cr3, rax", True),
        ("mov rax, cr3; mov cr3, rax", False),
        ("mov eax, 0x10; mov cr8, rax", True),
        ("mov eax, 0xf; mov cr8, rax", False),
        ("mov ecx, 0xc0000080; rdmsr; bts eax, 12; wrmsr", True),
        ("mov ecx, 0xc0000080; rdmsr; btr eax, 8; wrmsr", True),
        ("mov ecx, 0xc0000080; rdmsr; bts eax, 1; wrmsr", True),
        ("mov ecx, 0xc0000080; rdmsr; btr eax, 11; wrmsr", False),
        ("mov ecx, 0xc0000082; mov edx, 0x8000; xor eax, eax; wrmsr", True),
        ("mov ecx, 0x277; mov eax, 2; xor edx, edx; wrmsr", True),
        ("mov ecx, 0xc0010114; xor eax, eax; xor edx, edx; wrmsr", True),
        ("mov ecx, 3; rdpmc", False),
        ("mov ecx, 4; rdpmc", True),
    ],
)
def test_refused_values(guest: Guest, code: str, refused: bool) -> None:
    assert runs(guest, code) == (GENERAL_PROTECTION if refused else None)


@pytest.mark.parametrize(
    "code",
    [
        "mov rax, cr0",
        "mov cr0, rax",
        "mov rax, cr3",
        "mov cr3, rax",
        "mov rax, cr8",
        "mov rax, dr7",
        "clts",
        "lmsw ax",
        "lgdt [rsp]",
        "lidt [rsp]",
        "lldt ax",
        "ltr ax",
        "mov ecx, 0xc0000080; rdmsr",
        "hlt",
        "invlpg [rsp]",
        "invd",
        "cli",
        "xor ecx, ecx; xsetbv",
    ],
)
def test_user_mode_is_refused(guest: Guest, code: str) -> None:
    expected = 6 if "xsetbv" in code else GENERAL_PROTECTION  # CR4.OSXSAVE is clear
    assert runs(guest, code, cpl=3) == expected


@pytest.mark.parametrize("code", ["sgdt [rsp]", "sidt [rsp]", "sldt ax", "str ax", "smsw ax", "smsw word ptr [rsp]"])
def test_user_mode_instruction_prevention(guest: Guest, code: str) -> None:
    assert runs(guest, code, cpl=3) is None
    guest.long_mode(code + "; vmmcall", cpl=3)
    state = guest.processor.state()
    state.registers.cr4 |= Cr4.UMIP
    guest.processor.load_state(state)
    guest.run()
    assert guest.vector == GENERAL_PROTECTION


def test_stores_of_tables(guest: Guest) -> None:
    guest.long_mode("sgdt [0x1f0000]; sldt word ptr [0x1f0010]; str rax; smsw rbx; vmmcall")
    guest.run()
    limit, base = struct.unpack("<HQ", guest.memory[0x1F0000:0x1F000A])
    assert (limit, base) == (0x3F, GDT)
    assert guest.exit.registers.rax == TSS_SELECTOR
    assert guest.exit.registers.rbx == guest.exit.registers.cr0


WRITES = [
    ("mov rax, cr0; btr rax, 16; mov cr0, rax", "cr0"),
    ("mov r9, cr0; btr r9, 16; mov cr0, r9", "cr0"),
    ("mov rax, cr4; bts rax, 11; mov cr4, rax", "cr4"),
    ("mov r15, cr4; bts r15, 11; mov cr4, r15", "cr4"),
    ("clts", None),
    ("lmsw ax", None),
]


@pytest.mark.parametrize(("code", "register"), WRITES)
def test_masked_changes_exit_with_old_and_new(guest: Guest, code: str, register: str | None) -> None:
    guest.long_mode(code + "; vmmcall")
    guest.filter(cr0_mask=1 << 16, cr4_mask=1 << 11)
    reason = guest.run()
    if register is None:
        assert reason == "hypercall", "no masked bit changes"
        return
    assert reason == "register_write"
    change, registers = guest.exit.register_write, guest.exit.registers
    mask = 1 << 16 if register == "cr0" else 1 << 11
    assert change.old_value ^ change.new_value == mask
    assert getattr(registers, register) == change.old_value, "nothing is committed"
    assert guest.exit.instruction_length == len(guest.exit.instruction) > 0
    assert guest.run(A.ACTION_COMMIT) == "hypercall"
    assert getattr(guest.exit.registers, register) == change.new_value


def test_lmsw_and_clts_exit_when_masked(guest: Guest) -> None:
    guest.long_mode("lmsw ax; clts; mov word ptr [0x1f0000], 0xb; lmsw word ptr [0x1f0000]; vmmcall")
    state = guest.processor.state()
    state.registers.rax = 0x9  # PE, TS
    guest.processor.load_state(state)
    guest.filter(cr0_mask=0xE)
    assert guest.run() == "register_write"
    assert guest.exit.register_write.new_value & 0xE == 8
    assert guest.run(A.ACTION_COMMIT) == "register_write"
    assert guest.exit.register_write.new_value & 0xE == 0
    assert guest.run(A.ACTION_SKIP) == "register_write"
    assert guest.exit.register_write.new_value & 0xE == 0xA
    assert guest.run(A.ACTION_SKIP) == "hypercall"
    assert guest.exit.registers.cr0 & 0xE == 8


@pytest.mark.parametrize("action", [A.ACTION_UNSPECIFIED, A.ACTION_DENY])
def test_denied_is_general_protection_on_the_instruction(guest: Guest, action: A.Action.ValueType) -> None:
    guest.long_mode("mov rax, cr0; btr rax, 16; mov cr0, rax; vmmcall")
    guest.filter(cr0_mask=1 << 16)
    assert guest.run() == "register_write"
    assert guest.run(action) == "hypercall"
    assert guest.vector == GENERAL_PROTECTION
    assert guest.frame(2) == [0, CODE + len(assemble("mov rax, cr0; btr rax, 16"))]
    assert guest.exit.registers.cr0 & Cr0.WP


def test_unknown_action_denies(guest: Guest) -> None:
    guest.long_mode("mov rax, cr0; btr rax, 16; mov cr0, rax; vmmcall")
    guest.filter(cr0_mask=1 << 16)
    guest.run()
    guest.run(99)  # type: ignore[arg-type]
    assert guest.vector == GENERAL_PROTECTION


def test_denied_with_a_chosen_exception(guest: Guest) -> None:
    guest.long_mode("mov rax, cr0; btr rax, 16; mov cr0, rax; vmmcall")
    guest.filter(cr0_mask=1 << 16)
    guest.run()
    guest.run(A.ACTION_DENY, exception=A.Exception(vector=6))
    assert guest.vector == 6


def test_commit_uses_the_judged_value_and_replace_another(guest: Guest) -> None:
    guest.long_mode("mov rax, cr0; btr rax, 16; mov cr0, rax; vmmcall")
    guest.filter(cr0_mask=1 << 16)
    guest.run()
    register = A.Update(register=R.RegisterValue(name=R.REGISTER_NAME_RAX, value=0))
    assert guest.run(A.ACTION_COMMIT, updates=[register]) == "hypercall"
    assert guest.exit.registers.cr0 == 0x80000033
    assert guest.exit.registers.rax == 0
    guest.long_mode("mov rax, cr0; btr rax, 16; mov cr0, rax; vmmcall")
    guest.run()
    assert guest.run(A.ACTION_REPLACE, value=0x80010033) == "hypercall"
    assert guest.exit.registers.cr0 == 0x80010033


def test_replacement_that_the_processor_refuses(guest: Guest) -> None:
    guest.long_mode("mov rax, cr0; btr rax, 16; mov cr0, rax; vmmcall")
    guest.filter(cr0_mask=1 << 16)
    guest.run()
    guest.run(A.ACTION_REPLACE, value=0x80000000)
    assert guest.vector == GENERAL_PROTECTION


def test_retry_halt_and_reset(guest: Guest) -> None:
    guest.long_mode("mov rax, cr0; btr rax, 16; mov cr0, rax; vmmcall")
    guest.filter(cr0_mask=1 << 16)
    assert guest.run() == "register_write"
    assert guest.run(A.ACTION_RETRY) == "register_write"
    assert guest.run(A.ACTION_RESET) == "reset_request"
    assert guest.run() == "reset_request"
    guest.long_mode("mov rax, cr0; btr rax, 16; mov cr0, rax; vmmcall")
    assert guest.run() == "register_write"
    assert guest.run(A.ACTION_HALT) == "failure"
    assert guest.run() == "failure"


def test_page_table_root_is_watched_unless_it_is_a_target(guest: Guest) -> None:
    guest.long_mode("mov eax, 0x10000; mov cr3, rax; mov eax, 0x10008; mov cr3, rax; mov eax, 0x20000; mov cr3, rax")
    guest.filter(cr3_writes=True, cr3_targets=[0x10000])
    assert guest.run() == "register_write"
    change = guest.exit.register_write
    assert (change.name, change.old_value, change.new_value) == (R.REGISTER_NAME_CR3, 0x10008, 0x20000)


def test_efer_by_its_own_mask_and_by_index(guest: Guest) -> None:
    code = "mov ecx, 0xc0000080; rdmsr; btr eax, 11; wrmsr; vmmcall"
    guest.long_mode(code)
    guest.filter(efer_mask=int(Efer.NXE))
    assert guest.run() == "register_write"
    assert guest.exit.register_write.name == R.REGISTER_NAME_EFER
    assert guest.run(A.ACTION_COMMIT) == "hypercall"
    assert not guest.exit.registers.efer & Efer.NXE
    guest.long_mode(code)
    guest.filter(msr_writes=[A.MsrFilter(index=Msr.EFER, mask=int(Efer.NXE))])
    assert guest.run() == "msr"
    assert guest.exit.msr.index == Msr.EFER


def test_msr_filters(guest: Guest) -> None:
    guest.long_mode(
        "mov ecx, 0xc0000082; mov eax, 0x1000; xor edx, edx; wrmsr; wrmsr; rdmsr; mov ecx, 0xc0000083; wrmsr; vmmcall"
    )
    guest.filter(msr_writes=[A.MsrFilter(index=Msr.LSTAR, mask=(1 << 64) - 1)])
    assert guest.run() == "msr"
    access = guest.exit.msr
    assert (access.index, access.write, access.old_value, access.new_value) == (Msr.LSTAR, True, 0, 0x1000)
    assert guest.run(A.ACTION_COMMIT) == "hypercall", "writing the same value changes nothing"
    assert guest.exit.registers.rax == 0x1000


def test_msr_that_the_core_does_not_model(guest: Guest) -> None:
    guest.long_mode("mov ecx, 0x40000000; mov eax, 5; xor edx, edx; wrmsr; rdmsr; vmmcall")
    assert guest.run() == "msr"
    assert (guest.exit.msr.write, guest.exit.msr.new_value) == (True, 5)
    assert guest.run() == "msr"
    assert not guest.exit.msr.write
    assert guest.run(value=0x1122334455667788) == "hypercall"
    assert (guest.exit.registers.rax, guest.exit.registers.rdx) == (0x55667788, 0x11223344)


def test_descriptor_table_filter(guest: Guest) -> None:
    guest.long_mode("lgdt [0x1f0000]; lidt [0x1f0000]; vmmcall")
    guest.poke(0x1F0000, struct.pack("<HQ", 0x3F, 0x6000))
    guest.filter(gdtr_writes=True)
    assert guest.run() == "register_write"
    change = guest.exit.register_write
    assert change.name == R.REGISTER_NAME_GDTR
    assert (change.old_table.base, change.old_table.limit) == (GDT, 0x3F)
    assert (change.new_table.base, change.new_table.limit) == (0x6000, 0x3F)
    guest.poke(0x1F0000, b"\x7f" * 10)
    assert guest.run(A.ACTION_SKIP) == "hypercall"
    assert guest.vector == GENERAL_PROTECTION, "the base of LIDT is not canonical"
    assert guest.processor.state().gdtr.base == GDT


def test_table_commit_uses_the_judged_copy(guest: Guest) -> None:
    guest.long_mode("lgdt [0x1f0000]; vmmcall")
    guest.poke(0x1F0000, struct.pack("<HQ", 0x3F, 0x6000))
    guest.filter(gdtr_writes=True)
    guest.run()
    guest.poke(0x1F0000, struct.pack("<HQ", 0xFFFF, 0x9000))
    guest.run(A.ACTION_COMMIT)
    state = guest.processor.state()
    assert (state.gdtr.base, state.gdtr.limit) == (0x6000, 0x3F)


def test_task_register(guest: Guest) -> None:
    guest.long_mode("mov eax, 0x28; ltr ax; ltr ax; vmmcall")
    guest.poke(GDT + 0x2D, b"\x89")
    guest.run()
    assert guest.vector == GENERAL_PROTECTION, "the second LTR finds it busy"
    assert guest.frame(1) == [0x28]
    assert guest.peek(GDT + 0x2D, 1) == 0x8B


def test_extended_control_register(guest: Guest) -> None:
    code = """mov rax, cr4; bts rax, 18; mov cr4, rax; xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv
    xgetbv; mov ebx, eax; mov eax, 7; xsetbv"""
    guest.long_mode(code)
    guest.run()
    assert guest.vector == GENERAL_PROTECTION
    assert guest.exit.registers.rbx == 3
    guest.long_mode(code)
    guest.filter(xcr0_mask=2)
    state = guest.processor.state()
    state.xcr0 = 1
    guest.processor.load_state(state)
    assert guest.run() == "register_write"
    change = guest.exit.register_write
    assert (change.name, change.old_value, change.new_value) == (R.REGISTER_NAME_XFEM, 1, 3)


def test_cpuid_hides_nested_virtualization_and_shows_a_hypervisor(guest: Guest) -> None:
    guest.long_mode(
        """mov eax, 0x80000001; cpuid; mov r8d, ecx; mov eax, 1; cpuid; mov r9d, ecx
        mov ecx, 0xc0000080; rdmsr; mov r10d, eax; mov ecx, 0xc0010114; rdmsr; vmmcall"""
    )
    guest.run()
    registers = guest.exit.registers
    assert not registers.r8 & 4
    assert registers.r9 >> 31 & 1
    assert not registers.r10 & Efer.SVME
    assert registers.rax & 0x10, "SVMDIS"


def test_hypervisor_leaves_and_watched_leaves_exit(guest: Guest) -> None:
    guest.long_mode("mov eax, 0x40000000; cpuid; mov eax, 0; cpuid; vmmcall")
    assert guest.run() == "cpuid"
    answer = [
        A.Update(register=R.RegisterValue(name=name, value=value))
        for name, value in zip(
            (R.REGISTER_NAME_RAX, R.REGISTER_NAME_RBX, R.REGISTER_NAME_RCX, R.REGISTER_NAME_RDX),
            (0x40000005, 1, 2, 3),
            strict=True,
        )
    ]
    guest.filter(cpuid=True)
    assert guest.run(updates=answer) == "cpuid"
    assert guest.exit.registers.rbx == 1
    assert guest.exit.cpuid.leaf == 0
    assert guest.run(A.ACTION_COMMIT) == "hypercall"
    assert guest.exit.registers.rbx == int.from_bytes(b"Auth", "little")


def test_debug_registers_are_kept_and_never_armed(guest: Guest) -> None:
    guest.long_mode(
        "mov eax, 0x200000; mov dr0, rax; mov eax, 0x30403; mov dr7, rax; mov rbx, dr7; mov rax, [0x200000]; vmmcall"
    )
    assert guest.run() == "hypercall"
    assert guest.vector is None
    assert guest.exit.registers.rbx == 0x30403


@pytest.mark.parametrize("code", ["0f01d8", "0f01da", "0f01db", "0f01dc", "0f01dd", "0f01de", "0f01df"])
def test_virtualization_instructions_do_not_exist(guest: Guest, code: str) -> None:
    guest.long_mode(bytes.fromhex(code))
    guest.run()
    assert guest.vector == 6


@pytest.mark.parametrize("code", ["0f01c8", "0faa", "0f01c9"])  # MONITOR, RSM, MWAIT
def test_other_instructions_that_do_not_exist(guest: Guest, code: str) -> None:
    guest.long_mode(b"\x31\xc9" + bytes.fromhex(code))
    guest.run()
    assert guest.vector == 6


def test_task_priority_register(guest: Guest) -> None:
    guest.long_mode("mov eax, 5; mov cr8, rax; mov rbx, cr8; vmmcall")
    guest.run()
    assert guest.exit.registers.rbx == 5
    assert guest.exit.registers.cr8 == 5
    assert guest.platform.local_apic(0).tpr == 0x50


def test_state_round_trip(guest: Guest) -> None:
    guest.long_mode("mov r13, 77; vmmcall")
    guest.run()

    def state() -> registers_pb2.ProcessorState:
        present = guest.processor.state()
        counter = next(entry for entry in present.msrs if entry.index == Msr.TSC)
        present.msrs.remove(counter)
        return present

    before = state()
    guest.processor.load_state(before)
    assert state() == before
    assert before.registers.r13 == 77
    assert before.registers.rsp == STACK


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize(
    "code",
    ["0f22c0", "0f06", "0f01f0", "0f0110", "0f00c0", "0f30", "0fa2", "0f33", "cd80", "cc", "ec", "e680", "6f"],
)
def test_lock_prefix_is_undefined(guest: Guest, cpl: int, code: str) -> None:
    """The engine runs them without a look at the prefix; above CPL0 its own check of privilege may come first."""
    guest.long_mode(bytes.fromhex("f0" + code), cpl=cpl)
    assert guest.run() == "hypercall", guest.exit
    assert guest.vector == UNDEFINED_OPCODE or (cpl and guest.vector == GENERAL_PROTECTION)
    assert guest.frame(1 + (guest.vector == GENERAL_PROTECTION))[-1] == CODE
