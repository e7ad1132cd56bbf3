/* The user program's first instructions, its system calls, and a payload for attacks. All of it runs at CPL3. */
#include "layout.h"

    .text
    .globl user_entry
user_entry:
    call user_main
1:  jmp 1b

/* system_call(number, a, b, c, d) */
    .globl system_call
system_call:
    mov %rdi, %rax
    mov %rsi, %rdi
    mov %rdx, %rsi
    mov %rcx, %rdx
    mov %r8, %r10
    syscall
    ret

/* user_guarded(address, argument, &result): 0 if the code came back, 1 if it faulted. */
    .globl user_guarded
user_guarded:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    push %rdx
    push %rdi
    push %rsi
    mov $SYS_RECOVERY, %eax
    lea 1f(%rip), %rdi
    mov %rsp, %rsi
    syscall
    mov (%rsp), %rdi
    call *8(%rsp)
    mov 16(%rsp), %rdx
    mov %rax, (%rdx)
    xor %ebx, %ebx
    jmp 2f
1:  mov $1, %ebx
2:  mov $SYS_RECOVERY, %eax
    xor %edi, %edi
    xor %esi, %esi
    syscall
    mov %ebx, %eax
    add $24, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

/* user_payload(where): stores CS there, so that its low bits tell who ran it. */
    .globl user_payload
user_payload:
    xor %eax, %eax
    mov %cs, %eax
    mov %rax, (%rdi)
    ret

/* user_doorbell(tail): asks the guard device from CPL3. */
    .globl user_doorbell
user_doorbell:
    mov %edi, USER_DEVICE_WINDOW + DEVICE_TAIL
    xor %eax, %eax
    ret

/* user_sgdt(): UMIP takes this away from CPL3. */
    .globl user_sgdt
user_sgdt:
    sub $16, %rsp
    sgdt (%rsp)
    mov 2(%rsp), %rax
    add $16, %rsp
    ret

    .section .user_stack, "aw"
    .align 4096
    .skip 8192
    .globl user_stack_top
user_stack_top:
