/* Code of rows, switches between levels, first instructions of levels and vCPUs, and entries of the IDT. */
#include "layout.h"

    .macro SAVE_CALLEE
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    .endm

    .macro RESTORE_CALLEE
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    .endm

    /* All general registers but RSP and RAX, from the block at RAX. */
    .macro LOAD_BUT_RAX
    mov 8(%rax), %rcx
    mov 16(%rax), %rdx
    mov 24(%rax), %rbx
    mov 40(%rax), %rbp
    mov 48(%rax), %rsi
    mov 56(%rax), %rdi
    mov 64(%rax), %r8
    mov 72(%rax), %r9
    mov 80(%rax), %r10
    mov 88(%rax), %r11
    mov 96(%rax), %r12
    mov 104(%rax), %r13
    mov 112(%rax), %r14
    mov 120(%rax), %r15
    .endm

    /* All of them to the block at RAX; RAX itself lies on the stack, and goes. */
    .macro STORE_ALL
    mov %rcx, 8(%rax)
    mov %rdx, 16(%rax)
    mov %rbx, 24(%rax)
    mov %rbp, 40(%rax)
    mov %rsi, 48(%rax)
    mov %rdi, 56(%rax)
    mov %r8, 64(%rax)
    mov %r9, 72(%rax)
    mov %r10, 80(%rax)
    mov %r11, 88(%rax)
    mov %r12, 96(%rax)
    mov %r13, 104(%rax)
    mov %r14, 112(%rax)
    mov %r15, 120(%rax)
    movdqu %xmm0, 128(%rax)
    movdqu %xmm1, 144(%rax)
    movdqu %xmm2, 160(%rax)
    movdqu %xmm3, 176(%rax)
    movdqu %xmm4, 192(%rax)
    movdqu %xmm5, 208(%rax)
    pop %rcx
    mov %rcx, (%rax)
    mov %rsp, 32(%rax)
    .endm

    .macro LOAD_BEFORE
    mov %gs:CPU_REPORT, %rax
    movdqu BEFORE + 128(%rax), %xmm0
    movdqu BEFORE + 144(%rax), %xmm1
    movdqu BEFORE + 160(%rax), %xmm2
    movdqu BEFORE + 176(%rax), %xmm3
    movdqu BEFORE + 192(%rax), %xmm4
    movdqu BEFORE + 208(%rax), %xmm5
    LOAD_BUT_RAX
    mov (%rax), %rax
    .endm

    .text
    /* Calls gs:TARGET with the registers of BEFORE and stores them to AFTER. An exception ends it too. */
    .globl run
run:
    SAVE_CALLEE
    mov %rsp, %gs:CPU_RSP
    movq $ended, %gs:CPU_FIXUP
    LOAD_BEFORE
    call *%gs:CPU_TARGET
ended:
    mov %gs:CPU_RSP, %rsp
    cli
    cld
    movq $0, %gs:CPU_FIXUP
    push %rax
    mov %gs:CPU_REPORT, %rax
    add $AFTER, %rax
    STORE_ALL
    RESTORE_CALLEE
    ret

    /* The same at CPL3, until an exception or INT USER_RETURN. */
    .globl run_user
run_user:
    SAVE_CALLEE
    mov %rsp, %gs:CPU_RSP
    movq $ended, %gs:CPU_FIXUP
    push $USER_DATA
    push $0
    push $2
    push $USER_CODE
    push %gs:CPU_TARGET
    LOAD_BEFORE
    iretq

    /* VTL call for whatever waits for VTL1. An exception ends it too. */
    .globl vtl_call
vtl_call:
    SAVE_CALLEE
    mov %rsp, %gs:CPU_RSP
    movq $1f, %gs:CPU_FIXUP
    xor %ecx, %ecx
    call *%gs:CPU_CALL
1:  mov %gs:CPU_RSP, %rsp
    cld
    movq $0, %gs:CPU_FIXUP
    RESTORE_CALLEE
    ret

    /* VTL return with control input RDI and the registers of LEAVING; those of the next entry go to ENTERED. */
    .globl vtl_return
vtl_return:
    SAVE_CALLEE
    mov %rsp, %gs:CPU_RSP
    push %rdi
    mov %gs:CPU_REPORT, %rax
    add $LEAVING, %rax
    LOAD_BUT_RAX
    pop %rcx
    call *%gs:CPU_RETURN
    cld
    push %rax
    mov %gs:CPU_REPORT, %rax
    add $ENTERED, %rax
    STORE_ALL
    RESTORE_CALLEE
    ret

    /* First instruction of VTL1. GS has come with the context. */
    .globl vtl1_entry
vtl1_entry:
    push %rax
    mov %gs:CPU_REPORT, %rax
    add $ENTERED, %rax
    STORE_ALL
    mov %gs:0, %rdi
    xor %ebp, %ebp
    call vtl1_main
    ud2

    /* First instruction of another vCPU. */
    .globl other_entry
other_entry:
    mov %gs:0, %rdi
    xor %ebp, %ebp
    call serve_others
    ud2

    /* u64 hypercall(value, input, output, page) */
    .globl hypercall
hypercall:
    push %rbx
    mov %rcx, %rax
    mov %rdx, %r8
    mov %rsi, %rdx
    mov %rdi, %rcx
    call *%rax
    pop %rbx
    ret

    .macro ENTRY vector
    .align 16
    .if !(\vector == 8 || (\vector >= 10 && \vector <= 14) || \vector == 17)
    push $0
    .endif
    pushq $\vector
    jmp common
    .endm

    .align 16
    .globl entries
entries:
    .set number, 0
    .rept 256
    ENTRY number
    .set number, number + 1
    .endr

common:
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
