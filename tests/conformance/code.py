"""Machine code of rows. Arguments are RCX, RDX, R8, the result is RAX; it ends with RET, at CPL3 with INT 0x80.

`*_AT` is the offset of the instruction that a row is about, in bytes.
"""

from __future__ import annotations

from typing import Final

from vtlab_conformance.layout import CPU_CALL, CPU_PAGE, CPU_RETURN, USER_RETURN

RET: Final = bytes.fromhex("c3")
READ_CR0: Final = bytes.fromhex("0f20c0 c3")
READ_CR4: Final = bytes.fromhex("0f20e0 c3")
# mov rax, crN; xor rax, rdx; mov crN, rax; mov rax, crN
CHANGE_CR0: Final = bytes.fromhex("0f20c0 4831d0 0f22c0 0f20c0 c3")
CHANGE_CR4: Final = bytes.fromhex("0f20e0 4831d0 0f22e0 0f20e0 c3")
CHANGE_CR_AT: Final = 6
# rdmsr; shl rdx, 32; or rax, rdx
RDMSR: Final = bytes.fromhex("0f32 48c1e220 4809d0 c3")
# mov eax, r8d; mov rdx, r8; shr rdx, 32; wrmsr
WRMSR: Final = bytes.fromhex("4489c0 4c89c2 48c1ea20 0f30 c3")
WRMSR_AT: Final = 10
LOAD: Final = bytes.fromhex("488b02 c3")  # mov rax, [rdx]
STORE: Final = bytes.fromhex("4c8902 c3")  # mov [rdx], r8
CALL: Final = bytes.fromhex("ffd2 c3")  # call rdx
LGDT: Final = bytes.fromhex("0f0112 c3")
LIDT: Final = bytes.fromhex("0f011a c3")
SGDT: Final = bytes.fromhex("0f0102 c3")
SIDT: Final = bytes.fromhex("0f010a c3")
LLDT: Final = bytes.fromhex("0f00d2 c3")
LTR: Final = bytes.fromhex("0f00da c3")
# xor ecx, ecx; mov eax, r8d; xor edx, edx; xsetbv
XSETBV: Final = bytes.fromhex("31c9 4489c0 31d2 0f01d1 c3")
XSETBV_AT: Final = 7
IN_BYTE: Final = bytes.fromhex("31c0 ec c3")  # xor eax, eax; in al, dx
IN_AT: Final = 2
OUT_BYTE: Final = bytes.fromhex("4488c0 ee c3")  # mov al, r8b; out dx, al
OUT_DWORD: Final = bytes.fromhex("4489c0 ef c3")
HALT: Final = bytes.fromhex("f4 c3")
SPIN: Final = bytes.fromhex("f390 ebfc")  # pause; jmp
# mov eax, ecx; xor ecx, ecx; push rbx; cpuid; mov eax, ebx; pop rbx
CPUID_EBX: Final = bytes.fromhex("89c8 31c9 53 0fa2 89d8 5b c3")
# mov rax, dr0; mov dr0, rdx
READ_DR0: Final = bytes.fromhex("0f21c0 c3")
WRITE_DR0: Final = bytes.fromhex("0f23c2 c3")
READ_CR2: Final = bytes.fromhex("0f20d0 c3")
WRITE_CR2: Final = bytes.fromhex("0f22d2 c3")
# call gs:[CPU_CALL], gs:[CPU_RETURN]: the VTL switches of the hypercall page, control input in RCX
VTL_CALL: Final = bytes.fromhex("65ff1425") + CPU_CALL.to_bytes(4, "little") + RET
VTL_RETURN: Final = bytes.fromhex("65ff1425") + CPU_RETURN.to_bytes(4, "little") + RET
# xor eax, eax; call gs:[CPU_PAGE]: the hypercall page, input value in RCX
CALL_PAGE: Final = bytes.fromhex("31c0 65ff1425") + CPU_PAGE.to_bytes(4, "little") + RET
# mov r9, rdx; mov ecx, TIME_REF_COUNT; rdmsr; shl rdx, 32; or rax, rdx; add rax, r9; mov rdx, rax; shr rdx, 32;
# mov ecx, STIMER0_COUNT; wrmsr
ARM: Final = bytes.fromhex("4989d1 b920000040 0f32 48c1e220 4809d0 4c01c8 4889c2 48c1ea20 b9b1000040 0f30 c3")
USER_END: Final = bytes((0xCD, USER_RETURN))
