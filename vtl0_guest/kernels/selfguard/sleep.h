/* S3: what the kernel, its waking code and attack scripts share. */
#pragma once

#define WAKE_PAGE 0x70000 /* below 1 MiB, nobody's */
#define FACS 0xF0040      /* where this machine's firmware has it */
#define FACS_WAKING_VECTOR 12
#define PM1A_CONTROL 0x604
#define SLEEP_TO_RAM (1 << 10)
#define SLEEP_ENABLE (1 << 13)
#define SELECTOR_WAKE_CODE32 0x18
