/* VTL1: waits to be entered, runs the steps that are for it, answers intercepts as the row said. */
#include "kernel.h"

enum { ENTERED_BY_CALL = 1, ENTERED_BY_INTERRUPT = 2 };
enum { ASSIST_REASON = 8, ASSIST_VINA = 12, ASSIST_RAX = 16, ASSIST_RCX = 24 };
enum { FAST = 1, FULL_ACCESS = 15, TARGET_VTL0 = 0x10, TARGET_SELF = 0 };
enum { MODIFY_PROTECTION = 0x0C, SET_REGISTERS = 0x51, GPA_INTERCEPT = 0x80000001, EOM = 0x40000084 };
enum { GET_REGISTERS = 0x50, STIMER0_COUNT = 0x400000B1, MILLISECOND = 10000, PAGE = 4096 };
enum { RIP = 0x20010, PENDING_EVENT = 0x10004, CR_INTERCEPT_CONTROL = 0xE0000 };

struct answer {
    u64 mode, value;
};

const struct step *volatile for_vtl1[MAX_VPS];
static volatile struct answer answers[MAX_VPS];
static u64 inputs[MAX_VPS][16] __attribute__((aligned(1024)));

void set_answer(u32 vp, u64 mode, u64 value)
{
    answers[vp].value = value;
    answers[vp].mode = mode;
}

/* SINT0 was raised: keeps the message and gives the slot back. */
void note_message(struct cpu *cpu)
{
    volatile u32 *slot = (u32 *)(cpu->report + MESSAGE_PAGE);
    if (!*slot)
        return;
    copy((u8 *)cpu->report + MESSAGE, (u8 *)slot, 256);
    ++*(volatile u64 *)(cpu->report + MESSAGE_COUNT);
    *slot = 0;
    wrmsr(EOM, 0);
}

static void set_register(struct cpu *cpu, u32 name, u64 value, u32 target)
{
    u64 *input = inputs[cpu->vp];
    fill(input, 0, 48);
    input[0] = ~0ul;
    input[1] = 0xFFFFFFFE | (u64)target << 32;
    input[2] = name;
    input[4] = value;
    hypercall(SET_REGISTERS | 1ul << 32, (u64)input, 0, cpu->page);
}

/* An interrupt that is not bound to an instruction may come before VTL0 has reached the code that waits for it. */
static int vtl0_waits(struct cpu *cpu)
{
    u64 *input = inputs[cpu->vp], *output = input + 8;
    input[0] = ~0ul;
    input[1] = 0xFFFFFFFE | (u64)TARGET_VTL0 << 32;
    input[2] = RIP;
    hypercall(GET_REGISTERS | 1ul << 32, (u64)input, (u64)output, cpu->page);
    if (output[0] / PAGE == (WORK + cpu->vp * WORK_SIZE + CODE_PAGE) / PAGE)
        return 1;
    wrmsr(STIMER0_COUNT, reference_time() + MILLISECOND);
    return 0;
}

static void open_page(struct cpu *cpu, u64 gpa)
{
    u64 *input = inputs[cpu->vp];
    input[0] = ~0ul;
    input[1] = FULL_ACCESS;
    input[2] = gpa >> 12;
    hypercall(MODIFY_PROTECTION | 1ul << 32, (u64)input, 0, cpu->page);
}

static void answer(struct cpu *cpu, u32 with_message)
{
    u64 mode = answers[cpu->vp].mode, value = answers[cpu->vp].value;
    const u8 *message = (u8 *)cpu->report + MESSAGE, *header = message + 16;
    if (!with_message && (!(mode & ANSWER_ALWAYS) || !vtl0_waits(cpu)))
        return;
    switch (mode & ~ANSWER_ALWAYS) {
    case ANSWER_SKIP:
        set_register(cpu, RIP, *(u64 *)(header + 24) + (header[4] & 15), TARGET_VTL0);
        break;
    case ANSWER_OPEN:
        if (*(u32 *)message == GPA_INTERCEPT)
            open_page(cpu, *(u64 *)(header + 56));
        break;
    case ANSWER_EVENT:
        set_register(cpu, PENDING_EVENT, value, TARGET_VTL0);
        break;
    case ANSWER_GO:
        set_register(cpu, RIP, value, TARGET_VTL0);
        break;
    case ANSWER_UNWATCH:
        set_register(cpu, CR_INTERCEPT_CONTROL, 0, TARGET_SELF);
        break;
    }
}

static void serve_entry(struct cpu *cpu, volatile u64 *status)
{
    volatile u64 *messages = (u64 *)(cpu->report + MESSAGE_COUNT);
    u64 before = *messages;
    if (status[2] == ENTERED_BY_CALL) {
        const struct step *step = for_vtl1[cpu->vp];
        ++status[0];
        if (step)
            run_batch(cpu, step);
        for_vtl1[cpu->vp] = 0;
    } else if (status[2] == ENTERED_BY_INTERRUPT) {
        ++status[1];
        let_in();
        answer(cpu, *messages != before);
    }
}

/* RAX and RCX of VTL0: after an interrupt as they were; after a VTL call the row may have VTL1 give others. */
static u64 leave(struct cpu *cpu, u64 reason)
{
    volatile u64 *rax = (u64 *)(cpu->report + ASSIST_PAGE + ASSIST_RAX);
    volatile u64 *rcx = (u64 *)(cpu->report + ASSIST_PAGE + ASSIST_RCX);
    const u64 *entered = (u64 *)(cpu->report + ENTERED), *leaving = (u64 *)(cpu->report + LEAVING);
    if (reason == ENTERED_BY_CALL && !leaving[0])
        return FAST;
    *rax = reason == ENTERED_BY_CALL ? leaving[0] : entered[0];
    *rcx = reason == ENTERED_BY_CALL ? leaving[1] : entered[1];
    return 0;
}

void vtl1_main(struct cpu *cpu)
{
    volatile u64 *status = (u64 *)(cpu->report + STATUS);
    u64 *leaving = (u64 *)(cpu->report + LEAVING);
    prepare_level(cpu);
    status[2] = ENTERED_BY_CALL; /* the assist page is new: what it says begins with the next entry */
    for (;;) {
        u64 reason = status[2];
        serve_entry(cpu, status);
        copy(leaving + 2, (u64 *)(cpu->report + ENTERED) + 2, 14 * 8);
        vtl_return(leave(cpu, reason));
        status[2] = *(volatile u32 *)(cpu->report + ASSIST_PAGE + ASSIST_REASON);
        status[3] = *(volatile u8 *)(cpu->report + ASSIST_PAGE + ASSIST_VINA);
    }
}
