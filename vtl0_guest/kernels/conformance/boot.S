/* From the multiboot 1 loader (32-bit protected mode, no paging) to long mode. */
#include "layout.h"

#define FLAGS 0x00010003 /* modules on pages, memory size, address fields */

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
    /* 4 GiB in 2 MiB pages at 0, and once more for CPL3 at USER_VIEW: slots 0 and 1 of the PML4. */
    movl $kernel_pdpt + 3, pml4
    movl $user_pdpt + 7, pml4 + 8
    mov $kernel_pd + 3, %eax
    mov $user_pd + 7, %edx
    xor %ecx, %ecx
1:  mov %eax, kernel_pdpt(, %ecx, 8)
    mov %edx, user_pdpt(, %ecx, 8)
    add $0x1000, %eax
    add $0x1000, %edx
    inc %ecx
    cmp $4, %ecx
    jne 1b
    xor %ecx, %ecx
2:  mov %ecx, %eax
    shl $21, %eax
    or $0x83, %eax
    cmp $1536, %ecx
    jb 3f
    or $0x10, %eax /* device registers: uncached */
3:  mov %eax, kernel_pd(, %ecx, 8)
    or $4, %eax
    mov %eax, user_pd(, %ecx, 8)
    inc %ecx
    cmp $2048, %ecx
    jne 2b

    mov %cr4, %eax
    or $0x620, %eax /* OSXMMEXCPT, OSFXSR, PAE */
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx /* EFER */
    rdmsr
    or $0x901, %eax /* NXE, LME, SCE */
    wrmsr
    mov %cr0, %eax
    and $0x9FFFFFF3, %eax /* CD, NW, TS, EM off */
    or $0x80010033, %eax  /* PG, WP, NE, ET, MP, PE */
    mov %eax, %cr0
    lgdt early_gdtr
    ljmp $KERNEL_CODE, $long_mode

    .code64
long_mode:
    mov $KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax /* null: a change to CPL3 leaves the base alone then */
    mov %eax, %fs
    mov %eax, %gs
    lea stacks + 8192(%rip), %rsp
    xor %ebp, %ebp
    call main
    ud2

    .align 8
early_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
early_gdtr:
    .word . - early_gdt - 1
    .long early_gdt

    .bss
    .align 4096
pml4:        .skip 4096
kernel_pdpt: .skip 4096
user_pdpt:   .skip 4096
kernel_pd:   .skip 4 * 4096
user_pd:     .skip 4 * 4096
