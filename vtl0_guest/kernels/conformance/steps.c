/* The interpreter: steps of a row, at the level and on the vCPU that each names. */
#include "kernel.h"

enum { PATIENCE = 100000000 }; /* 10 s, in units of 100 ns */

struct failure failure;
static const struct step *volatile for_vp[MAX_VPS];

const struct step *next_step(const struct step *step)
{
    return (const struct step *)((const u8 *)step + step->size);
}

/* The first difference of a row counts; what follows from it does not. */
static void differ(const struct step *step, const char *what, u64 at, u64 want, u64 got)
{
    if (failure.set)
        return;
    failure = (struct failure){1, step, what, at, want, got};
}

/* RUN: address, RCX, RDX, R8, RAX, mask and value of the result, vector that ends it. */
static void run_code(struct cpu *cpu, const struct step *step)
{
    const u64 *data = step->data;
    u64 *before = (u64 *)(cpu->report + BEFORE), *after = (u64 *)(cpu->report + AFTER);
    u64 got;
    cpu->target = data[0] + (step->flags & FLAG_PAGE ? cpu->page : 0);
    before[0] = data[4];
    before[1] = data[1];
    before[2] = data[2];
    before[8] = data[3];
    cpu->vector = NO_VECTOR;
    (step->flags & FLAG_USER ? run_user : run)();
    got = after[0];
    if (cpu->vector != data[7])
        differ(step, "vector", cpu->error, data[7], cpu->vector);
    else if ((got ^ data[6]) & data[5])
        differ(step, "result", 0, data[6], got & data[5]);
}

static int find_difference(const struct step *step, u64 *at, u64 *want, u64 *got)
{
    const volatile u8 *memory = (u8 *)step->data[0];
    u64 size = step->data[1];
    const u8 *mask = (const u8 *)&step->data[2], *value = mask + size;
    for (u64 i = 0; i < size; i++) {
        u8 found = memory[i] & mask[i];
        if (found != value[i]) {
            *at = step->data[0] + i;
            *want = value[i];
            *got = found;
            return 1;
        }
    }
    return 0;
}

/* SEE: address, size, mask and value. */
static void compare(struct cpu *cpu, const struct step *step)
{
    u64 at, want, got, begin = 0;
    cpu->vector = NO_VECTOR;
    while (find_difference(step, &at, &want, &got)) {
        if (!(step->flags & FLAG_WAIT)) {
            differ(step, "memory", at, want, got);
            return;
        }
        let_in();
        if (!begin)
            begin = reference_time();
        else if (reference_time() - begin > PATIENCE) {
            differ(step, "waited for memory", at, want, got);
            return;
        }
    }
}

static void delay(u64 duration)
{
    u64 begin = reference_time();
    while (reference_time() - begin < duration)
        __asm__ volatile("pause");
}

static void join(const struct step *step, u32 vp)
{
    u64 begin = reference_time();
    while (for_vp[vp]) {
        let_in();
        if (reference_time() - begin > PATIENCE) {
            differ(step, "waited for vCPU", vp, 0, 1);
            return;
        }
    }
}

static void execute(struct cpu *cpu, const struct step *step)
{
    const u64 *data = step->data;
    switch (step->op) {
    case OP_PUT:
        copy((void *)data[0], data + 2, data[1]);
        break;
    case OP_SEE:
        compare(cpu, step);
        break;
    case OP_RUN:
        run_code(cpu, step);
        break;
    case OP_CONTEXT:
        write_context((u8 *)data[0], data[1] & 0xFFFFFFFF, data[1] >> 32);
        break;
    case OP_ANSWER:
        set_answer(cpu->vp, data[0], data[1]);
        break;
    case OP_DELAY:
        delay(data[0]);
        break;
    case OP_JOIN:
        join(step, data[0]);
        break;
    default:
        differ(step, "unknown step", 0, 0, step->op);
    }
}

static int together(const struct step *one, const struct step *other)
{
    return other->op != OP_ROW && other->op != OP_END && one->vtl == other->vtl && one->vp == other->vp &&
           !((one->flags ^ other->flags) & FLAG_ASYNC);
}

/* Runs steps until one that is for another level or vCPU; returns that. */
const struct step *run_batch(struct cpu *cpu, const struct step *step)
{
    const struct step *first = step;
    for (; together(first, step); step = next_step(step))
        execute(cpu, step);
    return step;
}

static void run_here(struct cpu *cpu, const struct step *step)
{
    if (step->vtl == cpu->vtl) {
        run_batch(cpu, step);
        return;
    }
    for_vtl1[cpu->vp] = step;
    cpu->vector = NO_VECTOR;
    vtl_call();
    if (for_vtl1[cpu->vp])
        differ(step, "VTL1 did not answer", 0, NO_VECTOR, cpu->vector);
    for_vtl1[cpu->vp] = 0;
}

void run_row(struct cpu *cpu, const struct step *step)
{
    while (step->op != OP_ROW && step->op != OP_END) {
        const struct step *first = step;
        if (step->vp == cpu->vp)
            run_here(cpu, step);
        else {
            for_vp[step->vp] = step;
            if (!(step->flags & FLAG_ASYNC))
                join(step, step->vp);
        }
        while (together(first, step))
            step = next_step(step);
    }
}

/* Another vCPU in VTL0: steps that are for it, for ever. */
void serve_others(struct cpu *cpu)
{
    prepare_level(cpu);
    for (;;) {
        const struct step *step = for_vp[cpu->vp];
        if (step) {
            run_here(cpu, step);
            for_vp[cpu->vp] = 0;
        }
        __asm__ volatile("pause");
    }
}
