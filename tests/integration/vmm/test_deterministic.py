"""Runs that repeat, in three real processes: the same seed gives the same exits, byte for byte."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from keystone import KS_ARCH_X86, KS_MODE_16, Ks

from tests.integration.vmm import images
from vmm.cli.exit_log import line
from vmm.cli.main import main
from vtlab.client import Lab
from vtlab.client.driver import READY
from vtlab.errors import BadArgument
from vtlab.v1 import vmm_pb2
from vtlab.v1.vcpu_pb2 import IMAGE_FORMAT_FLAT, PERSONALITY_GUEST_CODE, START_MODE_PROTECTED

TIMEOUT = 60.0
GDT = struct.pack("<2Q", 0, 0x00CF_9B00_0000_FFFF)
TRAMPOLINE, SUM, ENDED, TICKS, IDT = 0x8000, 0x9000, 0x9004, 0x9008, 0x7000
ROUNDS = 60_000

# Adds to a sum without LOCK, in two blocks, and shows it by CPUID of a hypervisor's leaf at every 4096th step.
_ADD = """
    mov ecx, {rounds}
again:
    mov eax, dword ptr [{sum}]
    jmp next
next:
    inc eax
    mov dword ptr [{sum}], eax
    test ecx, 0xfff
    jnz quiet
    push ecx
    mov ebx, eax
    mov eax, 0x40000000
    cpuid
    pop ecx
quiet:
    dec ecx
    jnz again
    lock inc dword ptr [{ended}]
"""
_TICK = (
    f"push eax; push ebx; push ecx; push edx; inc dword ptr [{TICKS}]; mov al, 0x20; out 0x20, al;"
    "mov eax, 0x40000000; cpuid; pop edx; pop ecx; pop ebx; pop eax; iretd"
)


def _code(text: str, at: int, bits: int = 32) -> bytes:
    if bits == 16:
        return bytes(Ks(KS_ARCH_X86, KS_MODE_16).asm(text.replace("\n", ";"), at)[0])
    return images.assemble(text)


def _racing_image() -> bytes:
    """Both processors add; the boot processor takes timer ticks meanwhile, then ends the machine with the sum."""
    ap = _code(
        "xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7000;"
        + _ADD.format(rounds=ROUNDS, sum=SUM, ended=ENDED).strip().replace("\n", ";")
        + "; stop: cli; hlt; jmp stop",
        0,
        16,
    )
    tick_at = images.LOAD + 0x800
    boot = _code(
        f"mov esp, 0x70000; mov esi, {images.LOAD + 0x400}; mov edi, {TRAMPOLINE}; mov ecx, 0x200; rep movsb;"
        f"mov dword ptr [{IDT + 0x20 * 8}], {(8 << 16) | (tick_at & 0xFFFF)};"
        f"mov dword ptr [{IDT + 0x20 * 8 + 4}], {(tick_at & 0xFFFF0000) | 0x8E00};"
        f"push {IDT}; push {0x7FF << 16}; lidt [esp + 2]; push {images.LOAD + 0xC00}; push {0xF << 16}; lgdt [esp + 2];"
        "push 8; call reload; jmp loaded; reload: retf; loaded: "
        "mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al;"
        "mov al, 0xfe; out 0x21, al; mov al, 0x34; out 0x43, al; mov al, 0x50; out 0x40, al; mov al, 2; out 0x40, al;"
        f"mov edi, 0xfee00300; mov dword ptr [0xfee000f0], 0x1ff; mov dword ptr [edi], 0xc4500;"
        f"mov dword ptr [edi], {0xC4600 | TRAMPOLINE >> 12}; mov dword ptr [edi], {0xC4600 | TRAMPOLINE >> 12}; sti;"
        + _ADD.format(rounds=ROUNDS, sum=SUM, ended=ENDED).strip().replace("\n", ";")
        + f"; wait: pause; cmp dword ptr [{ENDED}], 2; jne wait; cli;"
        "mov edx, 0x3f8; mov al, 0x78; out dx, al;"
        f"mov eax, [{SUM}]; out 0xf4, eax; hlt",
        images.LOAD,
    )
    assert len(boot) <= 0x400
    return (boot.ljust(0x400, b"\x90") + ap).ljust(0x800, b"\x90") + _code(_TICK, tick_at).ljust(0x400, b"\x90") + GDT


def _exits(lab: Lab, seed: int) -> tuple[list[str], int]:
    """The log of a run of that image, and the sum that it came to."""
    with lab.create(
        _racing_image(),
        ram=16 << 20,
        vp_count=2,
        image_format=IMAGE_FORMAT_FLAT,
        load_address=images.LOAD,
        entry=images.LOAD,
        start_mode=START_MODE_PROTECTED,
        deterministic=seed,
    ) as machine:
        machine.start()
        end = machine.wait_state(vmm_pb2.MACHINE_STATE_STOPPED, timeout=TIMEOUT)
        events = list(machine.events(["exit", "serial", "lost"], until_now=True))
        ticks = int.from_bytes(machine.read_memory(TICKS, 4), "little")
    assert ticks > 2
    assert not any(event.HasField("lost") for event in events)
    return [line(number, event) for number, event in enumerate(events)], end.debug_exit


def test_two_processors_that_race_do_the_same_each_time(lab: Lab) -> None:
    first, total = _exits(lab, 7)
    assert ROUNDS < total < 2 * ROUNDS, "additions were lost"
    assert len(first) > 2 * ROUNDS // 4096
    assert _exits(lab, 7) == (first, total)
    assert _exits(lab, 8) != (first, total)


def test_a_guest_boots_into_protection_the_same_each_time(lab: Lab, image: Path) -> None:
    logs = []
    for _ in range(2):
        with lab.create(image, command_line="heki=1", vp_count=2, deterministic=3) as machine:
            machine.start()
            machine.wait_serial(READY, port=0, timeout=TIMEOUT)
            machine.pause()
            events = list(machine.events(["exit", "serial", "lost"], until_now=True))
            logs.append([line(number, event) for number, event in enumerate(events)])
    assert logs[0] == logs[1]
    assert sum("hypercall" in entry for entry in logs[0]) >= 5, "VTL1 was set up"


def test_two_exit_logs_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    for name in ("VTLAB_VMM", "VTLAB_MONITOR", "VTLAB_TRUST"):
        monkeypatch.delenv(name, raising=False)
    image, logs = tmp_path / "image", [tmp_path / "first", tmp_path / "second"]
    image.write_bytes(_racing_image())
    for log in logs:
        how = ["--flat", f"{images.LOAD:#x},protected", "-smp", "2", "-m", "16M", "--deterministic", "7"]
        assert main(["run", str(image), *how, "--exit-log", str(log)]) & 1, capfd.readouterr().err
    text = logs[0].read_text()
    assert text == logs[1].read_text()
    assert {entry.split()[2] for entry in text.splitlines()} >= {"cpuid", "serial", "debug_exit"}


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ({"deterministic": 1, "personality": PERSONALITY_GUEST_CODE}, "spec.deterministic"),
        ({"deterministic": -1}, "deterministic"),
        ({"deterministic": 1 << 64}, "deterministic"),
    ],
)
def test_what_cannot_repeat_is_refused(lab: Lab, image: Path, wanted: dict[str, int], complaint: str) -> None:
    with pytest.raises(BadArgument, match=complaint):
        lab.create(image, **wanted)  # type: ignore[arg-type]
