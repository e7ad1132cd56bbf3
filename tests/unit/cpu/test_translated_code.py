"""What the engine makes of the guest's code has a bound; what comes behind it is translated anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.load.processes import translated
from tests.unit.cpu.machine import Guest
from vtl0_guest.cpu import engine
from vtlab.ram import Ram

ROUTINE, ROUNDS = 0x140000, 6000
BOUND = 1 << 20
# The kernel gives memory in large pages.
LARGE_PAGE = 2 << 20


@pytest.mark.parametrize(("bound", "grows"), [(BOUND, False), (engine.TRANSLATED_CODE, True)], ids=["small", "own"])
def test_code_that_changes_for_ever(
    ram: Ram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int, grows: bool
) -> None:
    """Each round makes another function of 400 bytes and calls it; the sum shows that none ran in an old form."""
    monkeypatch.setattr(engine, "TRANSLATED_CODE", bound)
    guest = Guest(ram, tmp_path)
    try:
        guest.long_mode(
            f"xor ebx, ebx; mov ebp, {ROUNDS}; again: mov rdi, {ROUTINE}; mov ecx, 80; mov al, 0x05; cld;"
            "fill: mov byte ptr [rdi], al; mov dword ptr [rdi + 1], ebp; add rdi, 5; dec ecx; jnz fill;"
            f"mov byte ptr [rdi], 0xc3; xor eax, eax; mov rdi, {ROUTINE}; call rdi; add rbx, rax;"
            "dec ebp; jnz again; vmmcall"
        )
        before = translated(os.getpid())
        assert guest.run() == "hypercall"
        sums = (80 * number & 0xFFFF_FFFF for number in range(1, ROUNDS + 1))
        assert guest.exit.registers.rbx == sum(sums)
        grown = translated(os.getpid()) - before
        assert (grown > BOUND + LARGE_PAGE) is grows, grown
    finally:
        guest.close()
