/* All of the kernel's code that writes CR0, CR3, CR4 or loads a descriptor table. It has a section of its own so that VTL1 can
 * take it out of VTL0 when boot is over; from then on CR0 and CR4 change through VTL1's service (control.c). */
#include "layout.h"

    .section .privileged, "ax"
    .globl write_cr0, write_cr3, write_cr4, load_gdt, load_idt, load_task_register
write_cr0:
    mov %rdi, %cr0
    ret
write_cr3:
    mov %rdi, %cr3
    ret
write_cr4:
    mov %rdi, %cr4
    ret

    .globl guard_doorbell
guard_doorbell: /* (tail): who may ask the guard device for what lifts protection is known by this address */
    mov %edi, DEVICE_WINDOW + DEVICE_TAIL
    ret

load_gdt: /* (table register image) */
    lgdt (%rdi)
    pushq $SELECTOR_KERNEL_CODE
    lea 1f(%rip), %rax
    push %rax
    lretq
1:  mov $SELECTOR_KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    ret

load_idt:
    lidt (%rdi)
    ret

load_task_register: /* (selector) */
    ltr %di
    ret
