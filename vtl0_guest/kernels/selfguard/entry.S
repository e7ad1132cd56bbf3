/* The ways into the kernel (traps, interrupts, SYSCALL) and out of it (IRETQ, SYSRET). Only processor 0 goes out: no SWAPGS. */
#include "layout.h"

    .text
/* Vectors 0-48. Each stub pushes an error code, if the processor did not, and the vector. */
    .altmacro
    .macro stub vector
stub_\vector:
    .if \vector == 8 || (\vector >= 10 && \vector <= 14) || \vector == 17 || \vector == 21
    .else
    push $0
    .endif
    push $\vector
    jmp trap_common
    .endm

    .macro stub_address vector
    .quad stub_\vector
    .endm

    .set vector, 0
    .rept VECTORS
    stub %vector
    .set vector, vector + 1
    .endr

trap_common:
    push %rax
    push %rcx
    push %rdx
    push %rbx
    push %rbp
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    cld
    mov %rsp, %rdi
    call trap
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rbp
    pop %rbx
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

/* RAX = number, RDI RSI RDX R10 = arguments, RCX and R11 hold the caller's RIP and RFLAGS. */
    .globl syscall_entry
syscall_entry:
    mov %rsp, syscall_user_rsp(%rip)
    lea kernel_stack_top(%rip), %rsp
    push syscall_user_rsp(%rip)
    push %rcx
    push %r11
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %r10, %rcx
    mov %rax, %r8
    call syscall
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    pop %r11
    pop %rcx
    xor %edx, %edx /* nothing of the kernel's in what the caller gets back */
    xor %esi, %esi
    xor %edi, %edi
    xor %r8d, %r8d
    xor %r9d, %r9d
    xor %r10d, %r10d
    pop %rsp
    sysretq

/* enter_user(rip, rsp) */
    .globl enter_user
enter_user:
    mov %rdi, %rcx
    mov %rsi, %rsp
    mov $0x202, %r11d
    xor %eax, %eax
    xor %edx, %edx
    xor %ebx, %ebx
    xor %esi, %esi
    xor %edi, %edi
    sysretq

/* guarded_call(function, argument): calls it; 0 if it came back, 1 if it faulted and trap() brought us here, with the stack pointer that
 * the processor's slot holds. Whatever it did to the registers is undone. May be nested. */
    .globl guarded_call, guard_landing
guarded_call:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rdi, %rbx
    mov %rsi, %rbp
    call guard_slot
    push (%rax)
    push %rax
    mov %rsp, (%rax)
    mov %rbp, %rdi
    call *%rbx
    xor %eax, %eax
    jmp 1f
guard_landing:
    mov $1, %eax
1:  pop %rdx
    popq (%rdx)
    pushq $2
    popfq /* IF, DF and AC off */
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

/* driver_invoke(address, argument[6]): RDI RSI RDX RCX R8 R9 as in the calling convention, and RAX = RDI, which is where most
 * gadgets want their operand. */
    .globl driver_invoke
driver_invoke:
    push %rbx
    mov %rdi, %r11
    mov %rsi, %r10
    mov (%r10), %rdi
    mov 8(%r10), %rsi
    mov 16(%r10), %rdx
    mov 24(%r10), %rcx
    mov 32(%r10), %r8
    mov 40(%r10), %r9
    mov %rdi, %rax
    call *%r11
    pop %rbx
    ret

    .section .rodata
    .align 8
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept VECTORS
    stub_address %vector
    .set vector, vector + 1
    .endr

    .data
    .globl syscall_user_rsp
syscall_user_rsp: .quad 0
