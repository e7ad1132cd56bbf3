"""Several processors of one machine: starting, interrupting one another, sharing memory and code."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.cpu.machine import DATA, HANDLERS, IDT, A, Guest, assemble, gate64
from vtl0_guest.cpu import cpuid
from vtl0_guest.cpu.processor import Processor
from vtl0_guest.cpu.turns import Turns
from vtlab.ram import Ram
from vtlab.v1 import registers_pb2

AP_CODE, AP_STACK = 0x110000, 0x178000
TRAMPOLINE = 0x9000
# x2APIC: enable, and a message by ICR; destination in the upper half.
X2APIC = "mov ecx, 0x1b; rdmsr; or eax, 0x400; wrmsr; mov ecx, 0x80f; mov eax, 0x1ff; xor edx, edx; wrmsr"


def icr(low: int, destination: int = 1) -> str:
    return f"mov ecx, 0x830; mov edx, {destination}; mov eax, {low}; wrmsr"


INIT, STARTUP, NMI, EOI = 0x4500, 0x4600, 0x4400, "mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr"


class Machine(Guest):
    """`programs` run on processors 0, 1, ...; each ends with VMMCALL. Without one, a processor waits for SIPI."""

    def __init__(self, ram: Ram, directory: Path, vp_count: int, seed: int | None = None) -> None:
        super().__init__(ram, directory, vp_count, seed)
        self._handlers: dict[int, str] = {}

    def boot(self, *programs: str) -> None:
        self.long_mode(programs[0])
        for vector, code in self._handlers.items():
            self._install(vector, code)
        state = self.processor.state()
        del state.msrs[:]  # each local APIC has its own
        for index, program in enumerate(programs[1:], 1):
            at = AP_CODE + (index - 1) * 0x1000
            self.poke(at, assemble(program, at=at))
            state.registers.rip, state.registers.rsp = at, AP_STACK - (index - 1) * 0x1000
            self.core.processor(index).load_state(state)

    def handler(self, vector: int, code: str) -> None:
        """Code for a vector; for the next boot()."""
        self._handlers[vector] = code

    def _install(self, vector: int, code: str) -> None:
        at = HANDLERS + 0x2000 + vector * 0x80
        self.poke(at, assemble(code, at=at))
        self.poke(IDT + 16 * vector, gate64(at))

    @contextmanager
    def running(self, *indices: int) -> Iterator[dict[int, list[A.Exit]]]:
        """Enters processors on threads; each goes on after KICKED and OUTPUT, and stops at any other exit."""
        exits: dict[int, list[A.Exit]] = {index: [] for index in indices}
        over = threading.Event()

        def drive(processor: Processor, log: list[A.Exit]) -> None:
            action = A.ACTION_UNSPECIFIED
            while not over.is_set():
                enter = A.Enter(reason=A.ENTER_REASON_RESUME, resolution=A.Resolution(action=action))
                exit_ = A.Exit.FromString(processor.run(enter))
                log.append(exit_)
                kind = exit_.WhichOneof("reason")
                action = A.ACTION_COMMIT
                if kind not in ("kicked", "output", "halt"):
                    return

        threads = [
            threading.Thread(target=drive, args=(self.core.processor(index), exits[index]), daemon=True)
            for index in indices
        ]
        for thread in threads:
            thread.start()
        try:
            yield exits
        finally:
            over.set()
            for index, thread in zip(indices, threads, strict=True):
                limit = time.monotonic() + 20
                while thread.is_alive():
                    assert time.monotonic() < limit
                    self.core.processor(index).kick()
                    thread.join(0.05)

    def finish(self, *indices: int) -> dict[int, A.Exit]:
        """Runs processors until each has ended with VMMCALL; returns their exits."""
        with self.running(*indices) as exits:
            wait_for(lambda: all(log and log[-1].WhichOneof("reason") == "hypercall" for log in exits.values()))
        return {index: log[-1] for index, log in exits.items()}


def wait_for(condition: Callable[[], bool], limit: float = 20) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def machine(ram: Ram, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(ram, tmp_path, vp_count=2)
    yield machine
    machine.close()


# ----------------------------------------------------------------------------------------------------- starting


def test_init_and_sipi_start_a_processor_in_real_mode(machine: Machine) -> None:
    machine.boot(
        f"{X2APIC}; {icr(INIT)}; {icr(STARTUP | TRAMPOLINE >> 12)}; {icr(STARTUP | TRAMPOLINE >> 12)};"
        f"l: pause; cmp qword ptr [0x200000], 0x77; jne l; vmmcall"
    )
    count = "mov eax, 0x77; mov ds, cx; mov bx, 0x300; mov [bx], eax; l: hlt; jmp l"
    machine.poke(TRAMPOLINE, assemble(count, 16, 0))
    with machine.running(1, 0) as exits:
        wait_for(lambda: machine.peek(0x300, 4) == 0x77)
        machine.poke(DATA, struct.pack("<Q", 0x77))
        wait_for(lambda: bool(exits[0]) and exits[0][-1].WhichOneof("reason") == "hypercall")
        wait_for(lambda: any(one.WhichOneof("reason") == "halt" for one in exits[1]))
    registers = next(one for one in exits[1] if one.WhichOneof("reason") == "halt").registers
    assert (registers.cs.selector, registers.cs.base) == (TRAMPOLINE >> 4, TRAMPOLINE)
    assert (registers.cr0, registers.cr3, registers.cr4, registers.efer) == (0x10, 0, 0, 0)
    assert registers.rdx == cpuid.SIGNATURE


def test_init_keeps_what_the_manual_keeps(machine: Machine) -> None:
    machine.boot(
        f"{X2APIC}; {icr(INIT)}; vmmcall",
        f"{X2APIC}; mov ecx, 0x277; mov eax, 0x01010101; mov edx, eax; wrmsr;"
        "mov ecx, 0xc0000082; mov edx, 0x101; wrmsr;"
        "mov rax, cr0; or eax, 0x40000000; mov cr0, rax; mov rax, cr4; or eax, 0x40000; mov cr4, rax;"
        "xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv; mov byte ptr [0x200000], 1; l: jmp l",
    )
    with machine.running(1):
        wait_for(lambda: machine.peek(DATA, 1) == 1)
        machine.finish(0)
        wait_for(lambda: machine.core.processor(1).context.waits_for_startup)
    state = machine.core.processor(1).state()
    values = {entry.index: entry.value for entry in state.msrs}
    assert (values[0x277], values[0xC0000082]) == (0x0101010101010101, 0x0000010101010101)
    assert state.xcr0 == 3
    registers = state.registers
    assert (registers.rip, registers.cs.base, registers.rflags) == (0xFFF0, 0xFFFF0000, 2)
    assert (registers.cr0, registers.cr3, registers.cr4, registers.efer) == (0x40000010, 0, 0, 0)
    assert (registers.rax, registers.rsp, registers.rdx) == (0, 0, cpuid.SIGNATURE)
    assert values[0x1B] & 0xD00 == 0xC00, "x2APIC mode stays, and it is no boot processor"


def test_a_processor_that_waits_for_sipi_runs_nothing_and_can_be_kicked(machine: Machine) -> None:
    machine.boot(f"{X2APIC}; {icr(NMI)}; {icr(0x4033)}; vmmcall")
    with machine.running(1) as exits:
        machine.finish(0)
        machine.core.processor(1).kick()
        wait_for(lambda: bool(exits[1]))
    assert {one.WhichOneof("reason") for one in exits[1]} == {"kicked"}
    assert exits[1][0].registers.rip == 0xFFF0


def test_a_parked_processor_waits_for_sipi_and_forgets_what_it_was_about_to_do(machine: Machine) -> None:
    machine.boot("vmmcall", "mov eax, 0x77; mov cr4, rax; vmmcall")
    ap = machine.core.processor(1)
    ap.run(A.Enter(reason=A.ENTER_REASON_RESUME, updates=[A.Update(intercepts=A.InterceptFilter(cr4_mask=1))]))
    park = A.Update(park_processor=A.ParkProcessor())
    commit = A.Resolution(action=A.ACTION_COMMIT)
    machine.core.processor(1).kick()
    exit_ = A.Exit.FromString(ap.run(A.Enter(reason=A.ENTER_REASON_RESUME, resolution=commit, updates=[park])))
    assert exit_.WhichOneof("reason") == "kicked"
    assert (exit_.registers.rip, exit_.registers.cr4, exit_.registers.efer) == (0xFFF0, 0, 0)
    assert ap.context.waits_for_startup


def test_a_sipi_without_init_does_nothing(machine: Machine) -> None:
    machine.boot(f"{X2APIC}; {icr(STARTUP | 9)}; vmmcall", "l: inc qword ptr [0x200000]; jmp l")
    with machine.running(1):
        machine.finish(0)
        before = machine.peek(DATA)
        wait_for(lambda: machine.peek(DATA) > before + 1000)


def test_init_of_the_boot_processor_asks_for_a_reset(machine: Machine) -> None:
    machine.boot(f"{X2APIC}; {icr(INIT, 0)}; l: jmp l")
    assert machine.run() == "reset_request"
    assert machine.exit.reset_request.source == "INIT"


def test_init_level_deassert_does_nothing(machine: Machine) -> None:
    machine.boot(f"{X2APIC}; {icr(0x8500, 0)}; vmmcall")
    assert machine.run() == "hypercall"


# -------------------------------------------------------------------------------------------------- interrupts


def test_interrupts_go_back_and_forth(machine: Machine) -> None:
    """Each processor answers the other's interrupt with one of its own, from HLT."""
    rounds = 2000
    machine.handler(
        0x40,
        f"push rax; push rcx; push rdx; inc qword ptr [0x200008]; {EOI}; {icr(0x4041, 0)};"
        "pop rdx; pop rcx; pop rax; iretq",
    )
    machine.handler(
        0x41, f"push rax; push rcx; push rdx; inc qword ptr [0x200000]; {EOI}; pop rdx; pop rcx; pop rax; iretq"
    )
    machine.boot(
        f"{X2APIC}; w: pause; cmp byte ptr [0x200010], 1; jne w; xor ebx, ebx;"
        f"n: {icr(0x4040)}; inc ebx; l: cli; cmp [0x200000], rbx; je d; sti; hlt; jmp l;"
        f"d: sti; cmp ebx, {rounds}; jne n; vmmcall",
        f"{X2APIC}; mov byte ptr [0x200010], 1; sti; l: hlt; jmp l",
    )
    with machine.running(1):
        machine.finish(0)
    assert machine.peek(DATA) == machine.peek(DATA + 8) == rounds


@pytest.mark.parametrize("target", ["l: jmp l", "hlt; l: jmp l", "sti; l: hlt; jmp l", "l: pause; jmp l"])
def test_nmi_reaches_a_processor_whatever_it_does(machine: Machine, target: str) -> None:
    machine.handler(2, "inc qword ptr [0x200000]; vmmcall; iretq")
    machine.boot(
        f"{X2APIC}; w: pause; cmp byte ptr [0x200010], 1; jne w; {icr(NMI)}; vmmcall",
        f"{X2APIC}; mov byte ptr [0x200010], 1; {target}",
    )
    machine.finish(0, 1)
    assert machine.peek(DATA) == 1


def test_a_second_nmi_waits_for_iret(machine: Machine) -> None:
    machine.handler(
        2,
        "cmp byte ptr [0x200020], 0; jne n; mov byte ptr [0x200020], 1; inc qword ptr [0x200000];"
        "w: pause; cmp byte ptr [0x200018], 1; jne w; mov byte ptr [0x200020], 0; iretq;"
        "n: mov byte ptr [0x200028], 1; iretq",
    )
    machine.boot(
        f"{X2APIC}; w: pause; cmp byte ptr [0x200010], 1; jne w; {icr(NMI)};"
        f"u: pause; cmp byte ptr [0x200000], 1; jne u; {icr(NMI)}; {icr(NMI)}; mov byte ptr [0x200018], 1; vmmcall",
        f"{X2APIC}; mov byte ptr [0x200010], 1; l: cmp byte ptr [0x200000], 2; jne l; vmmcall",
    )
    machine.finish(0, 1)
    assert machine.peek(DATA) == 2, "two that came while the first was handled are one"
    assert machine.peek(DATA + 0x28) == 0, "none came within the handler"


def test_shorthands_and_logical_destinations(ram: Ram, tmp_path: Path) -> None:
    machine = Machine(ram, tmp_path, vp_count=4)
    try:
        for vector in (0x50, 0x51, 0x52, 0x53, 0x54):
            # counts at [0x200100 + vector % 16 * 64 + processor * 8]
            machine.handler(
                vector,
                "push rax; push rcx; push rdx; mov ecx, 0x802; rdmsr;"
                f"lock inc qword ptr [rax*8 + {0x200100 + vector % 16 * 64}]; {EOI}; pop rdx; pop rcx; pop rax; iretq",
            )
        other = f"{X2APIC}; lock inc qword ptr [0x200010]; sti; l: hlt; jmp l"
        machine.boot(
            f"{X2APIC}; w: pause; cmp byte ptr [0x200010], 3; jne w; sti;"
            f"{icr(0x000C4050, 0)}; {icr(0x00084051, 0)}; {icr(0x00044052, 0)};"
            f"{icr(0x4853, 0xA)}; {icr(0x4054, 0xFFFFFFFF)};"
            "l: pause; xor eax, eax; mov ebx, 0x200100; c: add rax, [rbx]; add ebx, 8; cmp ebx, 0x200240; jne c;"
            "cmp eax, 14; jne l; vmmcall",
            other,
            other,
            other,
        )
        with machine.running(1, 2, 3):
            machine.finish(0)
        counts = [[machine.peek(DATA + 0x100 + row * 64 + vp * 8) for vp in range(4)] for row in range(5)]
        assert counts == [[0, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]
    finally:
        machine.close()


# ------------------------------------------------------------------------------------------------------- turns


def test_locked_increments_are_exact(machine: Machine) -> None:
    rounds = 1_000_000
    program = f"mov ebx, 0x200000; mov ecx, {rounds}; l: lock inc qword ptr [rbx]; dec ecx; jnz l; vmmcall"
    machine.boot(program, program)
    machine.finish(0, 1)
    assert machine.peek(DATA) == 2 * rounds


def test_a_spinlock_is_handed_over_quickly(machine: Machine) -> None:
    """Strict alternation: each pass needs a turn of the other processor."""
    rounds = 2000
    program = (
        "mov ecx, {rounds}; l: pause; cmp qword ptr [0x200000], {me}; jne l; inc qword ptr [0x200008];"
        "mov qword ptr [0x200000], {other}; dec ecx; jnz l; vmmcall"
    )
    machine.boot(program.format(rounds=rounds, me=0, other=1), program.format(rounds=rounds, me=1, other=0))
    start = time.monotonic()
    machine.finish(0, 1)
    elapsed = time.monotonic() - start
    assert machine.peek(DATA + 8) == 2 * rounds
    assert elapsed < rounds * 2 * Turns.SLICE / 2, "no pass waited for a slice to end"


def test_processors_that_never_pause_share_the_time(machine: Machine) -> None:
    machine.boot("l: inc qword ptr [0x200000]; jmp l", "l: inc qword ptr [0x200008]; jmp l")
    with machine.running(0, 1):
        wait_for(lambda: machine.peek(DATA) > 20_000_000)
        wait_for(lambda: machine.peek(DATA + 8) > 5_000_000)
        first, second = machine.peek(DATA), machine.peek(DATA + 8)
    assert 0.2 < first / second < 5


def test_a_kick_of_one_leaves_the_others_running(machine: Machine) -> None:
    machine.boot("l: jmp l", "l: inc qword ptr [0x200008]; jmp l")
    with machine.running(0, 1) as exits:
        wait_for(lambda: machine.peek(DATA + 8) > 1000)
        machine.core.processor(0).kick()
        wait_for(lambda: bool(exits[0]))
        before = machine.peek(DATA + 8)
        wait_for(lambda: machine.peek(DATA + 8) > before)
        assert not exits[1]


def test_an_update_that_one_processor_cannot_take_is_its_own_error(machine: Machine) -> None:
    machine.boot("l: jmp l", "l: jmp l")
    with machine.running(0), pytest.raises(Exception, match="serial port 7"):
        machine.core.processor(1).run(A.Enter(updates=[A.Update(serial_input=A.SerialInput(port=7))]))


# ------------------------------------------------------------------------------------------------- code and rights


def test_code_written_by_another_processor_is_seen(machine: Machine) -> None:
    """A calls a function; B changes what it returns and waits until A has seen it, a hundred times."""
    function = 0x210000
    machine.poke(function, assemble("mov eax, 0; ret", at=function))
    machine.boot(
        f"xor ebx, ebx; n: pause; mov eax, {function}; call rax; cmp eax, ebx; je n; mov ebx, eax; mov [0x200000], rax;"
        "cmp eax, 100; jne n; vmmcall",
        f"mov ecx, 1; n: mov [{function + 1}], ecx; w: pause; cmp [0x200000], rcx; jne w;"
        "inc ecx; cmp ecx, 101; jne n; vmmcall",
    )
    machine.finish(0, 1)
    assert machine.peek(DATA) == 100


def test_code_that_changes_itself_and_is_run_by_both(machine: Machine) -> None:
    """The same page is code, data of its own code and stack, so that it is needed writable and executable at once."""
    program = (
        "mov rsp, 0x220800; mov ecx, 3000; mov rdi, 0x220000; n: mov al, cl; mov [rdi + {operand}], ecx; call rdi;"
        "cmp eax, ecx; jne bad; dec ecx; jnz n; mov eax, 1; vmmcall; bad: mov ebx, eax; vmmcall"
    )
    for index in (0, 1):
        machine.poke(0x220000 + index * 0x10, assemble("mov eax, 0; ret", at=0x220000))
    first = program.format(operand=1)
    second = first.replace("0x220800", "0x220f00").replace("rdi, 0x220000", "rdi, 0x220010")
    machine.boot(first, second)
    exits = machine.finish(0, 1)
    assert [exits[index].registers.rax for index in (0, 1)] == [1, 1]


def test_many_pages_of_changing_code(machine: Machine) -> None:
    """More pages than are watched at once: the oldest go back, and no call runs old code."""
    pages, rounds = 48, 12
    base = 0x300000
    end = base + pages * 0x1000
    for number in range(pages):
        machine.poke(base + number * 0x1000, assemble("mov eax, 0; ret", at=base))
    machine.boot(
        # Waits for the round, then checks all functions.
        f"mov ebx, 1; r: w: pause; cmp [0x200000], rbx; jne w; mov edi, {base}; n: call rdi; cmp eax, ebx; jne bad;"
        f"add edi, 0x1000; cmp edi, {end}; jne n; mov [0x200008], rbx; inc ebx; cmp ebx, {rounds + 1}; jne r;"
        "mov eax, 1; vmmcall; bad: mov eax, 2; vmmcall",
        f"mov ebx, 1; r: mov edi, {base}; n: mov [rdi + 1], ebx; call rdi; add edi, 0x1000; cmp edi, {end}; jne n;"
        f"mov [0x200000], rbx; w: pause; cmp [0x200008], rbx; jne w; inc ebx; cmp ebx, {rounds + 1}; jne r; vmmcall",
    )
    exits = machine.finish(0, 1)
    assert exits[0].registers.rax == 1


@pytest.mark.parametrize("user", [False, True])
def test_rights_hold_on_every_processor_whatever_pages_are_shown_as(machine: Machine, user: bool) -> None:
    """A page is taken write or execute rights by an enter of processor 0; processor 1 is refused, and nothing else."""
    target = 0x230000
    machine.poke(target, assemble("inc qword ptr [0x200000]; ret", at=target))
    machine.boot(
        "vmmcall; l: pause; jmp l",
        f"n: mov eax, {target}; call rax; mov [{target + 0x800}], rax; cmp byte ptr [0x200010], 1; jne n; vmmcall;"
        f"mov [{target + 0x800}], rax; vmmcall; call rax; vmmcall",
    )
    assert machine.run() == "hypercall"
    with machine.running(0, 1) as exits:
        wait_for(lambda: machine.peek(DATA) > 10)
        machine.poke(DATA + 0x10, b"\1")
        wait_for(lambda: bool(exits[1]))
    access = A.PageAccess(read=True, kernel_execute=not user, user_execute=user)
    update = A.ProtectionUpdate(runs=[target >> 12, 1], access=access, store=A.PAGE_STORE_WRITABLE)
    machine.core.processor(0).kick()
    machine.run(updates=[A.Update(protection=update)])
    second = machine.core.processor(1)
    enter = A.Enter(reason=A.ENTER_REASON_RESUME, resolution=A.Resolution(action=A.ACTION_COMPLETE))
    exit_ = A.Exit.FromString(second.run(enter))
    assert exit_.memory_fault.gpa == target + 0x800
    assert exit_.memory_fault.access == A.ACCESS_KIND_WRITE
    enter = A.Enter(reason=A.ENTER_REASON_RESUME, resolution=A.Resolution(action=A.ACTION_SKIP))
    exit_ = A.Exit.FromString(second.run(enter))
    assert exit_.WhichOneof("reason") == "hypercall"
    write = registers_pb2.RegisterValue(name=registers_pb2.REGISTER_NAME_RAX, value=target)
    enter.updates.append(A.Update(register=write))
    exit_ = A.Exit.FromString(second.run(enter))
    if user:
        assert exit_.memory_fault.access == A.ACCESS_KIND_EXECUTE
    else:
        assert exit_.WhichOneof("reason") == "hypercall"


def test_each_processor_has_its_own_translations(machine: Machine) -> None:
    """INVLPG is local: the other one may go on with the old page until it invalidates too."""
    alias = 0x150000  # its entry in the page table of the first 2 MiB
    entry = 0x13000 + (alias >> 12) * 8
    machine.poke(0x240000, struct.pack("<Q", 1))
    machine.poke(0x241000, struct.pack("<Q", 2))
    machine.poke(DATA + 0x30, b"\0")
    machine.boot(
        f"mov edi, {alias}; mov qword ptr [{entry}], 0x240007; invlpg [{alias}]; mov rax, [rdi];"
        "mov byte ptr [0x200010], 1;"
        f"w: pause; cmp byte ptr [0x200010], 2; jne w; mov qword ptr [{entry}], 0x241007; invlpg [{alias}];"
        f"mov rbx, [rdi]; mov byte ptr [0x200010], 3; vmmcall",
        f"mov edi, {alias}; w: pause; cmp byte ptr [0x200010], 1; jne w; mov rax, [rdi]; mov byte ptr [0x200010], 2;"
        f"v: pause; cmp byte ptr [0x200010], 3; jne v; invlpg [{alias}]; mov rbx, [rdi]; vmmcall",
    )
    exits = machine.finish(0, 1)
    assert [(exits[index].registers.rax, exits[index].registers.rbx) for index in (0, 1)] == [(1, 2), (1, 2)]


# ------------------------------------------------------------------------------------------------------ output


def test_output_leaves_in_order_and_before_the_end(machine: Machine) -> None:
    """Processor 0's exit carries "A"; what processor 1 says then waits, and so does the end that it asks for."""
    machine.boot(
        "mov edx, 0x3f8; mov al, 0x41; out dx, al; vmmcall; l: pause; jmp l",
        "mov edx, 0x3f8; mov al, 0x42; out dx, al; mov edx, 0xf4; out dx, al; l: jmp l",
    )
    assert machine.run() == "hypercall"
    assert machine.exit.serial[0].data == b"A"
    with machine.running(1) as exits:
        time.sleep(0.05)
        assert not exits[1]
        with machine.running(0) as others:
            wait_for(lambda: bool(exits[1]))
    assert exits[1][-1].WhichOneof("reason") == "debug_exit"
    assert [part.data for one in [*others[0], *exits[1]] for part in one.serial] == [b"B"]
