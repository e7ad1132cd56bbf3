/* S3: what the kernel, its waking code and attack scripts share. */
#pragma once

#define WAKE_PAGE 0x70000 /* below 1 MiB, nobody's */
#define FACS 0xF0040      /* where this machine's firmware has it */
#define FACS_WAKING_VECTOR 12
#define PM1A_CONTROL 0x604
#define SLEEP_TO_RAM (1 << 10)
#define SLEEP_ENABLE (1 << 13)
#define SELECTOR_WAKE_CODE32 0x18

/* struct suspended (sleep.c) */
#define SUSPENDED_CR0 0
#define SUSPENDED_CR3 8
#define SUSPENDED_CR4 16
#define SUSPENDED_RSP 32
#define SUSPENDED_GDTR 40
#define SUSPENDED_IDTR 50
#define SUSPENDED_OWN_GDTR 60
