/* The last code of a kernel that makes way without VTL1's help. kexec.c copies it to RELOCATE_CODE, so it is data here and cannot be
 * executed where it stands. Started in 64-bit mode, all memory mapped one to one: RDI = list of copies, RSI = entry point. */
#include "layout.h"

#define AT(symbol) (RELOCATE_CODE + (symbol - relocate_start))

    .section .rodata
    .globl relocate_start, relocate_end
    .balign 16
relocate_start:
    cli
    lidt no_handlers(%rip) /* from here on a fault is a RESET */
    mov %rdi, %r8
    mov %esi, %ebp
    mov $(RELOCATE_CODE + PAGE), %esp
1:  mov 24(%r8), %rcx /* bytes in memory */
    test %rcx, %rcx
    jz 2f
    mov (%r8), %rdi
    mov 8(%r8), %rsi
    mov 16(%r8), %rcx /* bytes in the file */
    rep movsb
    mov 24(%r8), %rcx
    sub 16(%r8), %rcx
    xor %eax, %eax
    rep stosb
    add $32, %r8
    jmp 1b

2:  lgdt table(%rip)
    pushq $SELECTOR_KERNEL_CODE
    pushq $AT(protected)
    lretq

    .code32
protected:
    mov $SELECTOR_KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    mov $0x11, %eax /* ET, PE: paging off */
    mov %eax, %cr0
    mov $0xC0000080, %ecx /* EFER */
    xor %eax, %eax
    xor %edx, %edx
    wrmsr
    mov %eax, %cr4
    mov $0x2BADB002, %eax
    mov $RELOCATE_INFO, %ebx
    jmp *%ebp

no_handlers:
    .word 0
    .quad 0
    .balign 8
descriptors:
    .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF
table:
    .word . - descriptors - 1
    .quad AT(descriptors)
relocate_end:
    .code64
