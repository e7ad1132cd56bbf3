/* From the multiboot 1 loader (32-bit protected mode, no paging) to long mode in the upper half. */
#include "layout.h"

#define FLAGS 0x00010003 /* modules on pages, memory size, address fields */
#define EARLY(symbol) (symbol - KERNEL_VMA)

    .section .multiboot, "a"
    .align 4
multiboot_header:
    .long 0x1BADB002, FLAGS, -(0x1BADB002 + FLAGS)
    .long multiboot_header, image_start, image_load_end, image_end, multiboot_entry

    .section .boot, "ax"
    .code32
    .globl multiboot_entry
multiboot_entry:
    cld
    mov %eax, %edi
    mov %ebx, %esi

    /* 1 GiB in 2 MiB pages, at 0 and at KERNEL_VMA. */
    mov $(EARLY(early_pdpt) + 3), %eax
    mov %eax, EARLY(early_pml4)
    mov %eax, EARLY(early_pml4) + 511 * 8
    mov $(EARLY(early_pd) + 3), %eax
    mov %eax, EARLY(early_pdpt)
    mov %eax, EARLY(early_pdpt) + 510 * 8
    mov $0x83, %eax
    xor %ecx, %ecx
1:  mov %eax, EARLY(early_pd)(, %ecx, 8)
    add $0x200000, %eax
    inc %ecx
    cmp $512, %ecx
    jne 1b

    mov %cr4, %eax
    or $0x20, %eax /* PAE */
    mov %eax, %cr4
    mov $EARLY(early_pml4), %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx /* EFER */
    rdmsr
    or $0x901, %eax /* SCE, LME, NXE */
    wrmsr
    mov %cr0, %eax
    and $0x9FFFFFFF, %eax /* CD, NW off */
    or $0x80010033, %eax  /* PG, WP, NE, ET, MP, PE */
    mov %eax, %cr0
    lgdt early_gdtr
    ljmp $SELECTOR_KERNEL_CODE, $long_mode

    .code64
long_mode:
    mov $SELECTOR_KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    movabs $kernel_entry, %rax
    jmp *%rax

    .align 8
early_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
early_gdtr:
    .word . - early_gdt - 1
    .long early_gdt

    .text
kernel_entry:
    lea kernel_stack_top(%rip), %rsp
    xor %ebp, %ebp
    call kmain
    ud2

    .bss
    .align 4096
    .globl early_pml4
early_pml4: .skip 4096
early_pdpt: .skip 4096
early_pd:   .skip 4096
    .skip 16384
    .globl kernel_stack_top
kernel_stack_top:
    .skip 4096
    .globl fault_stack_top
fault_stack_top: /* for #DF and NMI */
    .skip 4096
    .globl machine_check_stack_top
machine_check_stack_top:
