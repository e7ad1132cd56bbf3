/* Constants of a checksum that nobody chose to be instructions: each immediate, entered one byte late, is what an attacker looks
 * for in kernel text. A kernel cannot free itself of such bytes by moving its own CR writers to .text.privileged, which is why
 * VTL1 pins the registers as well. */

    .text
    .globl driver_checksum
driver_checksum: /* (value) -> value, stirred */
    mov %rdi, %rax
    .globl gadget_mov_cr0, gadget_mov_cr3, gadget_mov_cr4, gadget_lmsw, gadget_lgdt, gadget_lidt, gadget_vmsave, gadget_wrmsr
    .macro stir name, immediate
    .byte 0x35 /* xor $immediate, %eax */
\name:
    .long \immediate
    .endm
    stir gadget_mov_cr0, 0xC3C0220F /* mov %rax, %cr0; ret */
    stir gadget_mov_cr3, 0xC3D8220F /* mov %rax, %cr3; ret */
    stir gadget_mov_cr4, 0xC3E0220F /* mov %rax, %cr4; ret */
    stir gadget_lmsw, 0xC3F0010F    /* lmsw %ax; ret */
    stir gadget_lgdt, 0xC317010F    /* lgdt (%rdi); ret */
    stir gadget_lidt, 0xC31F010F    /* lidt (%rdi); ret */
    stir gadget_vmsave, 0xC3DB010F  /* vmsave %rax; ret */
    stir gadget_wrmsr, 0xC3C3300F   /* wrmsr; ret */
    .byte 0x48, 0xB9 /* movabs $immediate, %rcx */
    .globl gadget_pivot
gadget_pivot:
    .byte 0x48, 0x89, 0xC4, 0x0F, 0x0B, 0x90, 0x90, 0x90 /* mov %rax, %rsp; ud2 */
    xor %rcx, %rax
    ret
