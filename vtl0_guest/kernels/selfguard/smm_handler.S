/* The SMI handler, and the code that moves SMBASE. Both start in the 16-bit mode of SMM, whose data segments reach 4 GiB from 0;
 * general registers are what the interrupted code had. They lie in .rodata until smm.c copies them to where they run. */
#include "layout.h"
#include "smm.h"

    .section .rodata
    .code16

/* At the SMBASE of RESET: moves it, once. */
    .globl smm_relocation, smm_relocation_end
smm_relocation:
    addr32 movl $SMRAM, SMBASE_AFTER_RESET + SMM_SAVE_AREA + SMM_SAVED_SMBASE
    rsm
smm_relocation_end:

/* AL: a command; EAX becomes the number of SMIs so far. Weak on purpose: SMM_POKE stores EBX at the physical address in ECX, whatever that is, as many a vendor's
 * handler has been found to do. SMM_POKES does so with EBX pairs of address and value that ECX points to. SMM_ARM has every later SMI clear the bits of EBX in the saved CR4, and in the saved RDI and RSI. */
    .globl smm_handler, smm_handler_end
smm_handler:
    addr32 incl SMM_DATA + SMM_COUNT
    addr32 movl SMM_DATA + SMM_COUNT, %esi
    addr32 movl %esi, SMRAM + SMM_SAVE_AREA + SMM_SAVED_RAX
    cmpb $SMM_POKE, %al
    je 1f
    cmpb $SMM_ARM, %al
    je 2f
    cmpb $SMM_POKES, %al
    je 3f
    addr32 movl SMM_DATA + SMM_CLEARS, %eax
    notl %eax
    addr32 andl %eax, SMRAM + SMM_SAVE_AREA + SMM_SAVED_CR4
    addr32 andl %eax, SMRAM + SMM_SAVE_AREA + SMM_SAVED_RDI
    addr32 andl %eax, SMRAM + SMM_SAVE_AREA + SMM_SAVED_RSI
    rsm
1:  addr32 movl %ebx, (%ecx)
    rsm
2:  addr32 movl %ebx, SMM_DATA + SMM_CLEARS
    rsm
3:  addr32 movl (%ecx), %edi
    addr32 movl 4(%ecx), %eax
    addr32 movl %eax, (%edi)
    addl $8, %ecx
    decl %ebx
    jnz 3b
    rsm
smm_handler_end:
