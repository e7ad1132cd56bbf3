"""A guest that supplies its own VTL1: 64-bit code assembled here, identity-mapped, one vCPU or more.

VTL0 enables VTL1 and calls it; VTL1 takes what it needs (hypercall page, assist page, local APIC, SynIC), protects a
page, watches CR4.SMEP and answers. What either saw lies in RAM for the test to read.
"""

from __future__ import annotations

from functools import cache

from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from vtlab.client import Lab, Machine
from vtlab.hyperv.hypercalls import PARTITION_SELF, VP_SELF, HypercallCode, encode_input_value
from vtlab.hyperv.msrs import HvMsr
from vtlab.hyperv.registers import HvRegister
from vtlab.hyperv.vsm import VTL_CALL_OFFSET, VTL_RETURN_OFFSET, CrInterceptControl
from vtlab.v1 import registers_pb2 as r
from vtlab.v1.vcpu_pb2 import IMAGE_FORMAT_FLAT, PERSONALITY_GUEST_CODE, START_MODE_LONG
from vtlab.x86.registers import Cr4, Msr

LOAD, STACK0, STACK1 = 0x10_0000, 0x18_0000, 0x19_0000
CALLS0, CALLS1 = 0x20_0000, 0x20_1000
INPUT0, INPUT1, OUTPUT1 = 0x21_0000, 0x21_1000, 0x21_2000
ASSIST, MESSAGES, IDT = 0x22_0000, 0x22_2000, 0x23_0000
COPIES, SEEN, RESULT = 0x24_0000, 0x25_0000, 0x26_0000
GUARDED, SECRET = 0x30_0000, 0x30_1000
VECTOR, TIMER_VECTOR = 0x30, 0x31
C = HypercallCode

_CONTEXT = INPUT0 + 16
_FINISH = "out 0xf4, eax; spin: hlt; jmp spin"


def _wrmsr(index: int, value: int) -> str:
    return f"mov ecx, {index}; mov eax, {value & 0xFFFFFFFF}; mov edx, {value >> 32}; wrmsr"


def _establish(page: int) -> str:
    return f"{_wrmsr(HvMsr.GUEST_OS_ID, 0x8F00 << 48)}; {_wrmsr(HvMsr.HYPERCALL, page | 1)}"


def _store(address: int, *values: int) -> str:
    return "; ".join(
        f"mov rax, {value}; mov qword ptr [{address + 8 * number}], rax" for number, value in enumerate(values)
    )


def _slow(page: int, code: HypercallCode, gpa: int, output: int = 0, reps: int = 0) -> str:
    value = encode_input_value(code, rep_count=reps)
    return f"mov rcx, {value}; mov edx, {gpa}; mov r8d, {output}; mov r11d, {page}; call r11"


def _set_register(name: int, value: str, vtl: int) -> str:
    """VTL1 writes a register; `value` is an operand for RAX."""
    return "; ".join(
        (
            f"mov rax, {value}; mov qword ptr [{INPUT1 + 32}], rax",
            _store(INPUT1, PARTITION_SELF, VP_SELF | vtl << 32, name, 0),
            f"mov qword ptr [{INPUT1 + 40}], 0",
            _slow(CALLS1, C.SET_VP_REGISTERS, INPUT1, reps=1),
        )
    )


def _protect(page: int, flags: int) -> str:
    return f"{_store(INPUT1, PARTITION_SELF, flags, page >> 12)}; " + _slow(
        CALLS1, C.MODIFY_VTL_PROTECTION_MASK, INPUT1, reps=1
    )


_VTL0 = f"""
    mov esp, {STACK0}
    mov rax, cr4; or eax, 0x200; mov cr4, rax
    {_establish(CALLS0)}
    mov rcx, {encode_input_value(C.ENABLE_PARTITION_VTL, fast=True)}
    mov rdx, {PARTITION_SELF}; mov r8d, 1; mov r11d, {CALLS0}; call r11
    mov dword ptr [{RESULT}], eax
    mov qword ptr [{INPUT0}], -1
    mov rax, {VP_SELF | 1 << 32}; mov qword ptr [{INPUT0 + 8}], rax
    lea rax, [rip + vtl1]; mov qword ptr [{_CONTEXT}], rax
    mov qword ptr [{_CONTEXT + 8}], {STACK1}
    mov qword ptr [{_CONTEXT + 16}], 2
    sgdt [{SEEN + 0x100}]
    mov ax, word ptr [{SEEN + 0x100}]; mov word ptr [{_CONTEXT + 174}], ax
    mov rax, qword ptr [{SEEN + 0x102}]; mov qword ptr [{_CONTEXT + 176}], rax
    mov word ptr [{_CONTEXT + 158}], 0xfff
    mov qword ptr [{_CONTEXT + 160}], {IDT}
    mov dword ptr [{_CONTEXT + 32}], 0xffffffff; mov dword ptr [{_CONTEXT + 36}], 0xa09b0008
    mov edi, {_CONTEXT + 40}
    call data_segment; call data_segment
    mov edi, {_CONTEXT + 104}
    call data_segment
    mov rax, cr0; mov qword ptr [{_CONTEXT + 192}], rax
    mov rax, cr3; mov qword ptr [{_CONTEXT + 200}], rax
    mov rax, cr4; mov qword ptr [{_CONTEXT + 208}], rax
    mov qword ptr [{_CONTEXT + 184}], 0x500
    mov rax, 0x0007040600070406; mov qword ptr [{_CONTEXT + 216}], rax
    {_slow(CALLS0, C.ENABLE_VP_VTL, INPUT0)}
    mov dword ptr [{RESULT + 4}], eax
    mov ebx, 0xb0b; mov r12d, 0x1212
    movq xmm3, rbx
    call enter
    mov qword ptr [{RESULT + 8}], r8
    movq rax, xmm3
    mov qword ptr [{RESULT + 16}], rax
    mov qword ptr [{RESULT + 24}], rsp
    BODY
    mov eax, 0x2a
    {_FINISH}
    enter:
    xor ecx, ecx
    mov eax, {CALLS0 + VTL_CALL_OFFSET}
    jmp rax
    data_segment:
    mov dword ptr [edi + 8], 0xffffffff; mov dword ptr [edi + 12], 0xc0930010
    add edi, 16
    ret
"""

GUARDED_READ = f"""
    mov eax, {GUARDED}
    at_read: mov rax, qword ptr [rax]
    mov qword ptr [{RESULT + 32}], rax
    lea rax, [rip + at_read]
    mov qword ptr [{RESULT + 40}], rax
"""
CR4_WRITE = f"""
    mov rax, cr4; or eax, {int(Cr4.SMEP)}
    mov cr4, rax
    mov rax, cr4; mov qword ptr [{RESULT + 48}], rax
"""

ARM = 0xA4
"""RSI of a call that has VTL1 arm a timer; when it fires, VTL1 lets VTL0 go on at its RDI."""
_ARM = f"lea rdi, [rip + after]; mov esi, {ARM}; call enter; lea rdi, [rip + after]"
HALTS = f"{_ARM}; cli; stands: hlt; jmp stands; after: mov qword ptr [{RESULT + 64}], 1"
SPINS = f"{_ARM}; stands: pause; jmp stands; after: mov qword ptr [{RESULT + 64}], 1"

GP_COUNT = SEEN + 72
"""How many times VTL1 took #GP; its handler goes on behind an instruction of three bytes."""

# What VTL1 does when it is called again: after its first return.
SETS_TSD = f"mov rax, cr4; or eax, {int(Cr4.TSD)}; mov cr4, rax; mov rax, cr4; mov qword ptr [{SEEN + 80}], rax"
SETS_TSD_OF_VTL0 = (
    f"{_set_register(r.REGISTER_NAME_CR4, str(int(Cr4.PAE | Cr4.TSD)), 0x10)}; mov dword ptr [{SEEN + 80}], eax"
)
WRITES_LSTAR = (
    f"{_wrmsr(int(Msr.LSTAR), 0x1000)}; rdmsr; mov dword ptr [{SEEN + 80}], eax; mov dword ptr [{SEEN + 84}], edx"
)
OPENS_SECRET = f"{_protect(SECRET, 15)}; mov dword ptr [{SEEN + 80}], eax"
# What it does before.
STARTS_WITH_TSD = f"mov rax, cr4; or eax, {int(Cr4.TSD)}; mov cr4, rax"
CALLS_AGAIN = "call enter"

_VTL1 = f"""
    vtl1:
    mov qword ptr [{SEEN}], rbx; mov qword ptr [{SEEN + 8}], r12
    movq rax, xmm3; mov qword ptr [{SEEN + 16}], rax
    mov qword ptr [{SEEN + 24}], rsp
    {_establish(CALLS1)}
    {_wrmsr(HvMsr.VP_ASSIST_PAGE, ASSIST | 1)}
    mov ecx, {int(Msr.APIC_BASE)}; rdmsr; or eax, 0x400; wrmsr
    mov ecx, 0x80f; mov eax, 0x1ff; xor edx, edx; wrmsr
    {_wrmsr(HvMsr.SIMP, MESSAGES | 1)}
    {_wrmsr(HvMsr.SCONTROL, 1)}
    {_wrmsr(HvMsr.SINT0, VECTOR)}
    lea rax, [rip + handler]
    mov word ptr [{IDT + 16 * VECTOR}], ax; shr rax, 16
    mov word ptr [{IDT + 16 * VECTOR + 6}], ax
    mov dword ptr [{IDT + 16 * VECTOR + 2}], 0x8e000008
    mov word ptr [{IDT + 16 * VECTOR + 6}], ax
    {_set_register(HvRegister.VSM_PARTITION_CONFIG, "CONFIG", 0)}
    mov dword ptr [{SEEN + 32}], eax
    mov rax, 0x5ec4e7; mov qword ptr [{GUARDED}], rax; mov qword ptr [{SECRET}], rax
    {_protect(GUARDED, 0)}
    mov dword ptr [{SEEN + 36}], eax
    {_protect(SECRET, 0)}
    mov dword ptr [{SEEN + 40}], eax
    {_set_register(HvRegister.CR_INTERCEPT_CR4_MASK, str(int(Cr4.SMEP)), 0)}
    {_set_register(HvRegister.CR_INTERCEPT_CONTROL, str(int(CrInterceptControl.CR4_WRITE)), 0)}
    mov dword ptr [{SEEN + 44}], eax
    lea rax, [rip + on_timer]
    mov word ptr [{IDT + 16 * TIMER_VECTOR}], ax; shr rax, 16
    mov dword ptr [{IDT + 16 * TIMER_VECTOR + 2}], 0x8e000008
    mov word ptr [{IDT + 16 * TIMER_VECTOR + 6}], ax
    lea rax, [rip + on_gp]
    mov word ptr [{IDT + 16 * 13}], ax; shr rax, 16
    mov dword ptr [{IDT + 16 * 13 + 2}], 0x8e000008
    mov word ptr [{IDT + 16 * 13 + 6}], ax
    mov eax, 0
    ABOVE
    mov dword ptr [{RESULT + 56}], eax
    mov r8d, 0x77; mov ebx, 0xb1b
    mov ecx, 1
    return:
    mov eax, {CALLS1 + VTL_RETURN_OFFSET}
    call rax
    cmp dword ptr [{ASSIST + 8}], 2
    jne called
    push rbx; push rcx; push rdx; push r8; push r11; push rax
    sti; nop; cli
    pop rax; pop r11; pop r8; pop rdx; pop rcx; pop rbx
    mov qword ptr [{ASSIST + 16}], rax; mov qword ptr [{ASSIST + 24}], rcx
    xor ecx, ecx
    jmp return
    called:
    cmp rsi, {ARM}
    jne not_arm
    {_wrmsr(HvMsr.STIMER0_CONFIG, TIMER_VECTOR << 4 | 1 << 12 | 1 << 3)}
    mov ecx, {int(HvMsr.TIME_REF_COUNT)}; rdmsr
    shl rdx, 32; or rax, rdx; add rax, 500000
    mov rdx, rax; shr rdx, 32
    mov ecx, {int(HvMsr.STIMER0_COUNT)}; wrmsr
    not_arm:
    push r8
    LATER
    pop r8
    inc r8
    mov ecx, 1
    jmp return
    on_gp:
    inc dword ptr [{GP_COUNT}]
    add rsp, 8
    add qword ptr [rsp], 3
    iretq
    on_timer:
    inc dword ptr [{SEEN + 64}]
    {_set_register(r.REGISTER_NAME_RIP, "rdi", 0x10)}
    mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr
    iretq
    handler:
    push rsi; push rdi
    mov edi, dword ptr [{COPIES - 8}]
    inc dword ptr [{COPIES - 8}]
    shl edi, 8; add edi, {COPIES}
    mov esi, {MESSAGES}; mov ecx, 256; cld
    rep movsb
    cmp dword ptr [{MESSAGES}], 0x80000001
    jne not_memory
    {_protect(GUARDED, 15)}
    jmp handled
    not_memory:
    mov rax, qword ptr [{MESSAGES + 16 + 24}]
    movzx ecx, byte ptr [{MESSAGES + 16 + 4}]
    and ecx, 15
    add rax, rcx
    {_set_register(r.REGISTER_NAME_RIP, "rax", 0x10)}
    handled:
    mov dword ptr [{MESSAGES}], 0
    mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr
    pop rdi; pop rsi
    iretq
"""


AP_PAGE, AP_MARK = 0x60000, 0x60800
# Real mode: mov ax, cs; mov ds, ax; mov byte ptr [0x800], 1; hlt; jmp $-1
_AP_CODE = int.from_bytes(bytes.fromhex("8cc8 8ed8 c606000801 f4 ebfd") + bytes(4), "little")
ENABLE_ON_VP1 = f"mov dword ptr [{INPUT0 + 8}], 1; {_slow(CALLS1, C.ENABLE_VP_VTL, INPUT0)}"
"""For VTL1, which enables itself on VP 1 with the context that VTL0 gave for VP 0."""


def start_vp1(wait: str) -> str:
    """VTL0 sends INIT and SIPI to VP 1, whose code sets AP_MARK, and looks until `wait`, a jump, lets it go on."""
    icr = int(HvMsr.ICR)
    return f"""
    {_store(AP_PAGE, _AP_CODE & (1 << 64) - 1, _AP_CODE >> 64)}
    mov ecx, {icr}; mov eax, 0x4500; mov edx, 0x1000000; wrmsr
    mov eax, {0x4600 | AP_PAGE >> 12}; wrmsr
    mov ecx, 20000
    looks: pause; dec ecx; cmp byte ptr [{AP_MARK}], 1
    {wait} looks
    waited:
    """


WAIT_FOR_EVER = "jne"
WAIT_A_WHILE = "je waited; test ecx, ecx; jnz"


@cache
def assemble(body: str, config: int = 0x3F, above: str = "", later: str = "") -> bytes:
    """The image, to be loaded and started at LOAD in long mode.

    Args:
        body: what VTL0 does after its first call.
        config: VsmPartitionConfig, as VTL1 writes it.
        above: what VTL1 does before its first return; RESULT + 56 gets the EAX that it leaves.
        later: what it does at each call after that.
    """
    vtl1 = _VTL1.replace("CONFIG", hex(config)).replace("ABOVE", above).replace("LATER", later)
    text = _VTL0.replace("BODY", body) + vtl1
    code, _ = Ks(KS_ARCH_X86, KS_MODE_64).asm(text.replace("\n", ";"), LOAD)
    return bytes(code)


def create(lab: Lab, image: bytes, vp_count: int = 1, vsm_profile: str = "") -> Machine:
    """A machine that boots what assemble() gave; it stops where it would reset."""
    return lab.create(
        image,
        ram=16 << 20,
        vp_count=vp_count,
        image_format=IMAGE_FORMAT_FLAT,
        load_address=LOAD,
        entry=LOAD,
        start_mode=START_MODE_LONG,
        personality=PERSONALITY_GUEST_CODE,
        vsm_profile=vsm_profile,
        stop_on_reset=True,
    )
