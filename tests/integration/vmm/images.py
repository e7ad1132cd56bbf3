"""Small guests for the VMM's tests: 32-bit protected mode, flat, no paging, no IDT."""

from __future__ import annotations

from keystone import KS_ARCH_X86, KS_MODE_32, Ks

LOAD = 0x10_0000
RESULT = 0x20_0000

# Ends with the value of EAX: the exit value is what QEMU's isa-debug-exit is given.
FINISH = "out 0xf4, eax\n hlt"


def assemble(code: str) -> bytes:
    """Machine code at LOAD."""
    encoding, _ = Ks(KS_ARCH_X86, KS_MODE_32).asm(code, LOAD)
    return bytes(encoding)


COUNTER = assemble(f"xor eax, eax\n again: inc dword ptr [{RESULT}]\n jmp again")
"""Counts in memory for ever."""

HALTED = assemble("mov eax, 0x4a17\n cli\n again: hlt\n jmp again")
IDLE = assemble("mov eax, 0x4a17\n sti\n again: hlt\n jmp again")

ECHO = assemble(
    """
    again:
    mov edx, 0x3fd
    in al, dx
    test al, 1
    jz again
    mov edx, 0x3f8
    in al, dx
    inc al
    out dx, al
    jmp again
    """
)
"""Answers each byte on COM1 with the next one in the alphabet."""

RESET_ONCE_SEEN = assemble(
    f"""
    mov eax, dword ptr [{RESULT}]
    mov dword ptr [{RESULT}], 0x5ec4e7
    test eax, eax
    jnz dirty
    mov eax, dword ptr [0x300000]
    test eax, eax
    jnz dirty
    mov edx, 0xcf9
    mov al, 6
    out dx, al
    hlt
    dirty:
    {FINISH}
    """
)
"""Leaves a secret and resets; would end only if a reset ever kept it."""

TRIPLE_FAULT = assemble("ud2")


def hypercall(low: int, rdx: str = "0", finish: str = FINISH) -> bytes:
    """A 32-bit hypercall whose input is at RESULT; ends with EAX, the low half of the result."""
    return assemble(
        f"mov eax, {low:#x}\n xor edx, edx\n xor ebx, ebx\n mov ecx, {RESULT}\n xor edi, edi\n mov esi, {rdx}\n"
        f"vmmcall\n {finish}"
    )


FW_CFG_DMA = assemble(
    f"""
    mov dword ptr [{RESULT}], 0x0a000000      /* SELECT | READ, key 0: the signature */
    mov dword ptr [{RESULT} + 4], 0x04000000  /* 4 bytes */
    mov dword ptr [{RESULT} + 8], 0
    mov dword ptr [{RESULT} + 12], 0x00003000 /* to 0x300000 */
    mov edx, 0x514
    xor eax, eax
    out dx, eax
    mov edx, 0x518
    mov eax, {int.from_bytes(RESULT.to_bytes(4, "big"), "little"):#x}
    out dx, eax
    mov eax, dword ptr [0x300000]
    {FINISH}
    """
)
