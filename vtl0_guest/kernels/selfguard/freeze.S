/* Freezing, and the two ways back. freeze(): number of pages that the image has; 0 if memory came back from it; negative if it was not
 * made. */
#include "hibernate.h"
#include "layout.h"

    .text
    .globl freeze, thaw
freeze:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, hibernated+HIBERNATED_RSP(%rip)
    call copy_memory
    jmp 1f
thaw: /* with RSP as it was kept */
    xor %eax, %eax
1:  pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

/* The kernel's own way: (page numbers, how many, pages, CR3), all memory mapped one to one and the kernel where it runs. Copied to
 * RELOCATE_CODE, since it overwrites all else. */
    .section .rodata
    .globl restore_code, restore_code_end
    .balign 16
restore_code:
    mov %rdi, %r8
    mov %rsi, %r9
    mov %rdx, %rsi
    mov %rcx, %r10
1:  mov (%r8), %rdi
    shl $12, %rdi
    mov $512, %ecx
    rep movsq
    add $8, %r8
    dec %r9
    jnz 1b
    movabs $restored, %rax
    mov %r10, %rdi
    jmp *%rax
restore_code_end:

/* Where both sets of page tables have it. Guarded kernels have lost it, and need it not. */
    .section .privileged, "ax"
restored: /* (CR3) */
    mov %rdi, %cr3
    lea hibernated(%rip), %rbx
    mov HIBERNATED_CR4(%rbx), %rax
    mov %rax, %cr4
    mov HIBERNATED_CR0(%rbx), %rax
    mov %rax, %cr0
    mov HIBERNATED_RSP(%rbx), %rsp
    lea thaw(%rip), %rax
    jmp *%rax
