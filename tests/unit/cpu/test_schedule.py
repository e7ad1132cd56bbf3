"""Runs that repeat: the same seed gives the same exits, whatever the host's threads do and however long they take."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.unit.cpu.machine import DATA, RAM_SIZE, A, assemble
from tests.unit.cpu.test_smp import EOI, INIT, NMI, STARTUP, TRAMPOLINE, X2APIC, Machine, icr
from vtl0_guest.cpu.devices.virtual_clock import BLOCK_NANOSECONDS
from vtlab.ram import Ram, create_ram_files

# An exit, then nothing more on that processor.
END = "mov eax, 0xE0D; vmmcall; e: cli; hlt; jmp e"
Log = list[tuple[int, bytes]]


class Server:
    """Serves the exits of all processors on threads that dawdle, until each processor in `ends` has come to END.

    Attributes:
        log: (processor, exit) in the order in which they came; without KICKED.
    """

    def __init__(self, machine: Machine, count: int, ends: set[int]) -> None:
        self.log: Log = []
        self._processors = [machine.core.processor(index) for index in range(count)]
        self._running = set(ends)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(index,), daemon=True) for index in range(count)]

    def run(self, disturb: bool) -> None:
        random.shuffle(started := list(self._threads))
        for thread in started:
            thread.start()
        limit = time.monotonic() + 60
        try:
            while not self._over.wait(0.001 if disturb else 1):
                assert time.monotonic() < limit, f"{self._running} did not end; exits: {len(self.log)}"
                if disturb:
                    random.choice(self._processors).kick()
        finally:
            self._over.set()
            for thread in self._threads:
                while thread.is_alive():
                    for processor in self._processors:
                        processor.kick()
                    thread.join(0.02)

    def _serve(self, index: int) -> None:
        resolution = A.Resolution(action=A.ACTION_UNSPECIFIED)
        while not self._over.is_set():
            time.sleep(random.choice((0, 0, 0, 0.0005)))
            enter = A.Enter(reason=A.ENTER_REASON_RESUME, resolution=resolution)
            exit_ = A.Exit.FromString(self._processors[index].run(enter))
            resolution = self._answer(index, exit_)

    def _answer(self, index: int, exit_: A.Exit) -> A.Resolution:
        kind = exit_.WhichOneof("reason")
        if kind == "kicked":
            return A.Resolution(action=A.ACTION_UNSPECIFIED)
        self.log.append((index, exit_.SerializeToString(deterministic=True)))
        if kind != "hypercall":
            return A.Resolution(action=A.ACTION_COMMIT)
        if exit_.registers.rax == 0xE0D:
            self._running.discard(index)
            if not self._running:
                self._over.set()
        return A.Resolution(action=A.ACTION_COMPLETE, value=7)


class Bench:
    """Runs one machine after the other."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count()

    def run(
        self,
        seed: int,
        programs: Sequence[str],
        *,
        handlers: Mapping[int, str] | None = None,
        trampoline: str = "",
        disturb: bool = False,
    ) -> tuple[Log, list[int]]:
        """The exits of a run, and the first two words of DATA.

        Args:
            programs: for processors 0, 1, ...
            trampoline: code for another processor, which waits for SIPI.
            disturb: processors are kicked all the time.
        """
        folder = self._directory / str(next(self._numbers))
        folder.mkdir()
        create_ram_files(folder, RAM_SIZE)
        count = len(programs) + bool(trampoline)
        with Ram(folder, RAM_SIZE, "vtl0") as ram:
            machine = Machine(ram, folder, count, seed)
            try:
                for vector, code in (handlers or {}).items():
                    machine.handler(vector, code)
                machine.boot(*programs)
                machine.poke(TRAMPOLINE, assemble(trampoline or "nop", 16, 0))
                server = Server(machine, count, set(range(len(programs))))
                server.run(disturb)
                return server.log, [machine.peek(DATA), machine.peek(DATA + 8)]
            finally:
                machine.close()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


TICKS = (
    f"{X2APIC}; mov ecx, 0x83e; mov eax, 0xb; xor edx, edx; wrmsr; mov ecx, 0x832; mov eax, 0x20040; wrmsr;"
    "mov ecx, 0x838; mov eax, 300000; wrmsr; sti"
)
TICK = {
    0x40: f"push rax; push rcx; push rdx; inc qword ptr [0x200000]; vmmcall; {EOI}; pop rdx; pop rcx; pop rax; iretq"
}


def test_timer_ticks_come_at_the_same_instruction(bench: Bench) -> None:
    program = f"{TICKS}; xor ebx, ebx; l: inc rbx; cmp qword ptr [0x200000], 20; jb l; cli; {END}"
    first, found = bench.run(1, [program], handlers=TICK)
    assert found[0] == 20
    assert len(first) == 21
    assert bench.run(1, [program], handlers=TICK)[0] == first


def test_kicks_change_nothing(bench: Bench) -> None:
    program = f"{TICKS}; xor ebx, ebx; l: inc rbx; cmp qword ptr [0x200000], 100; jb l; cli; {END}"
    first, _ = bench.run(1, [program], handlers=TICK)
    assert bench.run(1, [program], handlers=TICK, disturb=True)[0] == first


def test_time_jumps_while_the_guest_halts(bench: Bench) -> None:
    """A second of the timer takes none of the host's."""
    program = f"{TICKS.replace('300000', '100000000')}; l: hlt; cmp qword ptr [0x200000], 600; jb l; cli; {END}"
    start = time.monotonic()
    first, _ = bench.run(1, [program], handlers={0x40: TICK[0x40].replace("vmmcall;", "")})
    assert time.monotonic() - start < 50, "60 s of the guest's time"
    assert first == bench.run(1, [program], handlers={0x40: TICK[0x40].replace("vmmcall;", "")})[0]


# A turn may end between the load and the store, as they are in different blocks.
RACE = (
    "mov ebx, 0x200000; xor esi, esi; mov ecx, 40000; l: mov rax, [rbx]; jmp a; a: inc rax; mov [rbx], rax;"
    "mov rdx, rax; shr rdx, 12; cmp rdx, rdi; je n; mov rdi, rdx; mov r8, rax; mov eax, 1; vmmcall; n: dec ecx; jnz l;"
)


def test_a_race_between_two_processors_repeats_and_depends_on_the_seed(bench: Bench) -> None:
    programs = [RACE + END, RACE + END]
    first, found = bench.run(5, programs)
    assert 40_000 < found[0] < 80_000, "stores were lost, as without LOCK they are"
    assert bench.run(5, programs) == (first, found)
    assert bench.run(5, programs, disturb=True) == (first, found)
    assert bench.run(6, programs) != (first, found)


LOCKED = (
    "mov ebx, 0x200010; mov ecx, {rounds}; t: mov eax, 1; xchg [rbx], eax; test eax, eax; jz g; p: pause;"
    "cmp dword ptr [rbx], 0; jne p; jmp t; g: inc qword ptr [0x200000]; mov dword ptr [rbx], 0; dec ecx; jnz t;"
)


@pytest.mark.parametrize("pause", ["pause", "nop"])
def test_a_spin_lock_makes_progress_and_repeats(bench: Bench, pause: str) -> None:
    program = LOCKED.format(rounds=30_000).replace("pause", pause) + END
    first, found = bench.run(3, [program, program])
    assert found[0] == 60_000
    assert bench.run(3, [program, program])[0] == first


def test_interrupts_between_processors_repeat(bench: Bench) -> None:
    rounds = 100
    save, restore = "push rax; push rcx; push rdx", "pop rdx; pop rcx; pop rax; iretq"
    handlers = {
        0x40: f"{save}; inc qword ptr [0x200008]; vmmcall; {EOI}; {icr(0x4041, 0)}; {restore}",
        0x41: f"{save}; inc qword ptr [0x200000]; {EOI}; {restore}",
        2: f"{save}; inc qword ptr [0x200018]; {restore}",
    }
    programs = [
        (
            f"{X2APIC}; w: pause; cmp byte ptr [0x200010], 1; jne w; xor ebx, ebx;"
            f"n: {icr(0x4040)}; {icr(NMI)}; inc ebx; l: cli; cmp [0x200000], rbx; je d; sti; hlt; jmp l;"
            f"d: sti; cmp ebx, {rounds}; jne n; cli; {END}"
        ),
        f"{X2APIC}; mov byte ptr [0x200010], 1; sti; l: cmp qword ptr [0x200008], {rounds}; jne l; cli; {END}",
    ]
    first, found = bench.run(9, programs, handlers=handlers)
    assert found == [rounds, rounds]
    assert bench.run(9, programs, handlers=handlers, disturb=True)[0] == first


def test_a_processor_that_was_started_by_sipi_repeats(bench: Bench) -> None:
    program = (
        f"{X2APIC}; {icr(INIT)}; {icr(STARTUP | TRAMPOLINE >> 12)}; xor ebx, ebx;"
        f"l: inc rbx; cmp dword ptr [0x300], 0; je l; {END}"
    )
    other = "xor ax, ax; mov ds, ax; mov ax, 0x7000; l: dec ax; jnz l; mov dword ptr [0x300], 1; h: cli; hlt; jmp h"
    first, _ = bench.run(4, [program], trampoline=other)
    spins = A.Exit.FromString(next(raw for index, raw in first if index == 0)).registers.rbx
    assert spins > 1000, "both ran meanwhile"
    assert bench.run(4, [program], trampoline=other, disturb=True)[0] == first


def test_clocks_and_random_numbers_are_the_machine_s_own(bench: Bench) -> None:
    """TSC, reference counter, PIT, RTC, ACPI timer, RDRAND and RDSEED: each result is in an exit."""
    show = "mov rbx, rax; vmmcall;"
    program = (
        f"rdtsc; {show} rdtscp; {show} rdrand rax; {show} rdseed eax; {show} "
        f"mov ecx, 0x40000020; rdmsr; {show} mov al, 0; out 0x43, al; in al, 0x40; {show} "
        f"mov al, 0; out 0x70, al; in al, 0x71; {show} mov al, 9; out 0x70, al; in al, 0x71; {show} "
        f"mov edx, 0x608; in eax, dx; {show} rdtsc; {show} {END}"
    )
    first, _ = bench.run(11, [program])
    exits = [A.Exit.FromString(raw) for _, raw in first]
    values = [exit_.registers.rbx for exit_ in exits]
    assert bench.run(11, [program])[0] == first
    assert values[2] > 1 << 40
    assert values[2] != A.Exit.FromString(bench.run(12, [program])[0][2][1]).registers.rbx
    assert values[-2] - values[0] < 200 * BLOCK_NANOSECONDS, "nothing passes while an exit is served"
    assert values[7] & 0xFF == 0x25, "the year 2025"
