"""Running a benchmark's image in a real machine, and the same bytes on a bare engine."""

from __future__ import annotations

import time
from dataclasses import dataclass

from unicorn import UC_ARCH_X86, UC_HOOK_INSN, UC_MODE_32, Uc
from unicorn.x86_const import UC_CPU_X86_EPYC, UC_X86_INS_OUT

from tests.bench.guest import DEBUG_EXIT_PORT, LOAD, RESULTS, STATUS, WINDOW, FlatImage, assemble
from tests.bench.vtl import PAGE_SIZE, PROTECT_TICKS, ticks
from vtlab.client import Lab, Machine
from vtlab.v1.vcpu_pb2 import IMAGE_FORMAT_FLAT, START_MODE_PROTECTED
from vtlab.v1.vmm_pb2 import MACHINE_STATE_STOPPED

RAM = 64 << 20
PATIENCE = 60.0  # seconds for one run


@dataclass(frozen=True)
class Run:
    """One run of an image.

    Attributes:
        rounds: TSC ticks of each round of the body.
        sealing: of the prologue's sealing calls; 0 without.
        memory: the first page of the window afterwards: what was computed.
    """

    rounds: list[int]
    sealing: int
    memory: bytes


def create(lab: Lab, image: FlatImage, ram: int = RAM, vtl1: bool = False) -> Machine:
    """A machine with that image, not started."""
    return lab.create(
        image.data,
        ram=ram,
        vtl1=vtl1,
        image_format=IMAGE_FORMAT_FLAT,
        load_address=image.load_address,
        entry=image.entry,
        start_mode=START_MODE_PROTECTED,
    )


def in_machine(lab: Lab, image: FlatImage, ram: int = RAM, vtl1: bool = False) -> Run:
    """Boots the image in a machine of its own, waits for its end, reads its results and destroys it.

    Raises RuntimeError if VTL1 refused what the prologue asked for.
    """
    with create(lab, image, ram, vtl1) as machine:
        machine.start()
        machine.wait_state(MACHINE_STATE_STOPPED, timeout=PATIENCE)
        status = ticks(machine.read_memory(STATUS, 8))[0]
        if status:
            raise RuntimeError(f"the guest met status {status - (status >> 63 << 64)} ({status:#x}) while it set up")
        rounds = ticks(machine.read_memory(RESULTS, 8 * image.rounds))
        (sealing,) = ticks(machine.read_memory(PROTECT_TICKS, 8))
        return Run(rounds, sealing, machine.read_memory(WINDOW, PAGE_SIZE))


def on_bare_engine(image: FlatImage, ram: int = RAM) -> Run:
    """Runs the same bytes on Unicorn alone: no interception, no nested paging, no hook but the end's."""
    engine = Uc(UC_ARCH_X86, UC_MODE_32)
    engine.ctl_set_cpu_model(UC_CPU_X86_EPYC)
    engine.mem_map(0, ram)
    engine.mem_write(image.load_address, image.data)

    def out(uc: Uc, port: int, size: int, value: int, user: object) -> None:
        if port == DEBUG_EXIT_PORT:
            uc.emu_stop()

    engine.hook_add(UC_HOOK_INSN, out, None, 1, 0, UC_X86_INS_OUT)
    engine.emu_start(image.entry, 0xFFFF_FFFF)
    rounds = ticks(bytes(engine.mem_read(RESULTS, 8 * image.rounds)))
    return Run(rounds, 0, bytes(engine.mem_read(WINDOW, PAGE_SIZE)))


def ticks_per_second(seconds: float = 0.2) -> float:
    """Frequency of the TSC that the guests read: they see the host's."""
    code = assemble(f"rdtsc\nmov [{STATUS}], eax\nmov [{STATUS + 4}], edx\nhlt", LOAD, 32)
    engine = Uc(UC_ARCH_X86, UC_MODE_32)
    engine.mem_map(0, RAM)
    engine.mem_write(LOAD, code)

    def read() -> tuple[int, float]:
        engine.emu_start(LOAD, 0xFFFF_FFFF)
        now = time.perf_counter()
        return ticks(bytes(engine.mem_read(STATUS, 8)))[0], now

    read()
    first_ticks, first = read()
    time.sleep(seconds)
    last_ticks, last = read()
    return (last_ticks - first_ticks) / (last - first)
