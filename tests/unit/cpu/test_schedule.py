"""Runs that repeat: the same seed gives the same exits, whatever the host's threads do and however long they take."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.unit.cpu.machine import DATA, RAM_SIZE, A
from tests.unit.cpu.test_smp import EOI, INIT, NMI, STARTUP, TRAMPOLINE, X2APIC, Machine, icr
from vtl0_guest.cpu.devices.virtual_clock import BLOCK_NANOSECONDS
from vtlab.ram import Ram, create_ram_files

# An exit, then nothing more on that processor.
END = "mov eax, 0xE0D; vmmcall; e: cli; hlt; jmp e"
Log = list[tuple[int, bytes]]


def run(
    directory: Path,
    seed: int,
    programs: Sequence[str],
    *,
    handlers: dict[int, str] | None = None,
    setup: Callable[[Machine], object] = lambda _machine: None,
    disturb: bool = False,
) -> tuple[Log, dict[str, int]]:
    """Runs programs until each has ended; whoever serves their exits dawdles. The exits in order, and some of DATA.

    Args:
        disturb: processors are kicked all the time.
    """
    folder = directory / f"{time.monotonic_ns()}"
    folder.mkdir()
    create_ram_files(folder, RAM_SIZE)
    log: Log = []
    ended: set[int] = set()
    over, done = threading.Event(), threading.Event()
    with Ram(folder, RAM_SIZE, "vtl0") as ram:
        machine = Machine(ram, folder, len(programs), seed)
        for vector, code in (handlers or {}).items():
            machine.handler(vector, code)
        machine.boot(*programs)
        setup(machine)

        def serve(index: int) -> None:
            dawdle = random.Random()
            processor, action = machine.core.processor(index), A.ACTION_UNSPECIFIED
            while not over.is_set():
                time.sleep(dawdle.choice((0, 0, 0, 0.0005)))
                exit_ = A.Exit.FromString(
                    processor.run(
                        A.Enter(reason=A.ENTER_REASON_RESUME, resolution=A.Resolution(action=action, value=7))
                    )
                )
                kind = exit_.WhichOneof("reason")
                if kind == "kicked":
                    action = A.ACTION_UNSPECIFIED
                    continue
                log.append((index, exit_.SerializeToString(deterministic=True)))
                action = A.ACTION_COMPLETE if kind == "hypercall" else A.ACTION_COMMIT
                if kind == "hypercall" and exit_.registers.rax == 0xE0D:
                    ended.add(index)
                    if len(ended) == len(programs):
                        done.set()
                        return

        threads = [threading.Thread(target=serve, args=(index,), daemon=True) for index in range(len(programs))]
        random.shuffle(threads)
        try:
            for thread in threads:
                thread.start()
            limit = time.monotonic() + 60
            while not done.wait(0.001 if disturb else 1):
                assert time.monotonic() < limit, f"{ended} ended; exits: {len(log)}"
                if disturb:
                    machine.core.processor(random.randrange(len(programs))).kick()
        finally:
            over.set()
            for index, thread in enumerate(threads):
                while thread.is_alive():
                    for number in range(len(programs)):
                        machine.core.processor(number).kick()
                    thread.join(0.02)
        found = {"first": machine.peek(DATA), "second": machine.peek(DATA + 8)}
        machine.close()
    return log, found


TICKS = (
    f"{X2APIC}; mov ecx, 0x83e; mov eax, 0xb; xor edx, edx; wrmsr; mov ecx, 0x832; mov eax, 0x20040; wrmsr;"
    "mov ecx, 0x838; mov eax, 300000; wrmsr; sti"
)
TICK = {
    0x40: f"push rax; push rcx; push rdx; inc qword ptr [0x200000]; vmmcall; {EOI}; pop rdx; pop rcx; pop rax; iretq"
}


def test_timer_ticks_come_at_the_same_instruction(tmp_path: Path) -> None:
    program = f"{TICKS}; xor ebx, ebx; l: inc rbx; cmp qword ptr [0x200000], 20; jb l; cli; {END}"
    first, found = run(tmp_path, 1, [program], handlers=TICK)
    assert found["first"] == 20
    assert len(first) == 21
    assert run(tmp_path, 1, [program], handlers=TICK)[0] == first


def test_kicks_change_nothing(tmp_path: Path) -> None:
    program = f"{TICKS}; xor ebx, ebx; l: inc rbx; cmp qword ptr [0x200000], 100; jb l; cli; {END}"
    first, _ = run(tmp_path, 1, [program], handlers=TICK)
    assert run(tmp_path, 1, [program], handlers=TICK, disturb=True)[0] == first


def test_time_jumps_while_the_guest_halts(tmp_path: Path) -> None:
    """A second of the timer takes none of the host's."""
    program = f"{TICKS.replace('300000', '100000000')}; l: hlt; cmp qword ptr [0x200000], 600; jb l; cli; {END}"
    start = time.monotonic()
    first, _ = run(tmp_path, 1, [program], handlers={0x40: TICK[0x40].replace("vmmcall;", "")})
    assert time.monotonic() - start < 50, "60 s of the guest's time"
    assert first == run(tmp_path, 1, [program], handlers={0x40: TICK[0x40].replace("vmmcall;", "")})[0]


# A turn may end between the load and the store, as they are in different blocks.
RACE = (
    "mov ebx, 0x200000; xor esi, esi; mov ecx, 40000; l: mov rax, [rbx]; jmp a; a: inc rax; mov [rbx], rax;"
    "mov rdx, rax; shr rdx, 12; cmp rdx, rdi; je n; mov rdi, rdx; mov r8, rax; mov eax, 1; vmmcall; n: dec ecx; jnz l;"
)


def test_a_race_between_two_processors_repeats_and_depends_on_the_seed(tmp_path: Path) -> None:
    programs = [RACE + END, RACE + END]
    first, found = run(tmp_path, 5, programs)
    assert 40_000 < found["first"] < 80_000, "stores were lost, as without LOCK they are"
    assert run(tmp_path, 5, programs) == (first, found)
    assert run(tmp_path, 5, programs, disturb=True) == (first, found)
    assert run(tmp_path, 6, programs) != (first, found)


LOCKED = (
    "mov ebx, 0x200010; mov ecx, {rounds}; t: mov eax, 1; xchg [rbx], eax; test eax, eax; jz g; p: pause;"
    "cmp dword ptr [rbx], 0; jne p; jmp t; g: inc qword ptr [0x200000]; mov dword ptr [rbx], 0; dec ecx; jnz t;"
)


@pytest.mark.parametrize("pause", ["pause", "nop"])
def test_a_spin_lock_makes_progress_and_repeats(tmp_path: Path, pause: str) -> None:
    program = LOCKED.format(rounds=30_000).replace("pause", pause) + END
    first, found = run(tmp_path, 3, [program, program])
    assert found["first"] == 60_000
    assert run(tmp_path, 3, [program, program])[0] == first


def test_interrupts_between_processors_repeat(tmp_path: Path) -> None:
    rounds = 100
    save, restore = "push rax; push rcx; push rdx", "pop rdx; pop rcx; pop rax; iretq"
    handlers = {
        0x40: f"{save}; inc qword ptr [0x200008]; vmmcall; {EOI}; {icr(0x4041, 0)}; {restore}",
        0x41: f"{save}; inc qword ptr [0x200000]; {EOI}; {restore}",
        2: f"{save}; inc qword ptr [0x200018]; {restore}",
    }
    programs = [
        f"{X2APIC}; w: pause; cmp byte ptr [0x200010], 1; jne w; xor ebx, ebx;"
        f"n: {icr(0x4040)}; {icr(NMI)}; inc ebx; l: cli; cmp [0x200000], rbx; je d; sti; hlt; jmp l;"
        f"d: sti; cmp ebx, {rounds}; jne n; cli; {END}",
        f"{X2APIC}; mov byte ptr [0x200010], 1; sti; l: cmp qword ptr [0x200008], {rounds}; jne l; cli; {END}",
    ]
    first, found = run(tmp_path, 9, programs, handlers=handlers)
    assert (found["first"], found["second"]) == (rounds, rounds)
    assert run(tmp_path, 9, programs, handlers=handlers, disturb=True)[0] == first


def test_a_processor_that_was_started_by_sipi_repeats(tmp_path: Path) -> None:
    boot = (
        f"{X2APIC}; {icr(INIT)}; {icr(STARTUP | TRAMPOLINE >> 12)};"
        "xor ebx, ebx; l: inc rbx; cmp qword ptr [0x200008], 0; je l; "
    ) + END
    code = "xor ax, ax; mov ds, ax; mov ax, 0x2000; l: dec ax; jnz l; mov dword ptr [0x300], 1; h: cli; hlt; jmp h"

    def place(machine: Machine) -> None:
        from tests.unit.cpu.machine import assemble

        machine.poke(TRAMPOLINE, assemble(code, 16, 0))

    program = boot.replace("0x200008", "0x300")
    first, _ = run_alone(tmp_path, program, place)
    assert run_alone(tmp_path, program, place)[0] == first


def run_alone(directory: Path, program: str, setup: Callable[[Machine], object]) -> tuple[Log, int]:
    """Processor 1 waits for SIPI; until processor 0 ends."""
    folder = directory / f"{time.monotonic_ns()}"
    folder.mkdir()
    create_ram_files(folder, RAM_SIZE)
    log: Log = []
    with Ram(folder, RAM_SIZE, "vtl0") as ram:
        machine = Machine(ram, folder, 2, 4)
        machine.boot(program)
        setup(machine)
        over = threading.Event()

        def serve(index: int) -> None:
            action = A.ACTION_UNSPECIFIED
            while not over.is_set():
                enter = A.Enter(reason=A.ENTER_REASON_RESUME, resolution=A.Resolution(action=action))
                exit_ = A.Exit.FromString(machine.core.processor(index).run(enter))
                kind = exit_.WhichOneof("reason")
                action = A.ACTION_UNSPECIFIED if kind == "kicked" else A.ACTION_COMMIT
                if kind != "kicked":
                    log.append((index, exit_.SerializeToString(deterministic=True)))
                if kind == "hypercall":
                    over.set()

        threads = [threading.Thread(target=serve, args=(index,), daemon=True) for index in (1, 0)]
        for thread in threads:
            thread.start()
        try:
            assert over.wait(60)
        finally:
            over.set()
            while any(thread.is_alive() for thread in threads):
                for index in (0, 1):
                    machine.core.processor(index).kick()
                threads[0].join(0.02)
        machine.close()
    return log, len(log)


def test_clocks_and_random_numbers_are_the_machine_s_own(tmp_path: Path) -> None:
    """TSC, reference counter, PIT, RTC, ACPI timer, RDRAND and RDSEED: each result is in an exit."""
    show = "mov rbx, rax; vmmcall;"
    program = (
        f"rdtsc; {show} rdtscp; {show} rdrand rax; {show} rdseed eax; {show} "
        f"mov ecx, 0x40000020; rdmsr; {show} mov al, 0; out 0x43, al; in al, 0x40; {show} "
        f"mov al, 0; out 0x70, al; in al, 0x71; {show} mov al, 9; out 0x70, al; in al, 0x71; {show} "
        f"mov edx, 0x608; in eax, dx; {show} rdtsc; {show} {END}"
    )
    first, _ = run(tmp_path, 11, [program])
    exits = [A.Exit.FromString(raw) for _, raw in first]
    values = [exit_.registers.rbx for exit_ in exits]
    assert run(tmp_path, 11, [program])[0] == first
    assert values[2] > 1 << 40
    assert values[2] != A.Exit.FromString(run(tmp_path, 12, [program])[0][2][1]).registers.rbx
    assert values[-2] - values[0] < 200 * BLOCK_NANOSECONDS, "nothing passes while an exit is served"
    assert values[7] & 0xFF == 0x25, "the year 2025"
