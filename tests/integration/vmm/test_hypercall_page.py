"""The hypercall page is laid over a page before VTL1 seals that one: what runs must be what was sealed and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from tests.waiting import wait_until
from vtlab.client import Lab, Machine
from vtlab.errors import Refused
from vtlab.hyperv.msrs import HvMsr
from vtlab.v1.vcpu_pb2 import IMAGE_FORMAT_FLAT, START_MODE_LONG

PAGE = 0x1000
LOAD, STACK = 0x10_0000, 0x18_0000
CHECK = LOAD + PAGE  # a function that VTL0 is to run as it was measured
READY, GO, RESULT, SEEN, DONE = (0x20_0000 + 8 * number for number in range(5))
RAN, STORED = 0x600D, 0x5E_1F
TIMEOUT = 60.0
POLICY = f"""\
version: 1
name: hypercall page
memory:
  - {{name: text, gpa: {LOAD:#x}, size: {PAGE:#x}, access: r-x}}
  - {{name: check, gpa: {CHECK:#x}, size: {PAGE:#x}, access: r-x}}
  - {{name: everything else, default: true, access: rw-, execute: none}}
violation: {{default: skip}}
"""


def _assemble(code: str, at: int) -> bytes:
    encoding, _ = Ks(KS_ARCH_X86, KS_MODE_64).asm(code, at)
    return bytes(encoding).ljust(PAGE, b"\xcc")


def _wrmsr(index: int, value: int) -> str:
    return f"mov ecx, {index}; mov eax, {value & 0xFFFFFFFF}; mov edx, {value >> 32}; wrmsr"


TEXT = _assemble(
    f"""
    mov esp, {STACK}
    {_wrmsr(HvMsr.GUEST_OS_ID, 0x8F00 << 48)}
    {_wrmsr(HvMsr.HYPERCALL, CHECK | 1)}
    mov byte ptr [{READY}], 1
    wait_go: cmp byte ptr [{GO}], 0; je wait_go
    mov ecx, 0x7fff
    mov r11d, {CHECK}; call r11
    {_wrmsr(HvMsr.HYPERCALL, 0)}
    mov dword ptr [{CHECK}], {STORED}
    mov eax, dword ptr [{CHECK}]; mov dword ptr [{SEEN}], eax
    mov byte ptr [{DONE}], 1
    spin: jmp spin
    """,
    LOAD,
)
CODE = _assemble(f"mov dword ptr [{RESULT}], {RAN}; ret", CHECK)
INT3 = b"\xcc" * PAGE
Boot = Callable[[bytes], Machine]


def value(machine: Machine, gpa: int) -> int:
    return int.from_bytes(machine.read_memory(gpa, 4), "little")


@pytest.fixture
def boot(lab: Lab) -> Iterator[Boot]:
    """A machine whose hypercall page lies over a page of that content, and that waits."""
    made: list[Machine] = []

    def run(content: bytes) -> Machine:
        machine = lab.create(
            TEXT + content,
            ram=16 << 20,
            image_format=IMAGE_FORMAT_FLAT,
            load_address=LOAD,
            entry=LOAD,
            start_mode=START_MODE_LONG,
            stop_on_reset=True,
        )
        made.append(machine)
        lab.policy.set(machine, POLICY)
        machine.start()
        wait_until(lambda: value(machine, READY) == 1, TIMEOUT)
        return machine

    yield run
    for machine in made:
        machine.destroy()


def test_what_runs_is_not_what_lies_there(boot: Boot) -> None:
    """The attack is one: unprotected, the function is in RAM as it was, and does not run."""
    machine = boot(CODE)
    machine.write_memory(GO, b"\x01")
    wait_until(lambda: value(machine, DONE) == 1, TIMEOUT)
    assert value(machine, RESULT) == 0
    assert value(machine, SEEN) == STORED


def test_it_cannot_hide_what_is_sealed(boot: Boot) -> None:
    """Nobody is told that the function is measured while another one runs in its place."""
    machine = boot(CODE)
    with pytest.raises(Refused, match="VTL0's hypercall page hides one of the pages"):
        machine.guard()
    assert not machine.info().vtl1_enabled
    with pytest.raises(Refused, match="VTL0's hypercall page hides one of the pages"):
        machine.guard()


def test_over_a_page_with_nothing_to_hide_it_may_lie(boot: Boot) -> None:
    """Hypercalls are made as before; taken away, it leaves a page that is sealed as the policy says."""
    machine = boot(INT3)
    machine.guard()
    machine.write_memory(GO, b"\x01")
    wait_until(lambda: value(machine, DONE) == 1, TIMEOUT)
    assert value(machine, SEEN) == 0xCCCCCCCC
    assert value(machine, CHECK) == 0xCCCCCCCC
