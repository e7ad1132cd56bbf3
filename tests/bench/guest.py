"""Machine code for the benchmarks: one flat image that also runs on a bare engine.

The image starts in 32-bit protected mode, sets up its own GDT and 4-level page tables (identity, 1 GiB by 2 MiB pages,
with a window of 4 KiB pages for memory traffic), goes to long mode, runs a body a number of rounds and stores the TSC
ticks of each round. It ends by writing to the debug-exit port.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from keystone import KS_ARCH_X86, KS_MODE_32, KS_MODE_64, Ks

LOAD = 0x10_0000
LONG_OFFSET = 0x100  # of the 64-bit code
TABLES_OFFSET = 0x1000  # PML4, PDPT, PD, then one page table for each 2 MiB of the window
DATA = LOAD + 0x1_0000  # where the data of an image starts
STACK = 0x9_0000
RESULTS = 0x9_8000  # one 64-bit word a round
STATUS = 0x9_7000  # 0, or what the prologue met that it did not expect
WINDOW = 32 << 20  # guest-physical and virtual address of the 4 KiB pages
WINDOW_SIZE = 16 << 20
DEBUG_EXIT_PORT = 0xF4

_LARGE = 2 << 20
_PRESENT_WRITABLE_ACCESSED_DIRTY = 0x63
_PAGE_SIZE_BIT = 0x80
_GDT = struct.pack("<QQQ", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)  # null, 64-bit code, data
_GDT_OFFSET = 0xC0


@dataclass(frozen=True)
class FlatImage:
    """A flat image and how to start it: in 32-bit protected mode at `entry`, loaded at `load_address`."""

    data: bytes
    rounds: int
    load_address: int = LOAD
    entry: int = LOAD


def assemble(source: str, address: int, bits: int = 64) -> bytes:
    """Machine code of Intel-syntax `source` at `address`. Raises keystone.KsError for what it cannot read."""
    encoding, _ = Ks(KS_ARCH_X86, KS_MODE_64 if bits == 64 else KS_MODE_32).asm(source, address)
    return bytes(encoding)


def _page_tables() -> bytes:
    base = LOAD + TABLES_OFFSET
    windows = range(WINDOW // _LARGE, (WINDOW + WINDOW_SIZE) // _LARGE)
    tables = {number: base + 0x3000 + index * 0x1000 for index, number in enumerate(windows)}
    directory = [
        (tables[number] | _PRESENT_WRITABLE_ACCESSED_DIRTY)
        if number in tables
        else number * _LARGE | _PAGE_SIZE_BIT | _PRESENT_WRITABLE_ACCESSED_DIRTY
        for number in range(512)
    ]
    pages = [[base + 0x1000 | 0x63], [base + 0x2000 | 0x63], directory]
    pages += [[number * _LARGE + i * 0x1000 | 0x63 for i in range(512)] for number in windows]
    return b"".join(struct.pack(f"<{len(page)}Q", *page).ljust(0x1000, b"\0") for page in pages)


def _start() -> bytes:
    """32-bit code: to long mode, with write protection and no-execute on."""
    code = assemble("cli", LOAD, 32)
    code += b"\x0f\x01\x15" + struct.pack("<I", LOAD + _GDT_OFFSET - 8)  # lgdt [pointer]
    code += assemble(
        f"""mov eax, cr4
        or eax, 0x20
        mov cr4, eax
        mov eax, {LOAD + TABLES_OFFSET}
        mov cr3, eax
        mov ecx, 0xC0000080
        rdmsr
        or eax, 0x900
        wrmsr
        mov eax, cr0
        or eax, 0x80010001
        mov cr0, eax""",
        LOAD + len(code),
        32,
    )
    return code + b"\xea" + struct.pack("<IH", LOAD + LONG_OFFSET, 8)  # jmp 8:long


def build(body: str, rounds: int, prologue: str = "", data: bytes = b"") -> FlatImage:
    """An image that runs `body` (64-bit code; may use all registers but R13-R15 and RSP) `rounds` times.

    `prologue` runs once before the first round. `data` is loaded at DATA. Each round begins with a load of CR3, as a
    guest that switches address spaces would: the engine resizes its TLB by use, and only when that is flushed.
    """
    long_code = assemble(
        f"""mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov rsp, {STACK}
        {prologue}
        mov r15, {RESULTS}
        mov r14, {rounds}
        next_round:
        mov rax, cr3
        mov cr3, rax
        rdtsc
        shl rdx, 32
        or rax, rdx
        mov r13, rax
        {body}
        rdtsc
        shl rdx, 32
        or rax, rdx
        sub rax, r13
        mov [r15], rax
        add r15, 8
        dec r14
        jnz next_round
        finish:
        xor eax, eax
        out {DEBUG_EXIT_PORT}, al
        end:
        cli
        hlt
        jmp end""",
        LOAD + LONG_OFFSET,
    )
    image = bytearray(_start().ljust(_GDT_OFFSET - 8, b"\0"))
    image += struct.pack("<HI", len(_GDT) - 1, LOAD + _GDT_OFFSET).ljust(8, b"\0") + _GDT
    image = image.ljust(LONG_OFFSET, b"\0") + long_code
    if len(image) > TABLES_OFFSET:
        raise ValueError(f"the code has {len(image)} bytes, more than {TABLES_OFFSET}")
    image = image.ljust(TABLES_OFFSET, b"\0") + _page_tables()
    return FlatImage(bytes(image.ljust(DATA - LOAD, b"\0") + data), rounds)


def _quarter_round(a: str, b: str, c: str, d: str) -> str:
    """Of ChaCha (RFC 8439, section 2.1)."""
    steps = ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7))
    return "".join(f"add {x}, {y}\nxor {z}, {x}\nrol {z}, {bits}\n" for x, y, z, bits in steps)


# A cipher: rounds of ChaCha on eight registers, with a table lookup and a store; blocks of about thirty instructions.
COMPUTE = f"""
mov rcx, 400000
mov rdi, {WINDOW}
mov eax, 0x61707865
mov ebx, 0x3320646e
mov edx, 0x79622d32
mov esi, 0x6b206574
mov r8d, 1
mov r9d, 2
mov r10d, 3
mov r11d, 4
compute_loop:
{_quarter_round("eax", "ebx", "edx", "esi")}
{_quarter_round("r8d", "r9d", "r10d", "r11d")}
mov ebp, eax
and ebp, 0xFFF
add r8d, [rdi + rbp]
mov [rdi + rbp], r10d
dec rcx
jnz compute_loop
"""

# Branches, calls and the stack, about four instructions a block: what the core's hook at each block weighs most on.
BRANCHES = """
mov rcx, 500000
mov rax, 1
mov rbx, 0x9E3779B97F4A7C15
branch_loop:
imul rax, rbx
xor rax, rcx
rol rax, 13
test al, 1
jz branch_even
add rax, rcx
shr rax, 3
branch_even:
push rax
call branch_leaf
pop rdx
add rax, rdx
dec rcx
jnz branch_loop
jmp branch_done
branch_leaf:
mov rsi, rax
shl rsi, 7
sub rsi, rax
xor rsi, rbx
lea rax, [rsi + rsi*2 + 7]
bswap rax
ret
branch_done:
"""

# Copies 4 MiB by 8 bytes (2,048 pages, one after the other), then increments words all over 1 MiB. Source and target
# do not share sets of the engine's direct-mapped TLB.
MEMORY = f"""
mov rsi, {WINDOW}
mov rdi, {WINDOW + WINDOW_SIZE // 2 + 0x5_5000}
mov rcx, {WINDOW_SIZE // 4 // 8}
copy_loop:
mov rax, [rsi]
add rax, rcx
mov [rdi], rax
add rsi, 8
add rdi, 8
dec rcx
jnz copy_loop
mov rcx, 500000
xor ebx, ebx
scatter_loop:
add rbx, 0x5040
and rbx, 0xFFFFF
add qword ptr [rbx + {WINDOW}], 1
dec rcx
jnz scatter_loop
"""

# Every access is to another page of 16 MiB: as many TLB entries as the engine ever has, and walks for what it lost.
WALKS = f"""
mov rcx, 200000
xor ebx, ebx
walk_loop:
add rbx, 0x5A5040
and rbx, {WINDOW_SIZE - 1}
add qword ptr [rbx + {WINDOW}], 1
dec rcx
jnz walk_loop
"""
