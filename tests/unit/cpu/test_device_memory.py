"""Every kind of instruction on device registers in memory does what it does on memory."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.unit.cpu.machine import CODE, DATA, PD, RAM_SIZE, Guest, assemble
from vtl0_guest.cpu.devices.bus import Guard
from vtl0_guest.cpu.devices.local_apic import DEFAULT_BASE
from vtl0_guest.cpu.devices.test_memory import BASE, SIZE, pages
from vtlab.ram import Ram, create_ram_files
from vtlab.v1 import registers_pb2, vcpu_pb2
from vtlab.x86.registers import Rflags

DEVICE = 0x400000  # where the guest maps it
ABSENT = 0x600000  # where it maps what does not exist
NOWHERE = 0xE000_0000
CONTENT = bytes(range(0x11, 0x51))
# What the test of the suite does to such memory, and more; rbx points to it, rdx to RAM with the same content.
INSTRUCTIONS = [
    *(f"{name} dword ptr [rbx], eax" for name in ("or", "and", "xor", "add", "sub", "adc", "sbb", "cmp", "test")),
    *(f"{name} byte ptr [rbx + 3], r9b" for name in ("or", "and", "add", "mov", "xchg", "xadd", "cmpxchg")),
    *(f"lock {name} qword ptr [rbx + 8], rcx" for name in ("or", "add", "xadd", "cmpxchg", "sub")),
    *(f"{name} word ptr [rbx + 2]" for name in ("inc", "dec", "neg", "not", "lock inc", "mul", "imul")),
    *(
        f"{name} dword ptr [rbx + 4], 5"
        for name in ("rol", "ror", "shl", "shr", "sar", "rcl", "btc", "bts", "btr", "bt")
    ),
    *(f"mov ecx, {bit}; btc dword ptr [rbx + 8], ecx" for bit in (3, 70, -33)),
    *(
        "bsf ax, word ptr [rbx]",
        "bsr rax, qword ptr [rbx]",
        "popcnt eax, dword ptr [rbx]",
        "movbe eax, dword ptr [rbx]",
    ),
    *("shld dword ptr [rbx], eax, 3", "shrd qword ptr [rbx], rax, cl", "imul rax, qword ptr [rbx], 0x137"),
    *("cmovne eax, dword ptr [rbx]", "setb byte ptr [rbx]", "movzx eax, word ptr [rbx]", "movsx rax, byte ptr [rbx]"),
    *("push qword ptr [rbx]; pop rax", "push rax; pop qword ptr [rbx]", "mov byte ptr [rbx], sil", "mov [rbx], r15b"),
    *("mov [rbx], ah", "mov dil, [rbx]", "xchg [rbx], r8", "mov [rbx], ds", "cmpxchg16b [rbx]", "cmpxchg8b [rbx]"),
    *("mov rdi, rbx; cld; stosb; stosq", "mov rdi, rbx; mov ecx, 5; cld; rep stosw"),
    *("mov rsi, rbx; std; lodsd", "mov rsi, rdx; mov rdi, rbx; mov ecx, 9; cld; rep movsb"),
    *("mov rsi, rbx; lea rdi, [rbx + 32]; mov ecx, 3; cld; rep movsq", "mov rsi, rbx; mov rdi, rdx; cld; movsq"),
    *(
        "mov rsi, rbx; mov rdi, rdx; mov ecx, 64; cld; repe cmpsb",
        "mov rdi, rbx; mov al, 0x14; mov ecx, 9; cld; repne scasb",
    ),
    *(
        "movdqu xmm0, [rbx + 1]; movdqu [rbx + 17], xmm0",
        "movaps xmm0, [rbx]; paddq xmm0, [rbx + 16]; movups [rbx], xmm0",
    ),
    *(
        "movq xmm1, [rbx]; movq [rbx + 8], xmm1; movd mm0, [rbx]; movq [rbx + 16], mm0; emms",
        "cvtsi2sd xmm0, dword ptr [rbx]",
    ),
    *("fild qword ptr [rbx]; fistp qword ptr [rbx + 8]", "fld qword ptr [rbx]; fstp dword ptr [rbx]"),
    *("smsw word ptr [rbx]", "sidt [rbx]", "sgdt [rbx]", "sldt word ptr [rbx]", "str word ptr [rbx]"),
    *("lea rax, [rbx + 0x10]; xlatb", "lea r8, [rbx - 8]; inc dword ptr [r8 + r10 * 8]"),
    *("mov rdi, rbx; mov dx, 0xe0; cld; insb", "mov rsi, rbx; mov dx, 0xe0; cld; outsb"),
    *("fxsave [rbx + 16]; mov eax, [rbx + 16]", "stmxcsr [rbx]; fnstcw [rbx + 4]; ldmxcsr [rbx]"),
]


class Spy:
    """A page of registers that notes every access."""

    def __init__(self) -> None:
        self.accesses: list[tuple[str, int, int, int]] = []

    def mmio_read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size, 0))
        return 0x0102_0304_0506_0708 & (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


def prepare(guest: Guest, code: str, at: int) -> None:
    """Runs to the code with known registers; RBX points to memory at `at`."""
    registers = "; ".join(f"mov {name}, {value:#x}" for name, value in REGISTERS.items())
    guest.long_mode(
        f"{registers}; mov rbx, {at:#x}; mov rdx, {DATA + 0x1000:#x}; stc; {code}; pushfq; pop rbp; vmmcall"
    )
    map_devices(guest)
    guest.poke(DATA, CONTENT + bytes(1024))
    guest.poke(DATA + 0x1000, CONTENT)
    for offset, value in enumerate(CONTENT):
        guest.platform.mmio[BASE].mmio_write(offset, 1, value)


def map_devices(guest: Guest) -> None:
    for linear, physical in ((DEVICE, BASE), (ABSENT, NOWHERE), (0x800000, DEFAULT_BASE)):
        guest.poke(PD + 8 * (linear >> 21), struct.pack("<Q", physical | 0x83))


REGISTERS = {
    "rax": 0x8877_6655_4433_2211,
    "rcx": 0x0102_0304_0506_0703,
    "rsi": 0x1111_1111_1111_11A6,
    "rdi": 0x1111_1111_1111_11A7,
    "r8": 0x1111_1111_1111_11A8,
    "r9": 0x1111_1111_1111_11A9,
    "r10": 1,
    "r15": 0x1111_1111_1111_11AF,
}


def state(guest: Guest, at: int) -> list[object]:
    """All that an instruction may change; pointers into the memory relative to it."""
    registers = guest.exit.registers
    names = ("rax", "rcx", "rsi", "rdi", "r8", "r9", "r15", "rsp", "rip")
    values: list[object] = [getattr(registers, name) for name in names]
    values = [value - at if isinstance(value, int) and -64 <= value - at < 0x1000 else value for value in values]
    context = guest.processor.context
    return [*values, registers.rbp, context.engine.vectors.save(), bytes(guest.memory[DATA + 0x1000 : DATA + 0x1040])]


@pytest.mark.parametrize("code", INSTRUCTIONS)
def test_an_instruction_does_the_same_on_registers_as_on_memory(tmp_path: Path, code: str) -> None:
    results = []
    for at in (DATA, DEVICE):
        folder = tmp_path / f"{at:x}"
        folder.mkdir()
        create_ram_files(folder, RAM_SIZE)
        with Ram(folder, RAM_SIZE, "vtl0") as ram:
            guest = Guest(ram, folder)
            prepare(guest, code, at)
            reason = guest.run()
            while reason == "port":
                reason = guest.run(value=0x5A)
            assert (reason, guest.vector) == ("hypercall", None), guest.exit
            device = guest.platform.mmio[BASE]
            memory = bytes(guest.memory[DATA : DATA + 0x240])
            if at == DEVICE:
                assert memory[: len(CONTENT)] == CONTENT
                memory = b"".join(device.mmio_read(offset, 8).to_bytes(8, "little") for offset in range(0, 0x240, 8))
            results.append([*state(guest, at), memory])
            guest.close()
    assert results[0] == results[1]


@pytest.fixture
def spied(guest: Guest) -> tuple[Guest, Spy]:
    spy = Spy()
    guest.platform.mmio[BASE] = spy
    return guest, spy


@pytest.mark.parametrize(
    ("code", "accesses"),
    [
        ("or dword ptr [rbx + 8], 1", [("read", 8, 4, 0), ("write", 8, 4, 0x0506_0709)]),
        ("inc byte ptr [rbx]", [("read", 0, 1, 0), ("write", 0, 1, 9)]),
        ("cmp qword ptr [rbx + 8], 0", [("read", 8, 8, 0)]),
        ("mov byte ptr [rbx + 5], 7", [("write", 5, 1, 7)]),
        ("movups xmm0, [rbx + 16]", [("read", 16, 8, 0), ("read", 24, 8, 0)]),
        ("xorps xmm0, xmm0; movups [rbx + 4], xmm0", [("write", 4, 4, 0), ("write", 8, 8, 0), ("write", 16, 4, 0)]),
        ("mov ax, [rbx + 0xffe]", [("read", 0xFFE, 2, 0)]),
    ],
)
def test_each_register_is_accessed_once(
    spied: tuple[Guest, Spy], code: str, accesses: list[tuple[str, int, int, int]]
) -> None:
    guest, spy = spied
    guest.long_mode(f"mov rbx, {DEVICE:#x}; {code}; vmmcall")
    map_devices(guest)
    assert guest.run() == "hypercall"
    assert spy.accesses == accesses


def test_an_access_may_cross_into_the_next_page(spied: tuple[Guest, Spy]) -> None:
    guest, spy = spied
    guest.long_mode(f"mov rbx, {DEVICE + 0xFFE:#x}; mov eax, [rbx]; mov dword ptr [rbx], 0x44332211; vmmcall")
    map_devices(guest)
    guest.platform.mmio[BASE + 0x1000].mmio_write(0, 2, 0xAABB)
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 0xAABB_0708
    assert spy.accesses == [("read", 0xFFE, 2, 0), ("write", 0xFFE, 2, 0x2211)]
    assert guest.platform.mmio[BASE + 0x1000].mmio_read(0, 2) == 0x4433


def test_a_fault_of_the_instruction_is_the_guests(guest: Guest) -> None:
    prepare(guest, "xor eax, eax; xor edx, edx; mov qword ptr [rbx], 0; div qword ptr [rbx]; nop", DEVICE)
    assert guest.run() == "hypercall"
    assert guest.vector == 0
    at = guest.frame(1)[0]
    assert bytes(guest.memory[at : at + 3]) == assemble("div qword ptr [rbx]")


def test_memory_that_may_not_be_written_is_asked_for_first(spied: tuple[Guest, Spy]) -> None:
    guest, spy = spied
    guest.long_mode(f"mov rsi, {DEVICE:#x}; mov rdi, {DATA:#x}; movsb; vmmcall")
    map_devices(guest)
    guest.protect(DATA, access=vcpu_pb2.PageAccess(read=True), store=vcpu_pb2.PAGE_STORE_WRITABLE)
    assert guest.run() == "memory_fault"
    assert (guest.exit.memory_fault.gpa, guest.exit.memory_fault.access) == (DATA, vcpu_pb2.ACCESS_KIND_WRITE)
    assert spy.accesses == []


def test_the_single_step_trap_comes_behind_it(guest: Guest) -> None:
    prepare(guest, "pushfq; or dword ptr [rsp], 0x100; popfq; inc dword ptr [rbx]", DEVICE)
    assert guest.run() == "hypercall"
    assert guest.vector == 1
    at, _, flags = guest.frame(3)
    assert bytes(guest.memory[at - 2 : at]) == assemble("inc dword ptr [rbx]")
    assert flags & Rflags.TF
    assert guest.platform.mmio[BASE].mmio_read(0, 1) == CONTENT[0] + 1


def test_mov_to_ss_is_done_alone(guest: Guest) -> None:
    """Its shadow puts the trap off, by which the core stops behind others."""
    prepare(guest, "mov word ptr [rbx], 0x10; mov ss, [rbx]; mov word ptr [rbx], 0x1234; mov eax, ss", DEVICE)
    assert (guest.run(), guest.vector) == ("hypercall", None)
    assert guest.exit.registers.rax == 0x10
    assert guest.platform.mmio[BASE].mmio_read(0, 2) == 0x1234


def test_a_request_to_stop_does_not_break_into_it(guest: Guest) -> None:
    prepare(guest, "inc dword ptr [rbx]", DEVICE)
    device = guest.platform.mmio[BASE]
    first = device.mmio_read

    def ask(offset: int, size: int) -> int:
        guest.processor.kick()
        guest.processor.wake()
        return first(offset, size)

    device.mmio_read = ask  # type: ignore[method-assign]
    assert guest.run() == "kicked"
    assert first(0, 1) == CONTENT[0] + 1
    assert guest.run() == "hypercall"
    assert first(0, 1) == CONTENT[0] + 1


def test_the_local_apic_takes_them_too(guest: Guest) -> None:
    guest.long_mode(
        "mov rbx, 0x800000; or dword ptr [rbx + 0xf0], 0x100; and dword ptr [rbx + 0x350], 0xfffeffff;"
        "mov eax, [rbx + 0xf0]; vmmcall"
    )
    map_devices(guest)
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax & 0x100


# --------------------------------------------------------------------------------- where neither RAM nor a device is

READ, WRITE = vcpu_pb2.ACCESS_KIND_READ, vcpu_pb2.ACCESS_KIND_WRITE


@pytest.mark.parametrize(
    ("code", "exits"),
    [
        ("mov eax, [rbx + 8]", [(READ, 8, b"")]),
        ("mov dword ptr [rbx + 8], 0x01020304", [(WRITE, 8, b"\4\3\2\1")]),
        ("or dword ptr [rbx + 8], 0x1000", [(READ, 8, b""), (WRITE, 8, b"\1\x10\0\0")]),
        ("lock inc word ptr [rbx + 2]", [(READ, 2, b""), (WRITE, 2, b"\2\0")]),
        ("cmp byte ptr [rbx], 1", [(READ, 0, b"")]),
        ("xchg [rbx], eax", [(READ, 0, b""), (WRITE, 0, b"\x11\x22\x33\x44")]),
        ("pcmpeqb xmm0, xmm0; movups [rbx + 16], xmm0", [(WRITE, 16, b"\xff" * 16)]),
        ("mov rdi, rbx; mov ecx, 2; cld; rep stosb", [(WRITE, 0, b"\x11"), (WRITE, 1, b"\x11")]),
        ("mov rdi, rdx; mov rsi, rbx; cld; movsb", [(READ, 0, b"")]),
        ("push rax; pop qword ptr [rbx]", [(WRITE, 0, bytes.fromhex("1122334455667788"))]),
    ],
)
def test_others_may_have_registers_where_no_memory_is(
    guest: Guest, code: str, exits: list[tuple[int, int, bytes]]
) -> None:
    prepare(guest, code, ABSENT)
    seen = []
    reason = guest.run()
    while reason == "memory_fault":
        fault = guest.exit.memory_fault
        assert fault.unmapped
        seen.append((fault.access, fault.gpa - NOWHERE, fault.data))
        reason = guest.run(value=1)
    assert (reason, guest.vector) == ("hypercall", None)
    assert seen == exits
    assert guest.exit.registers.rip > CODE


def test_a_store_that_is_refused_when_it_is_known_is_lost(guest: Guest) -> None:
    prepare(guest, "or dword ptr [rbx], 2; mov eax, 7", ABSENT)
    assert guest.run() == "memory_fault"
    assert guest.run(value=1) == "memory_fault"
    assert guest.run(action=vcpu_pb2.ACTION_DENY) == "hypercall"
    assert (guest.vector, guest.exit.registers.rax) == (None, 7)


def test_updates_that_come_with_a_load_are_not_lost_behind_its_store(guest: Guest) -> None:
    prepare(guest, "or dword ptr [rbx], 2; mov ecx, 0xc0000103; rdmsr", ABSENT)
    assert guest.run() == "memory_fault"
    update = vcpu_pb2.Update(msr=registers_pb2.MsrValue(index=0xC0000103, value=77))
    assert guest.run(value=1, updates=[update]) == "memory_fault"
    assert guest.run() == "hypercall"
    assert guest.exit.registers.rax == 77


def test_memory_of_the_test_device_keeps_what_is_written() -> None:
    found = pages(Guard())
    assert len(found) == SIZE // 4096
    found[BASE].mmio_write(4, 2, 0x1234)
    assert (found[BASE].mmio_read(4, 4), found[BASE + 4096].mmio_read(4, 4)) == (0x1234, 0)
