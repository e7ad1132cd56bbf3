"""Code written through another mapping of its page runs as written."""

from __future__ import annotations

import struct

from tests.unit.cpu.machine import PT, Guest

WRITTEN, RUN, SECOND = 0x140000, 0x150000, 0x140800


def aliased(guest: Guest, code: str) -> None:
    """Loads code that finds the page at WRITTEN at RUN too, with "mov eax, 1; ret" at its start and at 0x800."""
    guest.long_mode(
        f"mov rdi, {WRITTEN}; mov rsi, {RUN}; lea r8, [rsi + 0x800];"
        "mov byte ptr [rdi], 0xb8; mov dword ptr [rdi + 1], 1; mov byte ptr [rdi + 5], 0xc3;"
        "mov byte ptr [rdi + 0x800], 0xb8; mov dword ptr [rdi + 0x801], 1; mov byte ptr [rdi + 0x805], 0xc3;" + code
    )
    guest.poke(PT + 8 * (RUN >> 12), struct.pack("<Q", WRITTEN | 7))
    guest.poke(PT + 8 * (WRITTEN >> 12), struct.pack("<Q", WRITTEN | 7 | 1 << 63))


def test_a_store_through_another_mapping_changes_code(guest: Guest) -> None:
    aliased(guest, "call rsi; mov ebx, eax; mov dword ptr [rdi + 1], 2; call rsi; vmmcall")
    assert guest.run() == "hypercall"
    assert (guest.exit.registers.rbx, guest.exit.registers.rax) == (1, 2)


def test_a_store_beside_code_does_not_hide_the_next_one(guest: Guest) -> None:
    aliased(
        guest,
        "call rsi; call r8; mov dword ptr [rdi + 0x801], 2; call r8; mov ebx, eax;"
        "mov dword ptr [rdi + 0x400], 5; mov dword ptr [rdi + 1], 3; call rsi; vmmcall",
    )
    assert guest.run() == "hypercall"
    assert (guest.exit.registers.rbx, guest.exit.registers.rax) == (2, 3)
