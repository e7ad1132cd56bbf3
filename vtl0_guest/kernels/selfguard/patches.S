/* Code that changes while the kernel runs, as static keys do, and the list of all changes it may see. */
#include "layout.h"

    .text
    .macro static_key name, site
    .globl \name, \site
\name: /* () -> 0 as built, 1 while the site jumps */
\site:
    .byte 0x0F, 0x1F, 0x44, 0x00, 0x00 /* nopl 0(%rax,%rax) */
    xor %eax, %eax
    ret
    .align 16
    mov $1, %eax
    ret
    .align 16

    /* PATCH_RECORD of protos/vtlab/services.py: address, 0, size, code[5], padding[2]. The jump: site + 5 + 11. */
    .pushsection .patches, "a"
    .quad \site, 0
    .byte 5, 0xE9, 0x0B, 0x00, 0x00, 0x00, 0, 0
    .popsection
    .endm

    .align 64
    static_key static_key_trace, patch_site_trace
    static_key static_key_audit, patch_site_audit

    /* A site of which two bytes are in one page and three in the next. */
    .section .text.border, "ax"
    .balign 4096
    .skip 4094, 0xCC
    static_key static_key_border, patch_site_border
