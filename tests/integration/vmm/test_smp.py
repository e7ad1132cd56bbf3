"""Machines of several vCPUs in three real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from keystone import KS_ARCH_X86, KS_MODE_16, Ks

from tests.integration.vmm import images
from tests.waiting import wait_until
from vtlab.client import Lab, Machine
from vtlab.client.driver import READY, Driver, GuestFault
from vtlab.client.symbols import Symbols
from vtlab.errors import BadArgument
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import IMAGE_FORMAT_FLAT, START_MODE_PROTECTED
from vtlab.x86.registers import Cr4

VP_COUNT = 4
TRAMPOLINE, COUNTERS = 0x8000, 0x9000
TIMEOUT = 30.0

# Counts at 0x9000 + 4 * APIC ID, which CPUID tells; "x" on COM1 and the debug exit once 0x9100 says so.
_AP = """
cld
mov eax, 1
cpuid
shr ebx, 24
shl bx, 2
xor ax, ax
mov ds, ax
again:
inc dword ptr [bx + 0x9000]
cmp byte ptr [0x9100], bl
jne again
mov dx, 0x3f8
mov al, 0x78
out dx, al
mov dx, 0xf4
mov al, bl
out dx, al
hlt
"""


def _image() -> bytes:
    """The boot processor copies the code below 1 MiB, sends INIT and SIPI to all others and counts at 0x9000."""
    code, _ = Ks(KS_ARCH_X86, KS_MODE_16).asm(_AP.replace("\n", ";").strip(";"), 0)
    ap = bytes(code)
    boot = images.assemble(
        f"mov esi, {images.LOAD + 0x400}; mov edi, {TRAMPOLINE}; mov ecx, {len(ap)}; rep movsb;"
        f"mov edi, 0xfee00300; mov dword ptr [0xfee000f0], 0x1ff; mov dword ptr [edi], 0xc4500;"
        f"mov dword ptr [edi], {0xC4600 | TRAMPOLINE >> 12}; mov dword ptr [edi], {0xC4600 | TRAMPOLINE >> 12};"
        f"again: inc dword ptr [{COUNTERS}]; jmp again"
    )
    return boot.ljust(0x400, b"\x90") + ap


@pytest.fixture
def boot(lab: Lab) -> Iterator[Callable[[], Machine]]:
    made: list[Machine] = []

    def start() -> Machine:
        machine = lab.create(
            _image(),
            ram=16 << 20,
            vp_count=VP_COUNT,
            image_format=IMAGE_FORMAT_FLAT,
            load_address=images.LOAD,
            entry=images.LOAD,
            start_mode=START_MODE_PROTECTED,
        )
        made.append(machine)
        machine.start()
        return machine

    yield start
    for machine in made:
        machine.destroy()


def counters(machine: Machine) -> list[int]:
    raw = machine.read_memory(COUNTERS, 4 * VP_COUNT)
    return [int.from_bytes(raw[4 * vp : 4 * vp + 4], "little") for vp in range(VP_COUNT)]


def all_count(machine: Machine) -> None:
    before = counters(machine)
    wait_until(lambda: all(now > old for now, old in zip(counters(machine), before, strict=True)), TIMEOUT)


def test_all_run_pause_go_on_and_start_again_after_a_reset(boot: Callable[[], Machine]) -> None:
    machine = boot()
    all_count(machine)
    machine.pause()
    frozen = counters(machine)
    for vp_index in range(1, VP_COUNT):
        registers = machine.registers(vp_index).registers
        assert (registers.cs.base, registers.cr0 & 1, registers.rbx & 0xFFFF) == (TRAMPOLINE, 0, 4 * vp_index)
    assert machine.registers(0).registers.cr0 & 1
    with pytest.raises(BadArgument, match="vp_index"):
        machine.registers(VP_COUNT)
    assert counters(machine) == frozen
    machine.resume()
    all_count(machine)
    machine.reset()
    all_count(machine)


def test_registers_of_one_vcpu_can_be_set_while_all_run(boot: Callable[[], Machine]) -> None:
    machine = boot()
    all_count(machine)
    machine.set_registers({"R15": 7}, vp_index=2)
    assert [machine.registers(vp).registers.r15 for vp in range(VP_COUNT)] == [0, 0, 7, 0]
    all_count(machine)


def test_any_vcpu_can_end_the_machine_and_its_last_words_are_heard(boot: Callable[[], Machine]) -> None:
    machine = boot()
    all_count(machine)
    machine.write_memory(0x9100, bytes([4 * 3]))
    info = machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED, timeout=TIMEOUT)
    assert info.debug_exit == 4 * 3
    assert machine.serial(0) == "x"


def test_a_protected_guest_with_a_second_vcpu(lab: Lab, image: Path) -> None:
    """From the end of boot on VTL1's intercepts are those of all vCPUs; the second one started before."""
    with lab.create(image, ram=64 << 20, command_line="heki=1", vtl1=True, vp_count=2) as machine:
        machine.start()
        machine.wait_serial(READY, port=0, timeout=TIMEOUT)
        driver = Driver(machine)
        symbols = Symbols(image)
        text = symbols["invlpg"]
        with pytest.raises(GuestFault):
            driver.write(text, 0)
        with pytest.raises(GuestFault):
            driver.call_on(1, symbols["gadget_mov_cr4"], machine.registers(1).registers.cr4 & ~Cr4.SMEP)
        assert machine.registers(1).registers.cr4 & Cr4.SMEP
        machine.pause()
        machine.resume()
        assert driver.read(text, 8)
