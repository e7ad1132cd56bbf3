"""What a level leaves to the other one of its vCPU, and what stays its own."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cpu.machine import DATA, Guest
from vtl0_guest.cpu import levels
from vtl0_guest.cpu.core import Core
from vtl0_guest.cpu.devices.platform import build_platform
from vtl0_guest.cpu.level_turns import LevelTurns
from vtlab.hyperv.hypercalls import HypercallCode, encode_input_value
from vtlab.hyperv.msrs import HvMsr
from vtlab.ram import TURN_FILE, Ram, create_turn_file
from vtlab.v1 import registers_pb2, vcpu_pb2

_FILL = """
    mov rax, 0x1122334455667788
    movq xmm0, rax
    movq xmm15, rax
    pslldq xmm15, 8
    fninit
    fld1
    fldpi
    mov dword ptr [rsp - 16], 0x5f80
    ldmxcsr [rsp - 16]
    mov word ptr [rsp - 16], 0x0f7f
    fldcw [rsp - 16]
    mov rax, 5
    mov dr2, rax
    vmmcall
"""
_SHOW = f"""
    movups [{DATA}], xmm0
    movups [{DATA} + 16], xmm15
    fstp qword ptr [{DATA} + 32]
    fstp qword ptr [{DATA} + 40]
    stmxcsr [{DATA} + 48]
    fstcw [{DATA} + 52]
    mov rax, dr2
    mov [{DATA} + 56], rax
    mov [{DATA} + 64], rbx
    mov [{DATA} + 72], rsp
    vmmcall
"""


@pytest.fixture
def upper(ram: Ram, tmp_path: Path) -> Iterator[Guest]:
    """Another level on the same memory."""
    machine = Guest(ram, tmp_path)
    machine.core.close()
    machine.platform = build_platform(1, ram.size)
    machine.core = Core(ram, 1, 1, machine.platform)
    machine.processor = machine.core.processor(0)
    yield machine
    machine.close()


def test_shared_state_passes_and_private_state_stays(guest: Guest, upper: Guest) -> None:
    guest.core.shares_state = True
    guest.long_mode(_FILL)
    assert guest.run() == "hypercall"
    registers, shared = guest.exit.registers, guest.exit.shared
    assert len(shared.fxsave) == 512
    upper.long_mode(_SHOW)
    own = upper.processor.state().registers.rsp
    registers.rbx, registers.rsp = 0xB0B, 0x1234
    exit_ = vcpu_pb2.Exit.FromString(upper.processor.run(vcpu_pb2.Enter(registers=registers, shared=shared)))
    assert exit_.WhichOneof("reason") == "hypercall"
    image = upper.memory[DATA : DATA + 80]
    assert image[:16] == struct.pack("<QQ", 0x1122334455667788, 0)
    assert image[16:32] == struct.pack("<QQ", 0, 0x1122334455667788)
    assert struct.unpack_from("<dd", image, 32) == (3.141592653589793, 1.0)
    mxcsr, control = struct.unpack_from("<IH", image, 48)
    assert (mxcsr & 0x6000, control) == (0x4000, 0x0F7F)
    assert struct.unpack_from("<3Q", image, 56) == (5, 0xB0B, own)


def test_a_broken_image_is_ignored(guest: Guest) -> None:
    guest.long_mode("vmmcall")
    context = guest.processor.context
    before = context.engine.vectors.save()
    levels.load_shared(context, registers_pb2.Registers(), registers_pb2.SharedState(fxsave=b"short", debug=[1] * 9))
    assert context.engine.vectors.save() == before
    assert context.debug[4:] == [0xFFFF0FF0, 0x400]


def test_fast_calls_carry_xmm_registers_and_take_them(guest: Guest) -> None:
    fast = encode_input_value(HypercallCode.GET_VP_REGISTERS, fast=True)
    guest.long_mode(f"mov eax, 7; movd xmm5, eax; mov ecx, {fast}; vmmcall; movups [{DATA}], xmm1; vmmcall")
    assert guest.run() == "hypercall"
    assert guest.exit.hypercall.xmm[80:] == (7).to_bytes(16, "little")
    value = registers_pb2.RegisterValue(
        name=registers_pb2.REGISTER_NAME_XMM0 + 1,  # type: ignore[arg-type]
        vector=bytes(range(16)),
    )
    guest.run(updates=[vcpu_pb2.Update(register=value)])
    assert guest.memory[DATA : DATA + 16] == bytes(range(16))


def test_the_assist_page_tells_why_and_gives_what_a_slow_return_loads(upper: Guest) -> None:
    upper.long_mode(
        f"mov ecx, {int(HvMsr.VP_ASSIST_PAGE)}; mov eax, {DATA | 1}; xor edx, edx; wrmsr; vmmcall"
        "; mov ecx, 0x12; vmmcall"
    )
    upper.run()
    upper.processor.context.hyperv.assist.note_entry(2, 0xAA, 0xCC)
    assert upper.memory[DATA + 8 : DATA + 12] == b"\x02\0\0\0"
    upper.run()
    hypercall = upper.exit.hypercall
    assert (hypercall.return_rax, hypercall.return_rcx, hypercall.interrupt_pending) == (0xAA, 0xCC, False)


# ------------------------------------------------------------------------------------------- whose interrupt is first


@pytest.fixture
def sharing(guest: Guest, upper: Guest, tmp_path: Path) -> tuple[Guest, Guest]:
    """Both levels run guest code, their local APICs on."""
    create_turn_file(tmp_path)
    for machine in (guest, upper):
        machine.core.share(tmp_path / TURN_FILE)
        machine.long_mode("sti; hlt")
        machine.platform.local_apic(0).mmio_write(_SVR, 4, 0x1FF)
        machine.platform.local_apic(0).mmio_write(_LVT_TIMER, 4, _VECTOR)
    return guest, upper


_SVR, _LVT_TIMER, _INITIAL_COUNT, _VECTOR = 0xF0, 0x320, 0x380, 0x50
_LONG = 0xFFFF_FFFF  # ticks: seconds
_EVER = 1e9


def _due_before(lower: Guest, moment: float) -> bool:
    assert isinstance(lower.core.turns.levels, LevelTurns)
    return lower.core.turns.levels.due_before(moment)


def test_the_lower_level_knows_when_a_timer_of_the_higher_one_is_due(sharing: tuple[Guest, Guest]) -> None:
    lower, upper = sharing
    assert not _due_before(lower, _EVER)
    upper.platform.local_apic(0).mmio_write(_INITIAL_COUNT, 4, _LONG)
    assert _due_before(lower, _EVER)
    assert not _due_before(lower, time.monotonic())
    upper.platform.local_apic(0).mmio_write(_INITIAL_COUNT, 4, 0)
    assert not _due_before(lower, _EVER)


def test_an_interrupt_of_the_higher_level_is_due_until_it_is_entered(sharing: tuple[Guest, Guest]) -> None:
    lower, upper = sharing
    upper.platform.local_apic(0).mmio_write(0x300, 4, 1 << 18 | _VECTOR)  # to itself
    assert _due_before(lower, 0)
    assert upper.run() == "hypercall"
    assert upper.vector == _VECTOR
    assert not _due_before(lower, _EVER)


def test_timers_of_the_lower_level_wait_for_what_was_due_before(
    sharing: tuple[Guest, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late the host lets the processes run: here the higher level's does not run at all."""
    lower, upper = sharing
    asked, core = threading.Event(), lower.core
    judge = core._higher_level_first

    def note(due: float) -> bool:
        held = judge(due)
        if held:
            asked.set()
        return held

    monkeypatch.setattr(core, "_higher_level_first", note)
    upper.platform.local_apic(0).mmio_write(0x300, 4, 1 << 18 | _VECTOR)
    lower.platform.local_apic(0).mmio_write(_INITIAL_COUNT, 4, 1)
    assert asked.wait(10)
    assert lower.platform.pending_vector(0) is None
    assert upper.run() == "hypercall"
    assert lower.run() == "hypercall"
    assert lower.vector == _VECTOR


def test_a_higher_level_that_never_comes_in_does_not_stop_the_time_of_the_lower_one(
    sharing: tuple[Guest, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    lower, upper = sharing
    monkeypatch.setattr("vtl0_guest.cpu.core._GIVE_PRECEDENCE", 0.01)
    upper.platform.local_apic(0).mmio_write(0x300, 4, 1 << 18 | _VECTOR)
    lower.platform.local_apic(0).mmio_write(_INITIAL_COUNT, 4, 1)
    assert lower.run() == "hypercall"
    assert lower.vector == _VECTOR
