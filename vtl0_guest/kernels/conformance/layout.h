/* Numbers that C, assembly and the compiler of rows (tests/conformance/image.py) share. Addresses are physical and
 * virtual at once. */
#ifndef LAYOUT_H
#define LAYOUT_H

/* What a row can look at: each level of each vCPU has blocks of its own, REPORT + (2 * vp + vtl) * REPORT_SIZE. */
#define REPORT 0x300000
#define REPORT_SIZE 0x10000
#define MAX_VPS 4

/* Within a report. */
#define BEFORE 0x000  /* registers that RUN loads: RAX RCX RDX RBX RSP RBP RSI RDI R8-R15, then XMM0-XMM5 */
#define AFTER 0x100   /* registers after RUN */
#define ENTERED 0x200 /* VTL1: registers when it was entered last */
#define LEAVING 0x300 /* VTL1: registers that it left with */
#define STATUS 0x400  /* VTL1: entries by VTL call u64, by interrupt u64, reason u64 and VINA u64 of the last one */
#define MESSAGE_COUNT 0x440
#define MESSAGE 0x480 /* VTL1: the last intercept message, 256 bytes */
#define COUNTERS 0x800 /* u32 for each of 256 vectors: how often it was taken */
#define ASSIST_PAGE 0x1000
#define MESSAGE_PAGE 0x2000
#define EVENT_PAGE 0x3000
#define HYPERCALL_PAGE 0x4000 /* of vCPU 0's report; the page is the level's */

/* The second view of all memory: the same pages for CPL3. */
#define USER_VIEW 0x8000000000

/* Pages for rows: each vCPU has its own for input, output and code. */
#define WORK 0x400000
#define WORK_SIZE 0x10000
#define CODE_PAGE 0x2000

/* Vectors. */
#define USER_RETURN 0x80   /* INT 0x80 ends code that runs at CPL3 */
#define INTERCEPT_VECTOR 0x41 /* SINT0 of VTL1 */

/* struct cpu, for assembly. */
#define CPU_FIXUP 8
#define CPU_RSP 40
#define CPU_TARGET 48
#define CPU_PAGE 56
#define CPU_CALL 64
#define CPU_RETURN 72
#define CPU_REPORT 80

/* Selectors. TR is the first of the task registers, 16 bytes each: one for each level of each vCPU. */
#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_DATA 0x1B
#define USER_CODE 0x23
#define TASK 0x28

/* Records of the table. */
#define OP_ROW 0
#define OP_PUT 1
#define OP_SEE 2
#define OP_RUN 3
#define OP_CONTEXT 4
#define OP_ANSWER 5
#define OP_DELAY 6
#define OP_JOIN 7
#define OP_END 255

#define FLAG_USER 1  /* RUN: at CPL3 */
#define FLAG_PAGE 2  /* RUN: the address counts from the level's hypercall page */
#define FLAG_WAIT 4  /* SEE: until it is so, interrupts open */
#define FLAG_ASYNC 8 /* nobody waits for these steps of another vCPU */

/* What VTL1 does after it took an interrupt. */
#define ANSWER_NOTHING 0
#define ANSWER_SKIP 1   /* a message: RIP of VTL0 moves behind the instruction */
#define ANSWER_OPEN 2   /* a message: the page gets all rights */
#define ANSWER_EVENT 3  /* PendingEvent0 of VTL0 becomes `value` */
#define ANSWER_GO 4     /* RIP of VTL0 becomes `value` */
#define ANSWER_UNWATCH 5 /* CrInterceptControl becomes 0 */
#define ANSWER_ALWAYS 16 /* also without a message, when VTL0 has come to the row's code; until then the timer is set anew */

#endif
