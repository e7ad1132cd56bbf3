/* System-management mode: addresses and commands that the handler, the kernel and attack scripts share. */
#pragma once

#define SMRAM 0xA0000 /* and SMBASE, once moved */
#define SMBASE_AFTER_RESET 0x30000
#define SMBASE_STEP 0x400 /* from one processor's to the next one's; those of others than 0 only return */
#define SMM_ENTRY 0x8000
#define SMM_SAVE_AREA 0xFE00
#define SMM_SAVE_AREA_SIZE 0x200
#define SMM_SAVED_SMBASE 0x100
#define SMM_SAVED_CR4 0x148
#define SMM_SAVED_RDI 0x1C0
#define SMM_SAVED_RSI 0x1C8
#define SMM_SAVED_RAX 0x1F8

#define SMM_DATA 0xA9000 /* the handler's own */
#define SMM_COUNT 0      /* SMIs so far */
#define SMM_CLEARS 4

/* Commands, in AL. */
#define SMM_NOTHING 1
#define SMM_POKE 2
#define SMM_ARM 3
#define SMM_POKES 4
#define SMM_STORM 256 /* the kernel's own: see smm.c */
