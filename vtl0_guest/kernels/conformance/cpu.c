/* Descriptor tables, traps, what a level sets up for itself, and contexts to start others with. */
#include "kernel.h"

enum { GS_BASE = 0xC0000101, EFER = 0xC0000080, PAT = 0x277 };
enum { GUEST_OS_ID = 0x40000000, HYPERCALL = 0x40000001, TIME_REF_COUNT = 0x40000020, EOI = 0x40000070 };
enum { VP_ASSIST_PAGE = 0x40000073, SCONTROL = 0x40000080, SIEFP = 0x40000082, SIMP = 0x40000083, SINT0 = 0x40000090 };
enum { SPURIOUS = 0xFEE000F0, SOFTWARE_ENABLED = 0x1FF, UNMASKED = 0 };
enum { REGISTERS_OF_GET = 0x50, CODE_PAGE_OFFSETS = 0xD0002 };

struct __attribute__((packed)) task_state {
    u32 reserved;
    u64 rsp[3];
    u8 rest[76];
};

struct __attribute__((packed)) pointer {
    u16 limit;
    u64 base;
};

struct gate {
    u16 low, selector, attributes, middle;
    u32 high, reserved;
};

struct cpu cpus[MAX_VPS][2];
u8 stacks[MAX_VPS][2][8192] __attribute__((aligned(16)));
static u8 trap_stacks[MAX_VPS][2][4096] __attribute__((aligned(16)));
static struct task_state tasks[MAX_VPS][2];
static struct gate idt[256] __attribute__((aligned(16)));
static u64 gdt[5 + 2 * 2 * MAX_VPS] __attribute__((aligned(16)));
extern u8 entries[];

void fill(void *to, u8 value, u64 size)
{
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
}

void copy(void *to, const void *from, u64 size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}

u64 reference_time(void)
{
    return rdmsr(TIME_REF_COUNT);
}

static u32 task_selector(u32 vp, u32 vtl)
{
    return TASK + (2 * vp + vtl) * 16;
}

/* GDT, IDT and task states of all; loads the tables and GS for the first vCPU. */
void prepare_descriptors(void)
{
    gdt[1] = 0x00AF9B000000FFFF;
    gdt[2] = 0x00CF93000000FFFF;
    gdt[3] = 0x00CFF3000000FFFF;
    gdt[4] = 0x00AFFB000000FFFF;
    for (u32 vp = 0; vp < MAX_VPS; vp++)
        for (u32 vtl = 0; vtl < 2; vtl++) {
            struct cpu *cpu = &cpus[vp][vtl];
            u64 base = (u64)&tasks[vp][vtl], *descriptor = &gdt[task_selector(vp, vtl) / 8];
            tasks[vp][vtl].rsp[0] = (u64)trap_stacks[vp][vtl] + sizeof trap_stacks[vp][vtl];
            descriptor[0] = (sizeof(struct task_state) - 1) | (base & 0xFFFFFF) << 16 | 0x89ul << 40 | (base >> 24 & 0xFF) << 56;
            descriptor[1] = base >> 32;
            cpu->self = (u64)cpu;
            cpu->vp = vp;
            cpu->vtl = vtl;
            cpu->report = REPORT + (2 * vp + vtl) * REPORT_SIZE;
            cpu->page = REPORT + vtl * REPORT_SIZE + HYPERCALL_PAGE;
        }
    for (u32 vector = 0; vector < 256; vector++) {
        u64 entry = (u64)entries + 16 * vector;
        idt[vector] = (struct gate){entry, KERNEL_CODE, vector == USER_RETURN ? 0xEE00 : 0x8E00, entry >> 16, entry >> 32, 0};
    }
    struct pointer to_gdt = {sizeof gdt - 1, (u64)gdt}, to_idt = {sizeof idt - 1, (u64)idt};
    __asm__ volatile("lgdt %0; lidt %1" : : "m"(to_gdt), "m"(to_idt));
    load_task(&cpus[0][0]);
    wrmsr(GS_BASE, cpus[0][0].self);
}

void load_task(const struct cpu *cpu)
{
    __asm__ volatile("ltr %w0" : : "r"(task_selector(cpu->vp, cpu->vtl)));
}

/* Local APIC, hypercall page, assist page and SynIC of the level that runs. */
void prepare_level(struct cpu *cpu)
{
    *(volatile u32 *)SPURIOUS = SOFTWARE_ENABLED;
    wrmsr(GUEST_OS_ID, 0x8F00ul << 48);
    wrmsr(HYPERCALL, cpu->page | 1);
    wrmsr(VP_ASSIST_PAGE, (cpu->report + ASSIST_PAGE) | 1);
    wrmsr(SIMP, (cpu->report + MESSAGE_PAGE) | 1);
    wrmsr(SIEFP, (cpu->report + EVENT_PAGE) | 1);
    wrmsr(SCONTROL, 1);
    if (cpu->vtl)
        wrmsr(SINT0, INTERCEPT_VECTOR | UNMASKED);
    /* Where the VTL switches are in the hypercall page: the level asks, the answer lies in its AFTER block. */
    volatile u64 *input = (u64 *)(cpu->report + BEFORE), *output = (u64 *)(cpu->report + AFTER);
    input[0] = ~0ul;
    input[1] = 0xFFFFFFFE;
    input[2] = CODE_PAGE_OFFSETS;
    output[0] = 0;
    hypercall(REGISTERS_OF_GET | 1ul << 32, (u64)input, (u64)output, cpu->page);
    cpu->call = cpu->page + (output[0] & 0xFFF);
    cpu->ret = cpu->page + (output[0] >> 12 & 0xFFF);
    fill((void *)input, 0, 0x100);
    fill((void *)output, 0, 0x100);
}

static void put_segment(u8 *at, u64 base, u32 limit, u32 selector, u32 attributes)
{
    u64 words[2] = {base, limit | (u64)selector << 32 | (u64)attributes << 48};
    copy(at, words, sizeof words);
}

/* HV_INITIAL_VP_CONTEXT, 224 bytes, for a level of a vCPU: in long mode, at that level's first instruction. */
void write_context(u8 *context, u32 vp, u32 vtl)
{
    struct cpu *cpu = &cpus[vp][vtl];
    u64 cr0, cr3, cr4, *words = (u64 *)context;
    __asm__ volatile("mov %%cr0, %0; mov %%cr3, %1; mov %%cr4, %2" : "=r"(cr0), "=r"(cr3), "=r"(cr4));
    fill(context, 0, 224);
    words[0] = (u64)(vtl ? vtl1_entry : other_entry);
    words[1] = (u64)stacks[vp][vtl] + sizeof stacks[vp][vtl];
    words[2] = 2;
    put_segment(context + 24, 0, 0xFFFFFFFF, KERNEL_CODE, 0xA09B);
    for (u32 at = 40; at <= 104; at += 16)
        put_segment(context + at, at == 88 ? cpu->self : 0, 0xFFFFFFFF, at == 72 || at == 88 ? 0 : KERNEL_DATA, 0xC093);
    put_segment(context + 120, (u64)&tasks[vp][vtl], sizeof(struct task_state) - 1, task_selector(vp, vtl), 0x8B);
    put_segment(context + 136, 0, 0, 0, 0x82);
    words[19] = (u64)(sizeof idt - 1) << 48;
    words[20] = (u64)idt;
    words[21] = (u64)(sizeof gdt - 1) << 48;
    words[22] = (u64)gdt;
    words[23] = rdmsr(EFER);
    words[24] = cr0;
    words[25] = cr3;
    words[26] = cr4;
    words[27] = rdmsr(PAT);
}

static void panic(const struct cpu *cpu, const struct frame *frame)
{
    u64 cr2;
    __asm__ volatile("mov %%cr2, %0" : "=r"(cr2));
    say("PANIC vtl ");
    say_hex(cpu->vtl);
    say(" vp ");
    say_hex(cpu->vp);
    say(" vector ");
    say_hex(frame->vector);
    say(" error ");
    say_hex(frame->error);
    say(" rip ");
    say_hex(frame->rip);
    say(" cr2 ");
    say_hex(cr2);
    say("\n");
    finish(3);
}

void trap(struct frame *frame)
{
    struct cpu *cpu = this_cpu();
    if (frame->vector >= 32 && frame->vector != USER_RETURN) {
        ((volatile u32 *)(cpu->report + COUNTERS))[frame->vector]++;
        if (cpu->vtl && frame->vector == INTERCEPT_VECTOR)
            note_message(cpu);
        wrmsr(EOI, 0);
        return;
    }
    if (!cpu->fixup)
        panic(cpu, frame);
    __asm__ volatile("mov %%cr2, %0" : "=r"(cpu->cr2));
    cpu->vector = frame->vector;
    cpu->error = frame->error;
    frame->rip = cpu->fixup;
    frame->cs = KERNEL_CODE;
    frame->ss = KERNEL_DATA;
    frame->rsp = cpu->rsp;
    frame->rflags = 2;
}
