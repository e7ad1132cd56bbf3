/* Several processors: what smp.c, trampoline.S and attack scripts share. */
#pragma once

#define MAX_CPUS 4
#define TRAMPOLINE 0x72000 /* below 1 MiB, where SIPI can name it; policy.yaml has it too */
#define SELECTOR_TRAMPOLINE_CODE32 0x18
#define AP_STACK_SHIFT 14 /* of which the lowest page is for #DF and NMI, the next one for #MC */
#define GDT_SIZE (8 * (SELECTOR_TSS / 8 + 2 * MAX_CPUS))
#define IDT_SIZE (16 * 256)
