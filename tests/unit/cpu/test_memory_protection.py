"""Rights of the nested table: what exits, with which addresses, and what each decision does."""

from __future__ import annotations

import struct

import pytest

from tests.unit.cpu.machine import (
    CODE,
    DATA,
    IDT,
    KERNEL_STACK,
    PML4,
    PT,
    RAM_SIZE,
    STACK,
    A,
    Guest,
    assemble,
)
from vtl0_guest.cpu import nested
from vtlab import errors
from vtlab.ram import RamFile
from vtlab.v1 import registers_pb2

READ_ONLY = A.PageAccess(read=True, kernel_execute=True, user_execute=True)
NO_EXECUTE = A.PageAccess(read=True, write=True)
NOTHING = A.PageAccess()
KERNEL_ONLY = A.PageAccess(read=True, write=True, kernel_execute=True)
USER_ONLY = A.PageAccess(read=True, write=True, user_execute=True)
TABLES = A.PageAccess(read=True, page_table=True)


def update(address: int, access: A.PageAccess, store: A.PageStore.ValueType = A.PAGE_STORE_WRITABLE) -> A.Update:
    return A.Update(protection=A.ProtectionUpdate(runs=[address >> 12, 1], access=access, store=store))


def seal(guest: Guest, address: int, access: A.PageAccess = READ_ONLY) -> None:
    """Copies a page to the sealed file, as the machine does, and points the guest at it."""
    page = address & ~0xFFF
    path = guest.directory / RamFile.SEALED.value
    with path.open("r+b") as file:
        file.seek(page)
        file.write(guest.memory[page : page + 4096])
    guest.protect(page, access=access, store=A.PAGE_STORE_SEALED)


def test_store_to_a_sealed_page(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200008; mov rax, 0x1122334455667788; mov [rbx + 8], rax; vmmcall")
    seal(guest, DATA)
    assert guest.run() == "memory_fault"
    fault = guest.exit.memory_fault
    assert (fault.gpa, fault.gva, fault.access) == (DATA + 16, DATA + 16, A.ACCESS_KIND_WRITE)
    assert fault.data == bytes.fromhex("8877665544332211")
    assert not fault.page_walk
    assert not fault.unmapped
    assert guest.exit.instruction == assemble("mov [rbx + 8], rax")
    assert guest.exit.registers.rip == CODE + len(assemble("mov ebx, 0x200008; mov rax, 0x1122334455667788"))
    assert guest.run(A.ACTION_SKIP) == "hypercall"
    assert guest.peek(DATA + 16) == 0


def test_retry_after_the_right_is_given(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200008; mov dword ptr [rbx], 0x55; vmmcall")
    guest.protect(DATA, access=READ_ONLY)
    assert guest.run() == "memory_fault"
    assert guest.run(A.ACTION_RETRY, updates=[update(DATA, A.PageAccess(read=True, write=True))]) == "hypercall"
    assert guest.peek(DATA + 8, 4) == 0x55


def test_commit_stores_the_judged_bytes_without_giving_the_right(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200008; mov dword ptr [rbx], 0x55; mov dword ptr [rbx], 0x66; vmmcall")
    guest.protect(DATA, access=READ_ONLY)
    assert guest.run() == "memory_fault"
    assert guest.run(A.ACTION_COMMIT) == "memory_fault"
    assert guest.peek(DATA + 8, 4) == 0x55
    assert guest.exit.memory_fault.data == b"\x66\0\0\0"


def test_commit_to_a_sealed_page_needs_the_bytes_to_be_there(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200008; mov dword ptr [rbx], 0x55; vmmcall")
    seal(guest, DATA)
    assert guest.run() == "memory_fault"
    with (guest.directory / RamFile.SEALED.value).open("r+b") as file:
        file.seek(DATA + 8)
        file.write(b"\x55\0\0\0")
    assert guest.run(A.ACTION_COMMIT) == "hypercall"
    guest.long_mode("mov ebx, 0x200008; mov dword ptr [rbx], 0x77; vmmcall")
    assert guest.run() == "memory_fault"
    assert guest.run(A.ACTION_COMMIT) == "failure"


def test_denied_store_is_general_protection(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200008; mov dword ptr [rbx], 0x55; vmmcall")
    guest.protect(DATA, access=READ_ONLY)
    guest.run()
    guest.run(A.ACTION_DENY)
    assert guest.vector == 13
    assert guest.peek(DATA + 8, 4) == 0


@pytest.mark.parametrize(
    ("code", "address"),
    [
        ("inc qword ptr [rbx]", DATA),
        ("lock xadd [rbx], rax", DATA),
        ("push rax", STACK - 8),
        ("call rbx", STACK - 8),
        ("mov edi, 0x200010; stosq", DATA + 16),
        ("movups [rbx], xmm0", DATA),
        ("fxsave [rbx]", DATA),
        ("sgdt [rbx]", DATA),
        ("mov esi, 0x100000; mov edi, 0x200ff8; mov ecx, 4; rep movsq", DATA + 0xFF8),
    ],
)
def test_all_kinds_of_stores(guest: Guest, code: str, address: int) -> None:
    guest.long_mode("mov ebx, 0x200000; " + code + "; vmmcall")
    guest.protect(address, access=READ_ONLY)
    assert guest.run() == "memory_fault"
    fault = guest.exit.memory_fault
    assert (fault.gpa, fault.gva, fault.access) == (address, address, A.ACCESS_KIND_WRITE)


def test_store_across_pages_reports_the_page_that_refuses(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200ffc; mov rax, -1; mov [rbx], rax; vmmcall")
    guest.protect(DATA + 0x1000, access=READ_ONLY)
    assert guest.run() == "memory_fault"
    assert guest.exit.memory_fault.gpa >> 12 == (DATA >> 12) + 1
    guest.run(A.ACTION_DENY)
    assert guest.peek(DATA + 0xFF8) == 0, "nothing was written"


def test_absent_page(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200000; movzx eax, word ptr [rbx + 2]; vmmcall")
    guest.protect(DATA, access=NOTHING)
    assert guest.run() == "memory_fault"
    assert guest.exit.memory_fault.access == A.ACCESS_KIND_READ
    assert not guest.exit.memory_fault.unmapped
    assert guest.run(A.ACTION_COMPLETE, value=0x12345678) == "hypercall"
    assert guest.exit.registers.rax == 0x5678


def test_unmapped_physical_address(guest: Guest) -> None:
    guest.long_mode(
        "mov eax, dword ptr [0x1f0000]; mov dword ptr [0x1f0008], 7; movsx ecx, byte ptr [0x1f0001]; vmmcall"
    )
    guest.poke(PT + 8 * 0x1F0, struct.pack("<Q", 0xD0000003))
    assert guest.run() == "memory_fault"
    fault = guest.exit.memory_fault
    assert (fault.gpa, fault.gva, fault.unmapped) == (0xD0000000, 0x1F0000, True)
    assert guest.run(A.ACTION_COMPLETE, value=0x99) == "memory_fault"
    assert guest.exit.registers.rax == 0x99
    fault = guest.exit.memory_fault
    assert (fault.gpa, fault.access, fault.data) == (0xD0000008, A.ACCESS_KIND_WRITE, b"\x07\0\0\0")
    assert guest.run(A.ACTION_COMPLETE) == "memory_fault"
    assert guest.run(A.ACTION_COMPLETE, value=0x80) == "hypercall"
    assert guest.exit.registers.rcx == 0xFFFFFF80


def test_load_that_cannot_be_finished_stops_the_processor(guest: Guest) -> None:
    guest.long_mode("add eax, dword ptr [0x1f0000]; vmmcall")
    guest.poke(PT + 8 * 0x1F0, struct.pack("<Q", 0xD0000003))
    guest.run()
    assert guest.run(A.ACTION_COMPLETE, value=1) == "failure"


def test_no_execute(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200010; call rbx; vmmcall")
    guest.poke(DATA + 16, assemble("mov eax, 5; ret"))
    guest.protect(DATA, access=NO_EXECUTE)
    assert guest.run() == "memory_fault"
    fault = guest.exit.memory_fault
    assert (fault.gpa, fault.gva, fault.access) == (DATA + 16, DATA + 16, A.ACCESS_KIND_EXECUTE)
    assert guest.exit.registers.rip == DATA + 16
    give = update(DATA, A.PageAccess(read=True, kernel_execute=True, user_execute=True))
    assert guest.run(A.ACTION_RETRY, updates=[give]) == "hypercall"
    assert guest.exit.registers.rax == 5


def test_execution_that_runs_into_a_page_without_the_right(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200ffe; jmp rbx")
    guest.poke(DATA + 0xFFE, b"\x90\xb8\x01\0\0\0\x0f\x01\xd9")
    guest.protect(DATA + 0x1000, access=NO_EXECUTE)
    assert guest.run() == "memory_fault"
    assert guest.exit.memory_fault.access == A.ACCESS_KIND_EXECUTE
    assert guest.exit.memory_fault.gpa >> 12 == (DATA >> 12) + 1


def test_right_that_is_taken_from_code_that_has_run(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200000; l: call rbx; vmmcall; jmp l")
    guest.poke(DATA, assemble("inc eax; ret"))
    assert guest.run() == "hypercall"
    assert guest.run(value=0, updates=[update(DATA, NO_EXECUTE)]) == "memory_fault"
    assert guest.exit.memory_fault.gpa == DATA


def test_page_tables_in_pages_without_execute_right(guest: Guest) -> None:
    """The engine's own walk of such pages would end the process; see engine_fixes.py."""
    guest.long_mode("mov rax, [0x300000]; vmmcall")
    guest.protect(PML4, 4, access=NO_EXECUTE)
    assert guest.run() == "hypercall"


def test_walk_refused_by_the_nested_table(guest: Guest) -> None:
    guest.long_mode("mov rax, [0x1f0000]; vmmcall")
    guest.run()
    guest.long_mode("mov rax, [0x300000]; vmmcall")
    guest.poke(0x11000, struct.pack("<Q", 0x250007))
    guest.poke(0x250000, guest.memory[0x12000:0x13000])
    guest.protect(0x250000, access=READ_ONLY)
    assert guest.run() == "memory_fault"
    fault = guest.exit.memory_fault
    assert fault.page_walk
    assert fault.gpa >> 12 == 0x250


def _preset(guest: Guest) -> None:
    """A and D in every entry of the tables, as whoever guards tables sets them."""
    for table in (PML4, 0x11000, 0x12000, PT):
        for number in range(512):
            entry = guest.peek(table + 8 * number)
            if entry & 1:
                guest.poke(table + 8 * number, struct.pack("<Q", entry | 0x60))


def test_guarded_page_tables(guest: Guest) -> None:
    guest.long_mode("mov rax, [0x300000]; mov ebx, 0x13f80; mov qword ptr [rbx], 0x1f0063; mov ecx, 9; vmmcall")
    _preset(guest)
    for table in (PML4, 0x11000, 0x12000, PT):
        seal(guest, table, TABLES)
    assert guest.run() == "memory_fault"
    fault = guest.exit.memory_fault
    assert (fault.gpa, fault.gva, fault.access) == (0x13F80, 0x13F80, A.ACCESS_KIND_WRITE)
    assert fault.data == struct.pack("<Q", 0x1F0063)
    assert not fault.page_walk
    assert guest.run(A.ACTION_SKIP) == "hypercall"
    assert guest.exit.registers.rcx == 9


def test_guarded_page_tables_without_accessed_bits_do_not_end_the_process(guest: Guest) -> None:
    guest.long_mode("mov rax, [0x300000]; mov qword ptr [0x300000], rax; vmmcall")
    for table in (PML4, 0x11000, 0x12000, PT):
        seal(guest, table, TABLES)
    assert guest.run() in ("hypercall", "memory_fault", "failure")


def test_read_modify_write_of_a_guarded_table(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x13f80; lock or qword ptr [rbx], 2; vmmcall")
    _preset(guest)
    seal(guest, PT, TABLES)
    before = guest.peek(0x13F80)
    assert guest.run() == "memory_fault"
    assert guest.exit.memory_fault.gpa == 0x13F80
    guest.run(A.ACTION_DENY)
    assert guest.vector == 13
    assert guest.peek(0x13F80) == before


def test_mode_based_execution(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200000; call rbx; vmmcall")
    guest.poke(DATA, assemble("inc eax; ret"))
    guest.protect(DATA, access=USER_ONLY)
    assert guest.run() == "memory_fault", "the kernel may not run it"
    assert guest.exit.memory_fault.gpa == DATA
    user = "mov ebx, 0x200000; call rbx; mov ebx, 0x201000; call rbx; int 0x80"
    guest.long_mode(user, cpl=3)
    guest.poke(DATA, assemble("inc eax; ret"))
    guest.poke(DATA + 0x1000, assemble("inc eax; ret"))
    guest.protect(DATA, access=USER_ONLY)
    guest.protect(DATA + 0x1000, access=KERNEL_ONLY)
    assert guest.run() == "memory_fault", "user mode may not run kernel pages"
    assert guest.exit.registers.cpl == 3
    assert guest.exit.memory_fault.gpa == DATA + 0x1000
    assert guest.exit.registers.rax == 1


def test_mode_based_execution_across_privilege_changes(guest: Guest) -> None:
    guest.long_mode("l: int 0x80; inc ecx; cmp ecx, 50; jne l; ud2", cpl=3)
    guest.poke(0x8000 + 16 * 0x80, bytes.fromhex("48ffc0 48cf"))  # inc rax; iretq
    for page in range(8, 10):
        guest.protect(page << 12, access=KERNEL_ONLY)
    guest.protect(CODE, access=USER_ONLY)
    guest.run()
    assert guest.vector == 6
    assert guest.exit.registers.rax == 50


def test_kernel_cannot_return_into_a_user_page_at_its_own_level(guest: Guest) -> None:
    """After user mode has run there, the kernel's jump to the same page must still fault."""
    guest.long_mode("int 0x80", cpl=3)
    guest.poke(0x8000 + 16 * 0x80, bytes.fromhex("48c7c300001000") + b"\xff\xe3")  # mov rbx, CODE; jmp rbx
    guest.protect(CODE, access=USER_ONLY)
    assert guest.run() == "memory_fault"
    assert (guest.exit.memory_fault.gpa, guest.exit.registers.cpl) == (CODE, 0)


def test_frames_of_exceptions_obey_the_nested_table(guest: Guest) -> None:
    guest.long_mode("int 0x80; nop", cpl=3)
    guest.protect(KERNEL_STACK - 0x1000, access=READ_ONLY)
    assert guest.run() == "memory_fault"
    fault = guest.exit.memory_fault
    assert fault.access == A.ACCESS_KIND_WRITE
    assert fault.gpa >> 12 == (KERNEL_STACK - 1) >> 12
    assert guest.exit.registers.rip == CODE, "nothing has happened yet"
    give = update(KERNEL_STACK - 0x1000, A.PageAccess(read=True, write=True))
    guest.run(A.ACTION_RETRY, updates=[give])
    assert guest.vector == 0x80


def test_refused_frame_of_a_fault_can_become_a_double_fault(guest: Guest) -> None:
    guest.long_mode("mov rax, [0x50000000]")
    guest.poke(IDT + 16 * 14, struct.pack("<QQ", 0x80E0 | 0x8E01 << 32 | 8 << 16, 0))
    guest.poke(0x7000 + 36, struct.pack("<Q", 0x155000))
    guest.protect(0x154000, access=READ_ONLY)
    assert guest.run() == "memory_fault"
    guest.run(A.ACTION_DENY)
    assert guest.vector == 8


def test_code_that_somebody_else_changes(guest: Guest) -> None:
    guest.long_mode("mov ebx, 0x200000; l: call rbx; vmmcall; jmp l")
    guest.poke(DATA, assemble("mov eax, 1; ret"))
    guest.run()
    assert guest.exit.registers.rax == 1
    guest.poke(DATA, assemble("mov eax, 2; ret"))
    invalidate = A.Update(invalidate_code=A.InvalidateCode(gfns=[DATA >> 12]))
    guest.run(updates=[invalidate])
    assert guest.exit.registers.rax == 2
    guest.poke(DATA, assemble("mov eax, 3; ret"))
    guest.run(updates=[A.Update(invalidate_code=A.InvalidateCode())])
    assert guest.exit.registers.rax == 3


def test_guest_that_changes_its_own_code(guest: Guest) -> None:
    guest.long_mode("""mov ebx, 0x200000; call rbx; mov byte ptr [rbx + 1], 7; call rbx; vmmcall""")
    guest.poke(DATA, assemble("mov eax, 1; ret"))
    guest.run()
    assert guest.exit.registers.rax == 7


def test_code_in_the_page_that_a_frame_is_written_to(guest: Guest) -> None:
    guest.long_mode("mov rsp, 0x200030; mov ebx, 0x200000; call rbx; int3")
    guest.poke(DATA, assemble("mov eax, 1; ret"))
    guest.run()
    assert guest.vector == 3
    assert guest.frame(1)[0] == CODE + len(assemble("mov rsp, 0x200030; mov ebx, 0x200000; call rbx; int3"))


def test_hypercall_page(guest: Guest) -> None:
    guest.long_mode("mov ecx, 0x11; mov ebx, 0x200000; call rbx; mov ecx, 0; add ebx, 0xf; call rbx; mov [rbx], al")
    page = A.Update(hypercall_page=A.HypercallPage(enabled=True, gfn=DATA >> 12))
    assert guest.run(updates=[page]) == "hypercall"
    assert guest.exit.registers.rip == DATA
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rip == DATA + 0x0F + 8
    assert (guest.exit.registers.rcx, guest.exit.registers.rax) == (0x11, 0)
    assert guest.run(A.ACTION_SKIP) == "hypercall"
    assert guest.vector == 13, "nobody may write it"
    guest.long_mode("mov al, [0x200000]; mov byte ptr [0x200000], 1; vmmcall")
    guest.poke(DATA, b"\x99")
    off = A.Update(hypercall_page=A.HypercallPage())
    assert guest.run(updates=[off]) == "hypercall"
    assert guest.exit.registers.rax & 0xFF == 0x99
    assert guest.peek(DATA, 1) == 1


def test_bad_updates_name_the_field(guest: Guest) -> None:
    guest.long_mode("vmmcall")
    pages = RAM_SIZE >> 12
    with pytest.raises(errors.BadArgument, match="runs"):
        guest.core.protect(A.ProtectionUpdate(runs=[pages - 1, 2], access=READ_ONLY, store=A.PAGE_STORE_WRITABLE))
    with pytest.raises(errors.BadArgument, match="store"):
        guest.protect(0, access=READ_ONLY, store=A.PAGE_STORE_PRIVATE)
    with pytest.raises(errors.BadArgument, match="cannot be written"):
        guest.protect(0, access=A.PageAccess(read=True, write=True), store=A.PAGE_STORE_SEALED)
    with pytest.raises(errors.BadArgument, match="hypercall page"):
        guest.run(updates=[A.Update(hypercall_page=A.HypercallPage(enabled=True, gfn=pages))])
    assert guest.run() == "hypercall"


def test_code_that_is_mapped_elsewhere_is_decoded_there(guest: Guest) -> None:
    """The place of code is remembered between exits: a changed entry must be noticed, at every level."""
    guest.long_mode("l: mov eax, 0x1f0000; call rax; jmp l")
    for page, value in ((0x1C0, 1), (0x1D0, 2)):
        guest.poke(page << 12, assemble(f"mov ebx, {value}; cpuid; mov ecx, {value}; vmmcall; ret"))
    guest.poke(0x1D0000, bytes.fromhex("0f01d9c3"))
    guest.poke(PT + 8 * 0x1F0, struct.pack("<Q", 0x1C0003))
    guest.run()
    assert guest.exit.instruction == bytes.fromhex("0f01d9")
    assert guest.exit.registers.rip != 0x1F0000
    guest.poke(PT + 8 * 0x1F0, struct.pack("<Q", 0x1D0003))
    guest.processor.context.engine.flush_page(0x1F0000)
    guest.run()
    assert guest.exit.registers.rip == 0x1F0000
    assert guest.exit.instruction == bytes.fromhex("0f01d9")


def test_store_to_a_page_that_has_held_data_and_then_code(guest: Guest) -> None:
    """Stores to data pages take the fast path; once code of the page has run they must be noticed again."""
    guest.long_mode(
        """mov ebx, 0x200000; mov ecx, 1000
        l: mov qword ptr [rbx + 0x800], rcx; dec ecx; jnz l
        call rbx; mov byte ptr [rbx + 1], 9; call rbx; vmmcall"""
    )
    guest.poke(DATA, assemble("mov eax, 1; ret"))
    guest.run()
    assert guest.exit.registers.rax == 9


@pytest.mark.parametrize("base", [nested.HIDDEN_BASE, nested.NESTED_BASE, nested.SEALED_BASE, nested.EXTRA_BASE])
def test_the_cores_own_structures_have_no_guest_address(guest: Guest, base: int) -> None:
    guest.long_mode("mov rax, [0x1f0000]; mov qword ptr [0x1f0008], -1; vmmcall")
    guest.poke(PT + 8 * 0x1F0, struct.pack("<Q", base | 3))
    assert guest.run() == "memory_fault"
    assert (guest.exit.memory_fault.gpa, guest.exit.memory_fault.unmapped) == (base, True)
    assert guest.run(A.ACTION_SKIP) == "memory_fault"
    assert guest.exit.memory_fault.gpa == base + 8


def test_page_table_root_in_the_cores_own_structures(guest: Guest) -> None:
    guest.long_mode("mov rax, 0x1000000000; mov cr3, rax; nop")
    assert guest.run() == "memory_fault"
    assert guest.exit.memory_fault.page_walk
    assert guest.exit.memory_fault.unmapped


def test_a_block_that_reaches_into_a_page_that_loses_its_execute_right(guest: Guest) -> None:
    """Blocks of one page are chained, also to one that runs on into the next page: it must not be entered any more."""
    page = 0x260000
    start = page + 0xFFC
    guest.poke(page, assemble(f"l: inc ebx; cmp ebx, 1; jne {start}; jmp {start}", at=page))
    guest.poke(start, assemble("nop; nop; nop; nop; nop; nop; mov eax, 7; vmmcall", at=start))
    guest.long_mode(f"xor ebx, ebx; mov eax, {page}; jmp rax")
    assert guest.run() == "hypercall"
    again = registers_pb2.RegisterValue(name=registers_pb2.REGISTER_NAME_RIP, value=page)
    for _ in range(3):  # the blocks are chained by now
        assert guest.run(updates=[A.Update(register=again)]) == "hypercall"
    guest.protect(page + 0x1000, access=A.PageAccess(read=True, write=True))
    guest.run(updates=[A.Update(register=again)])
    assert guest.exit.memory_fault.access == A.ACCESS_KIND_EXECUTE
    assert guest.exit.memory_fault.gpa >> 12 == (page >> 12) + 1
