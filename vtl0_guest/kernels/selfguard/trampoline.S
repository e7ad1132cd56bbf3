/* What a processor runs between SIPI and the kernel: real mode, at TRAMPOLINE:0, where smp.c copies it. VTL1 lets it execute nothing
 * else until every pin holds, so all that is pinned is set here: control registers, MSRs, GDTR, IDTR, TR. Values stand in this
 * page, which nobody can write once VTL1 has sealed it; the stack is the one memory that others can. */
#include "layout.h"
#include "smp.h"

#define HERE(symbol) (symbol - trampoline)
#define AT(symbol) (TRAMPOLINE + symbol - trampoline)

    .section .rodata
    .balign 16
    .globl trampoline, trampoline_cr4, trampoline_end
    .code16
trampoline:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl HERE(trampoline_gdtr)
    mov HERE(trampoline_cr4), %eax
    mov %eax, %cr4
    mov $0xC0000080, %ecx /* EFER */
    rdmsr
    or $0x901, %eax /* SCE, LME, NXE */
    wrmsr
    mov $0x00010033, %eax /* WP, NE, ET, MP, PE; CD and NW off. In one step: there are guards that refuse CR0 without WP */
    mov %eax, %cr0
    ljmpl $SELECTOR_TRAMPOLINE_CODE32, $AT(1f)

    .code32
1:  mov $(kernel_pml4 - KERNEL_VMA), %eax
    mov %eax, %cr3
    mov $0x80010033, %eax /* and PG */
    mov %eax, %cr0
    ljmp $SELECTOR_KERNEL_CODE, $AT(2f)

    .code64
2:  mov $SELECTOR_KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $1, %eax
    cpuid
    shr $24, %ebx /* APIC ID, the number of the processor */
    cmp $MAX_CPUS, %ebx
    jae 4f
    mov %ebx, %ebp
    shl $AP_STACK_SHIFT, %ebp
    lea ap_stacks(%rbp), %rsp /* stacks start with processor 1's, and grow down */

    lea trampoline_msrs(%rip), %rsi
3:  mov (%rsi), %ecx
    mov 4(%rsi), %eax
    mov 8(%rsi), %edx
    wrmsr
    add $12, %rsi
    lea trampoline_msrs_end(%rip), %rax
    cmp %rax, %rsi
    jb 3b

    /* LTR marks the descriptor busy, and the kernel's GDT is read-only: a copy of the descriptor takes the mark. */
    mov %ebx, %edi
    shl $4, %edi
    add $SELECTOR_TSS, %edi
    pushq global_descriptor_table + 8(%rdi)
    pushq global_descriptor_table(%rdi)
    mov %rsp, %rax
    sub %rdi, %rax
    lea 15(%rdi), %ecx
    sub $16, %rsp
    mov %cx, 6(%rsp)
    mov %rax, 8(%rsp)
    lgdt 6(%rsp)
    ltr %di
    add $32, %rsp

    lgdt kernel_gdtr(%rip)
    lidt kernel_idtr(%rip)
    mov %ebx, %edi
    pushq $0
    mov $ap_main, %rax
    jmp *%rax
4:  hlt
    jmp 4b

    .balign 8
trampoline_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF
trampoline_gdtr:
    .word . - trampoline_gdt - 1
    .long AT(trampoline_gdt)
kernel_gdtr:
    .word GDT_SIZE - 1
    .quad global_descriptor_table
kernel_idtr:
    .word IDT_SIZE - 1
    .quad interrupt_descriptor_table
    .balign 8
trampoline_cr4:
    .quad 0 /* what processor 0 found it can have */
/* As syscalls.c has them for processor 0. */
trampoline_msrs:
    .long 0xC0000081, 0, (SELECTOR_USER_BASE | 3) << 16 | SELECTOR_KERNEL_CODE
    .long 0xC0000082
    .quad syscall_entry
    .long 0xC0000083
    .quad syscall_entry
    .long 0xC0000084, SYSCALL_MASK, 0
    .long 0x174, 0, 0, 0x175, 0, 0, 0x176, 0, 0
trampoline_msrs_end:
trampoline_end:
