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
    mov %rsp, suspended+SUSPENDED_RSP(%rip)
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

/* Real mode, at WAKE_PAGE:0; runs where it is copied to. It restores all that is pinned before it leaves that page: guarded, VTL1
 * may let no other code run until then. */
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
    movabs $(KERNEL_VMA + AT(wake_high)), %rax
    jmp *%rax
wake_high: /* where the final page tables have this page too */
    mov $SELECTOR_KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    movabs $suspended, %rbx
    xor %eax, %eax
    lldt %ax
    lgdt SUSPENDED_OWN_GDTR(%rbx) /* LTR writes to the table; the kernel's own cannot be written */
    mov $SELECTOR_TSS, %eax
    ltr %ax
    lgdt SUSPENDED_GDTR(%rbx)
    lidt SUSPENDED_IDTR(%rbx)
    mov SUSPENDED_CR4(%rbx), %rax
    mov %rax, %cr4
    mov SUSPENDED_CR3(%rbx), %rax
    mov %rax, %cr3
    mov SUSPENDED_CR0(%rbx), %rax
    mov %rax, %cr0
    mov SUSPENDED_RSP(%rbx), %rsp
    xor %eax, %eax
    movabs $1b, %rdx
    jmp *%rdx
    .align 8
wake_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF
wake_gdtr:
    .word . - wake_gdt - 1
    .long AT(wake_gdt)
wake_code_end:
