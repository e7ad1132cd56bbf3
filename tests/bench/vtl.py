"""Guest code that deprivileges itself and has VTL1 seal pages, with the ticks that this took."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.bench.guest import DATA, RESULTS, STATUS
from vtlab.hyperv.hypercalls import PARTITION_SELF, VP_SELF, HypercallCode
from vtlab.hyperv.layouts import INITIAL_VP_CONTEXT_SIZE, EnablePartitionVtlInput, VpHeader
from vtlab.services import HEKI_PAGE, HEKI_PAGE_RANGES, HEKI_RANGE, Rights, Service

PROTECT_TICKS = RESULTS - 8  # TSC ticks of all sealing calls together
PAGES = 100_000
FIRST_PAGE = 64 << 20  # guest-physical address of the first sealed page
CHAIN_RANGES = 4000  # ranges in one PROTECT_MEMORY call
PAGE_SIZE = 4096

_HYPERCALL_PAGE = 0x9_A000
_PARTITION_INPUT = DATA
_VP_INPUT = DATA + 0x100
_POLICY = DATA + 0x400
_CHAINS = DATA + 0x1000


@dataclass(frozen=True)
class Sealing:
    """What the prologue seals.

    Attributes:
        data: of the image.
        code: 64-bit code that makes the calls.
        stride: pages from one sealed page to the next; 0 if none is sealed.
    """

    data: bytes
    code: str
    stride: int = 0


def _call(service: Service, rsi: int = 0, rdx: int = 0) -> str:
    return f"""
    mov edi, {service}
    mov rsi, {rsi}
    mov rdx, {rdx}
    xor eax, eax
    mov ecx, {HypercallCode.VTL_CALL.value}
    vmmcall
    test r8, r8
    jnz refused
    """


def prologue(sealing: Sealing) -> str:
    """64-bit code: enables VTL1 on this processor and seals; on a refusal stores the result and ends the image."""
    return f"""
    mov ecx, 0x40000000
    mov eax, 1
    xor edx, edx
    wrmsr
    inc ecx
    mov eax, {_HYPERCALL_PAGE | 1}
    wrmsr
    mov ecx, {HypercallCode.ENABLE_PARTITION_VTL.value}
    mov edx, {_PARTITION_INPUT}
    vmmcall
    mov r8, rax
    test ax, ax
    jnz refused
    mov ecx, {HypercallCode.ENABLE_VP_VTL.value}
    mov edx, {_VP_INPUT}
    vmmcall
    mov r8, rax
    test ax, ax
    jnz refused
    {_fill(sealing.stride) if sealing.stride else ""}
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov r13, rax
    {sealing.code}
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, r13
    mov rbx, {PROTECT_TICKS}
    mov [rbx], rax
    jmp sealed
    refused:
    mov rbx, {STATUS}
    mov [rbx], r8
    jmp finish
    sealed:
    """


def _fill(stride: int) -> str:
    """Writes to every page that will be sealed: what was never written costs nothing to move."""
    return f"""
    mov rbx, {FIRST_PAGE}
    mov rcx, {PAGES}
    fill:
    mov [rbx], rbx
    add rbx, {stride * PAGE_SIZE}
    dec rcx
    jnz fill
    """


def _data(policy: str, chains: bytes = b"") -> bytes:
    text = policy.encode()
    data = EnablePartitionVtlInput(PARTITION_SELF, 1, 0).encode().ljust(0x100, b"\0")
    data += (VpHeader(PARTITION_SELF, VP_SELF, 1).encode() + bytes(INITIAL_VP_CONTEXT_SIZE)).ljust(0x300, b"\0")
    return (data + text).ljust(_CHAINS - DATA, b"\0") + chains


def _take(policy: str) -> str:
    return _call(Service.TAKE_POLICY, _POLICY, len(policy.encode()))


def nothing() -> Sealing:
    """VTL1 is on and guards nothing."""
    policy = "version: 1\nname: nothing\n"
    return Sealing(_data(policy), _take(policy))


def contiguous() -> Sealing:
    """PAGES pages in one run, by the policy."""
    policy = (
        "version: 1\nname: contiguous\nmemory:\n"
        f"  - {{name: run, gpa: {FIRST_PAGE:#x}, size: {PAGES * PAGE_SIZE:#x}, access: r--}}\n"
    )
    return Sealing(_data(policy), _take(policy), 1)


def scattered() -> Sealing:
    """Every other page of 2 * PAGES pages, by the guest's own requests."""
    policy = "version: 1\nname: scattered\n"
    chains, code, address = bytearray(), _take(policy), _CHAINS
    for first in range(0, PAGES, CHAIN_RANGES):
        pages = [FIRST_PAGE + 2 * n * PAGE_SIZE for n in range(first, min(first + CHAIN_RANGES, PAGES))]
        chain = _heki_pages(pages, address)
        code += _call(Service.PROTECT_MEMORY, address, len(pages))
        chains += chain
        address += len(chain)
    return Sealing(_data(policy, bytes(chains)), code, 2)


def _heki_pages(pages: list[int], address: int) -> bytes:
    """A chain of heki_page structures at `address` that asks for read-only pages."""
    groups = [pages[i : i + HEKI_PAGE_RANGES] for i in range(0, len(pages), HEKI_PAGE_RANGES)]
    chain = b""
    for index, group in enumerate(groups):
        following = address + (index + 1) * PAGE_SIZE if index + 1 < len(groups) else 0
        page = HEKI_PAGE.pack(following, following, len(group))
        page += b"".join(HEKI_RANGE.pack(pa, pa, pa + PAGE_SIZE, Rights.READ) for pa in group)
        chain += page.ljust(PAGE_SIZE, b"\0")
    return chain


# Bodies whose rounds consist of exits alone.
EXITS = 100  # in one round
EXIT_BODY = f"""
mov rdi, {EXITS}
exit_loop:
mov ecx, 0x7FFF
vmmcall
dec rdi
jnz exit_loop
"""
VTL_CALL_BODY = f"""
mov rbx, {EXITS}
call_loop:
{_call(Service.PING)}
dec rbx
jnz call_loop
"""


def ticks(memory: bytes) -> list[int]:
    """64-bit words of a result area."""
    return list(struct.unpack(f"<{len(memory) // 8}Q", memory))
