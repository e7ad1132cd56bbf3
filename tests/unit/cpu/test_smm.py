"""System-management mode: SMI, the save area, RSM, SMRAM and its lock."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cpu.machine import CODE, DATA, A, Guest, assemble
from vtl0_guest.cpu.devices.system_management import ENABLE, LOCK, OPEN, SMRAM_ADDRESS, SmramControl
from vtl0_guest.cpu.smm import save_area
from vtlab.v1 import registers_pb2

BASE = 0x30000
HANDLER, AREA = BASE + 0x8000, BASE + save_area.OFFSET
CR0, CR3, CR4, EFER, SMBASE, RIP, RBX = 0x158, 0x150, 0x148, 0xD0, 0x100, 0x178, 0x1E0
SMI = "mov dx, 0x630; mov eax, 0x21; out dx, eax; mov al, 7; out 0xb2, al"


def smram(value: int) -> str:
    """Guest code that writes the SMRAM register."""
    return f"mov dx, 0xcf8; mov eax, {SMRAM_ADDRESS}; out dx, eax; mov dx, 0xcfd; mov al, {value}; out dx, al"


def handler(guest: Guest, code: str, at: int = HANDLER) -> None:
    guest.poke(at, assemble(code, 16, 0x8000))


def field(guest: Guest, offset: int, size: int = 8) -> int:
    return guest.peek(AREA + offset, size)


def test_smi_saves_the_state_and_rsm_brings_it_back(guest: Guest) -> None:
    handler(guest, f"inc dword ptr [{DATA}]; mov ebx, 0x5555; rsm")
    guest.long_mode(f"mov rbx, 0x1122334455667788; {SMI}; vmmcall")
    before = guest.processor.state().registers
    assert guest.run() == "hypercall"
    registers = guest.exit.registers
    assert guest.peek(DATA, 4) == 1
    assert registers.rbx == 0x1122334455667788
    assert (registers.cr0, registers.cr3, registers.cr4, registers.efer) == (
        before.cr0,
        before.cr3,
        before.cr4,
        before.efer,
    )
    assert registers.cs == before.cs
    assert field(guest, CR0) == before.cr0
    assert field(guest, EFER) == before.efer
    assert field(guest, RBX) == 0x1122334455667788
    assert field(guest, SMBASE, 4) == BASE
    assert not guest.processor.context.smm.active


def test_what_a_handler_finds(guest: Guest) -> None:
    handler(guest, "out 0x99, al; rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    assert guest.run() == "port"
    state = guest.processor.state()
    registers = guest.exit.registers
    assert registers.rflags == 2
    assert registers.rip == 0x8000
    assert (registers.cs.selector, registers.cs.base) == (BASE >> 4, BASE)
    assert registers.cr0 == 0x80010033 & ~0x8000000D  # PE, EM, TS and PG are off; WP is kept
    assert (registers.cr4, registers.efer) == (0, 0)
    assert (state.idtr.base, state.idtr.limit, state.debug[5]) == (0, 0, 0x400)
    assert registers.rax & 0xFF == 7
    assert guest.run(A.ACTION_SKIP) == "hypercall"


def test_rsm_outside_smm_is_an_undefined_opcode(guest: Guest) -> None:
    guest.long_mode(b"\x0f\xaa")
    guest.run()
    assert guest.vector == 6


def test_a_hypercall_inside_smm_is_an_undefined_opcode(guest: Guest) -> None:
    """There are no handlers inside, so it is a shutdown."""
    handler(guest, "mov eax, cr0; or al, 1; mov cr0, eax; vmmcall")
    guest.long_mode(f"{SMI}; vmmcall")
    assert guest.run() == "shutdown"


def test_no_smi_without_its_enable_bits(guest: Guest) -> None:
    guest.long_mode("mov al, 7; out 0xb2, al; vmmcall")
    assert guest.run() == "hypercall"
    assert guest.peek(AREA, save_area.SIZE) == 0


def test_rsm_loads_what_the_area_says(guest: Guest) -> None:
    wp = 1 << 16
    handler(guest, f"and dword ptr [{AREA + CR0}], {~wp & 0xFFFFFFFF}; rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    assert guest.run() == "hypercall"
    assert not guest.exit.registers.cr0 & wp


@pytest.mark.parametrize(
    ("offset", "value", "why"),
    [
        (CR0, 0x80000030, "PG without PE"),
        (CR0, 0x20000031, "NW without CD"),
        (CR4, 0x2220, "CR4 0x2220"),
        (CR4, 0x200, "PAE"),
        (EFER, 0x1D01, "EFER"),
    ],
)
def test_a_state_that_cannot_be_is_a_shutdown(guest: Guest, offset: int, value: int, why: str) -> None:
    handler(guest, f"mov dword ptr [{AREA + offset}], {value}; rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    assert guest.run() == "shutdown"
    assert why in guest.exit.shutdown.cause


def test_smbase_moves(guest: Guest) -> None:
    handler(guest, f"mov dword ptr [{AREA + SMBASE}], 0x50000; rsm")
    handler(guest, f"mov dword ptr [{DATA}], 5; rsm", at=0x58000)
    guest.long_mode(f"{SMI}; mov al, 8; out 0xb2, al; vmmcall")
    assert guest.run() == "hypercall"
    assert guest.peek(DATA, 4) == 5
    assert guest.peek(0x50000 + save_area.OFFSET + SMBASE, 4) == 0x50000


def test_smi_ends_hlt_and_rsm_goes_back_into_it(guest: Guest) -> None:
    handler(guest, f"inc dword ptr [{DATA}]; rsm")
    # Local APIC on, its timer's interrupt after the SMI that another message brought.
    icr = "mov ecx, 0x1b; rdmsr; or eax, 0x400; wrmsr; mov ecx, 0x80f; mov eax, 0x1ff; xor edx, edx; wrmsr"
    guest.long_mode(f"{icr}; mov ecx, 0x830; mov eax, 0x44200; xor edx, edx; wrmsr; hlt; vmmcall")
    assert guest.run() == "halt"
    assert guest.peek(DATA, 4) == 1


def test_an_smi_waits_while_smm_is_active_and_comes_after_it(guest: Guest) -> None:
    handler(guest, f"inc dword ptr [{DATA}]; cmp dword ptr [{DATA}], 1; jne done; out 0xb2, al; done: rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    assert guest.run() == "hypercall"
    assert guest.peek(DATA, 4) == 2


def test_nmi_and_init_wait_for_rsm(guest: Guest) -> None:
    handler(guest, f"out 0x99, al; mov eax, dword ptr [{DATA}]; mov dword ptr [{DATA + 4}], eax; rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    guest.poke(0x8000 + 16 * 2, assemble(f"mov edi, {DATA}; inc dword ptr [rdi]; iretq"))
    assert guest.run() == "port"
    nmi = A.Update(event=A.PendingEvent(nmi=True))
    assert guest.run(A.ACTION_SKIP, updates=[nmi]) == "hypercall"
    assert (guest.peek(DATA, 4), guest.peek(DATA + 4, 4)) == (1, 0)


# ---------------------------------------------------------------------------------------------------------- filters


def test_pins_are_suspended_inside_and_the_filter_is_back_outside(guest: Guest) -> None:
    handler(guest, "mov eax, cr0; and eax, 0xfffeffff; mov cr0, eax; mov eax, cr4; mov cr4, eax; rsm")
    guest.long_mode(f"{SMI}; mov rax, cr0; and eax, 0xfffeffff; mov cr0, rax; vmmcall")
    guest.filter(cr0_mask=1 << 16, cr4_mask=~0 & (1 << 64) - 1)
    assert guest.run() == "register_write"
    assert guest.exit.registers.cr0 & 1 << 16
    assert guest.exit.registers.rip > CODE


def test_the_nested_table_holds_inside(guest: Guest) -> None:
    handler(guest, f"mov dword ptr [{DATA}], 1; rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    guest.protect(DATA, access=A.PageAccess(read=True), store=A.PAGE_STORE_SEALED)
    assert guest.run() == "memory_fault"
    assert guest.exit.memory_fault.gpa == DATA
    assert guest.run(A.ACTION_DENY) == "shutdown"


def test_rsm_exits_where_it_is_watched(guest: Guest) -> None:
    handler(guest, f"and dword ptr [{AREA + CR0}], 0xfffeffff; mov dword ptr [{AREA + SMBASE}], 0x60000; rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    guest.filter(state_loads=True)
    assert guest.run() == "state_load"
    load = guest.exit.state_load
    assert load.cause == A.STATE_LOAD_CAUSE_RSM
    assert load.before.registers.cr0 & 1 << 16
    assert not load.state.registers.cr0 & 1 << 16
    assert (load.smbase_before, load.smbase) == (BASE, 0x60000)
    assert [msr.index for msr in load.state.msrs] == [msr.index for msr in load.before.msrs]
    # What is committed is what was judged.
    guest.poke(AREA + CR0, struct.pack("<Q", 0x80010011))
    assert guest.run(A.ACTION_COMMIT) == "hypercall"
    assert guest.exit.registers.cr0 == load.state.registers.cr0
    assert guest.processor.context.smm.base == 0x60000


@pytest.mark.parametrize("action", [A.ACTION_UNSPECIFIED, A.ACTION_DENY, A.ACTION_SKIP, A.ACTION_RETRY, 77])
def test_all_but_commit_is_a_shutdown(guest: Guest, action: A.Action.ValueType) -> None:
    handler(guest, "rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    guest.filter(state_loads=True)
    assert guest.run() == "state_load"
    assert guest.run(action) == "shutdown"
    assert guest.run(A.ACTION_COMMIT) == "shutdown"


def test_smis_can_be_dropped(guest: Guest) -> None:
    handler(guest, f"mov dword ptr [{DATA}], 1; rsm")
    guest.long_mode(f"{SMI}; vmmcall")
    guest.filter(no_smi=True)
    assert guest.run() == "hypercall"
    assert guest.peek(DATA, 4) == 0


def test_a_save_area_that_cannot_be_written_is_a_shutdown(guest: Guest) -> None:
    guest.long_mode(f"{SMI}; vmmcall")
    guest.protect(AREA & ~0xFFF, access=A.PageAccess(read=True), store=A.PAGE_STORE_SEALED)
    assert guest.run() == "shutdown"
    assert "save area" in guest.exit.shutdown.cause


# ------------------------------------------------------------------------------------------------------------ SMRAM

INSTALL = f"""
    {smram(OPEN | ENABLE)}
    mov edi, 0xa8000
    mov dword ptr [rdi], 0xaa0f        /* rsm */
    {smram(LOCK | ENABLE)}
"""


def test_smram_is_its_own_memory_and_closes(guest: Guest) -> None:
    guest.poke(0xA8000, b"below")
    guest.long_mode(f"{INSTALL}; mov rbx, qword ptr [rdi]; mov dword ptr [rdi + 4], 1; vmmcall")
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rbx == int.from_bytes(b"below", "little")
    assert bytes(guest.memory[0xA8000:0xA8008]) == b"belo\x01\0\0\0"


def test_a_lock_holds_until_reset(guest: Guest) -> None:
    guest.poke(0xA8000, b"below")
    guest.long_mode(f"{INSTALL}; {smram(OPEN | ENABLE)}; in al, dx; mov rbx, qword ptr [rdi]; vmmcall")
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax & 0xFF == LOCK | ENABLE | 2
    assert guest.exit.registers.rbx == int.from_bytes(b"below", "little")


def test_smram_shows_to_its_handler_and_protections_leave_it_alone(guest: Guest) -> None:
    handler(guest, f"mov dword ptr [{AREA + SMBASE}], 0xa0000; rsm")
    guest.long_mode(
        f"{INSTALL}; {SMI}; mov al, 8; out 0xb2, al; mov edi, 0xafe00 + 0x158; mov rbx, qword ptr [rdi]; vmmcall"
    )
    guest.filter(state_loads=True)
    guest.protect(0xA0000, 0x20, access=A.PageAccess(read=True, write=True))
    assert guest.run() == "state_load"
    assert guest.run(A.ACTION_COMMIT) == "state_load"
    assert guest.exit.registers.cs.base == 0xA0000
    # A protection that comes now is for the memory below.
    seal = A.ProtectionUpdate(runs=[0xA0, 0x20], access=A.PageAccess(read=True), store=A.PAGE_STORE_SEALED)
    assert guest.run(A.ACTION_COMMIT, updates=[A.Update(protection=seal)]) == "hypercall"
    assert guest.exit.registers.rbx == 0
    assert not any(guest.memory[0xA0000:0xC0000])
    guest.core.show_smram(guest.processor.context)
    assert not guest.core.nested.entry(0xA8) & 2


@given(st.lists(st.integers(0, 255), max_size=20))
def test_a_locked_register_does_not_change(writes: list[int]) -> None:
    register = SmramControl()
    register.write(0xCF8, 4, SMRAM_ADDRESS)
    for value in writes:
        before = register.value
        register.write(0xCFD, 1, value)
        assert not (register.value & LOCK and register.value & OPEN)
        if before & LOCK:
            assert register.value == before
    assert register.read(0xCFD, 1) == register.value


def test_there_is_no_host_bridge_to_find() -> None:
    register = SmramControl()
    for offset in range(0, 256, 4):
        register.write(0xCF8, 4, 0x8000_0000 | offset)
        assert (register.read(0xCFC, 4) == 0xFFFF_FFFF) == (offset != SMRAM_ADDRESS & 0xFF)


# -------------------------------------------------------------------------------------------------------- save area

WORD = st.integers(0, 2**64 - 1)
SEGMENT = st.builds(
    registers_pb2.Segment,
    selector=st.integers(0, 0xFFFF),
    attributes=st.integers(0, 0xFFFF).map(lambda value: value & 0xF0FF),
    limit=st.integers(0, 2**32 - 1),
    base=WORD,
)
TABLE = st.builds(registers_pb2.TableRegister, base=WORD, limit=st.integers(0, 0xFFFF))
NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
REGISTERS = st.builds(
    registers_pb2.Registers,
    **dict.fromkeys((*NAMES, "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer"), WORD),
    **dict.fromkeys(("cs", "ss", "ds"), SEGMENT),
    cr8=st.integers(0, 15),
    interrupt_shadow=st.booleans(),
)
STATES = st.builds(
    registers_pb2.ProcessorState,
    registers=REGISTERS,
    **dict.fromkeys(("es", "fs", "gs", "ldtr", "tr"), SEGMENT),
    **dict.fromkeys(("gdtr", "idtr"), TABLE),
    xcr0=WORD,
    debug=st.lists(WORD, min_size=6, max_size=6),
)


@given(STATES, st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_the_save_area_keeps_everything(
    state: registers_pb2.ProcessorState, smbase: int, halted: bool, nmi_blocked: bool
) -> None:
    saved = save_area.Saved(state, smbase, halted, nmi_blocked)
    area = save_area.pack(saved)
    assert len(area) == save_area.SIZE
    assert save_area.unpack(area, state) == saved


@given(st.binary(min_size=save_area.SIZE, max_size=save_area.SIZE))
def test_any_bytes_are_some_state(area: bytes) -> None:
    present = registers_pb2.ProcessorState(debug=[0] * 6)
    found = save_area.unpack(area, present)
    assert save_area.unpack(save_area.pack(found), present) == found
