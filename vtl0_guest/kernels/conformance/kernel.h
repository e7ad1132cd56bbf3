/* What the files of the conformance guest know of one another. */
#ifndef KERNEL_H
#define KERNEL_H

#include "layout.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

/* One level of one vCPU; GS points to it. The first fields are known to assembly (layout.h). */
struct cpu {
    u64 self;
    u64 fixup; /* where an exception goes on; 0: it is a defect */
    u64 vector, error, cr2;
    u64 rsp;
    u64 target;
    u64 page; /* hypercall page */
    u64 call, ret;
    u64 report;
    u32 vp, vtl;
};

/* A record of the table; `size` is all of it, a multiple of 8. */
struct step {
    u8 op, flags, vtl, vp;
    u32 size;
    u64 data[];
};

struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};

enum { NO_VECTOR = 0xFFFFFFFF };

extern u8 rows[]; /* the table */

static inline struct cpu *this_cpu(void)
{
    struct cpu *cpu;
    __asm__("mov %%gs:0, %0" : "=r"(cpu));
    return cpu;
}

static inline u64 rdmsr(u32 index)
{
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index) : "memory");
    return (u64)high << 32 | low;
}

static inline void wrmsr(u32 index, u64 value)
{
    __asm__ volatile("wrmsr" : : "c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static inline void outb(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void outl(u16 port, u32 value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

/* Opens interrupts for an instant. */
static inline void let_in(void)
{
    __asm__ volatile("sti; nop; pause; cli" : : : "memory");
}

/* cpu.c */
extern struct cpu cpus[MAX_VPS][2];
extern u8 stacks[MAX_VPS][2][8192];
void prepare_descriptors(void);
void load_task(const struct cpu *cpu);
void prepare_level(struct cpu *cpu);
void write_context(u8 *context, u32 vp, u32 vtl);
void fill(void *to, u8 value, u64 size);
void copy(void *to, const void *from, u64 size);
u64 reference_time(void);
void trap(struct frame *frame);

/* run.S */
void run(void);
void run_user(void);
void vtl_call(void);
void vtl_return(u64 control);
void other_entry(void);
void vtl1_entry(void);
u64 hypercall(u64 value, u64 input, u64 output, u64 page);

/* steps.c */
struct failure {
    u32 set;
    const struct step *step;
    const char *what;
    u64 at, want, got;
};
extern struct failure failure;
const struct step *next_step(const struct step *step);
const struct step *run_batch(struct cpu *cpu, const struct step *step);
void run_row(struct cpu *cpu, const struct step *first);
void serve_others(struct cpu *cpu);

/* vtl1.c */
extern const struct step *volatile for_vtl1[MAX_VPS];
void vtl1_main(struct cpu *cpu);
void note_message(struct cpu *cpu);
void set_answer(u32 vp, u64 mode, u64 value);

/* console.c */
void say(const char *text);
void say_hex(u64 value);
void finish(u32 value) __attribute__((noreturn));

#endif
