/* The way out of S3 and back. suspend_to_ram(): 0 if the waking vector brought it back, 1 if it goes on right behind the write of the
 * sleep register: because the machine did not sleep, or because VTL1 has loaded the state that it sealed there. */
#include "layout.h"
#include "sleep.h"

    .text
    .globl suspend_to_ram
suspend_to_ram:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, suspended_rsp(%rip)
    mov $PM1A_CONTROL, %edx
    mov $(SLEEP_TO_RAM | SLEEP_ENABLE), %eax
    outw %ax, %dx
    mov $1, %eax
1:  pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

/* From the waking code, on the early page tables. It writes control registers, so it goes when boot ends. */
    .section .privileged, "ax"
wake_long:
    mov $SELECTOR_KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov suspended_rsp(%rip), %rsp
    call wake_restore
    xor %eax, %eax
    movabs $1b, %rdx
    jmp *%rdx

/* Real mode, at WAKE_PAGE:0; runs where it is copied to. */
    .section .rodata
    .align 8
    .globl wake_code, wake_code_end
#define HERE(symbol) (symbol - wake_code)
#define AT(symbol) (WAKE_PAGE + symbol - wake_code)
    .code16
wake_code:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl HERE(wake_gdtr)
    mov %cr0, %eax
    and $0x9FFFFFFF, %eax /* CD, NW off */
    or $1, %eax
    mov %eax, %cr0
    ljmpl $SELECTOR_WAKE_CODE32, $AT(wake_protected)
    .code32
wake_protected:
    mov $SELECTOR_KERNEL_DATA, %eax
    mov %eax, %ds
    mov $0x20, %eax /* PAE */
    mov %eax, %cr4
    mov $(early_pml4 - KERNEL_VMA), %eax
    mov %eax, %cr3
    mov $0xC0000080, %ecx
    rdmsr
    or $0x901, %eax /* SCE, LME, NXE */
    wrmsr
    mov %cr0, %eax
    or $0x80010033, %eax
    mov %eax, %cr0
    ljmp $SELECTOR_KERNEL_CODE, $AT(wake_64)
    .code64
wake_64:
    movabs $wake_long, %rax
    jmp *%rax
    .align 8
wake_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF
wake_gdtr:
    .word . - wake_gdt - 1
    .long AT(wake_gdt)
wake_code_end:

    .data
    .align 8
    .globl suspended_rsp
suspended_rsp: .quad 0
