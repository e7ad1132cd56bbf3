/* Other processors. They come up while the kernel boots, one after the other, and do one thing: what processor 0 asks of them. One
 * that is taken offline halts with interrupts disabled; only then may it be stopped and started again, says VTL1's policy. */
#include "kernel.h"
#include "smp.h"

#define FW_CFG_SELECT 0x510
#define FW_CFG_DATA 0x511
#define FW_CFG_SIGNATURE 0
#define FW_CFG_CPUS 5
#define MSR_APIC_BASE 0x1B
#define APIC_BASE_X2APIC (1u << 10)
#define MSR_X2APIC 0x800
#define APIC_EOI 0x0B
#define APIC_SPURIOUS 0x0F
#define APIC_COMMAND_LOW 0x30
#define APIC_COMMAND_HIGH 0x31
#define APIC_ENABLED 0x100
#define COMMAND_ASSERT 0x4000
#define COMMAND_NMI 0x400
#define COMMAND_INIT 0x500
#define COMMAND_SIPI 0x600
#define PATIENCE 250 /* timer interrupts */

enum { OFFLINE, ONLINE, LEAVING };

extern const u8 trampoline[], trampoline_end[];
extern const u64 trampoline_cr4;

u8 ap_stacks[MAX_CPUS - 1][1 << AP_STACK_SHIFT] __attribute__((aligned(PAGE)));
static struct cpu {
    u64 guard_rsp;
    volatile u64 state;
    void (*volatile work)(void *);
    void *argument;
} cpus[MAX_CPUS];
static u64 cpu_count = 1;

/* By the stack: only processor 0 ever leaves the kernel, and GS is the user program's. */
u64 this_cpu(void) {
    u64 offset = (u64)__builtin_frame_address(0) - (u64)ap_stacks;
    return offset < sizeof ap_stacks ? (offset >> AP_STACK_SHIFT) + 1 : 0;
}

u64 *guard_slot(void) { return &cpus[this_cpu()].guard_rsp; }

static bool x2apic(void) { return rdmsr(MSR_APIC_BASE) & APIC_BASE_X2APIC; }

static void apic_write(u32 number, u32 value) {
    if (x2apic())
        wrmsr(MSR_X2APIC + number, value);
    else
        *(volatile u32 *)(APIC_WINDOW + number * 16) = value;
}

static void send(u64 target, u32 command) {
    if (x2apic()) {
        wrmsr(MSR_X2APIC + APIC_COMMAND_LOW, target << 32 | command);
        return;
    }
    apic_write(APIC_COMMAND_HIGH, (u32)target << 24);
    apic_write(APIC_COMMAND_LOW, command);
}

void send_nmi(u64 number) { send(number, COMMAND_ASSERT | COMMAND_NMI); }

void wake_interrupt(void) { apic_write(APIC_EOI, 0); }

/* From trampoline.S. */
void ap_main(u64 number) {
    struct cpu *self = &cpus[number];
    apic_write(APIC_SPURIOUS, APIC_ENABLED | 0xFF);
    self->state = ONLINE;
    while (self->state == ONLINE) {
        if (self->work) {
            self->work(self->argument);
            self->work = 0;
        } else {
            wait_for_interrupt();
        }
    }
    self->state = OFFLINE;
    stop();
}

/* Interrupts are off before and after. */
static s64 wait_until(volatile u64 *word, u64 value) {
    for (u64 start = ticks; *word != value;) {
        if (ticks - start > PATIENCE)
            return -EIO;
        asm volatile("sti; pause; cli" ::: "memory");
    }
    return 0;
}

static void send_init(void *target) { send((u64)target, COMMAND_ASSERT | COMMAND_INIT); }

static s64 online(u64 number) {
    if (cpus[number].state != OFFLINE)
        return -EBUSY;
    /* It said OFFLINE a few instructions before it halted, and until it has, INIT may be refused. Processors that know long mode
     * need no wait between INIT and SIPI. */
    for (u64 tries = 0; guarded_call(send_init, (void *)number); tries++) {
        if (tries == 3)
            return -EFAULTED;
        wait_for_interrupt();
    }
    cpus[number].work = 0;
    s64 status = -EIO;
    for (u32 tries = 0; tries < 2 && status; tries++) { /* the second is for processors that miss the first */
        send(number, COMMAND_ASSERT | COMMAND_SIPI | TRAMPOLINE >> 12);
        status = wait_until(&cpus[number].state, ONLINE);
    }
    return status;
}

static s64 offline(u64 number) {
    if (cpus[number].state != ONLINE)
        return -EBUSY;
    cpus[number].state = LEAVING;
    send(number, COMMAND_ASSERT | VECTOR_WAKE);
    s64 status = wait_until(&cpus[number].state, OFFLINE);
    wait_for_interrupt(); /* until it has halted */
    return status;
}

s64 cpu_set(u64 number, bool on) {
    if (number == 0 || number >= cpu_count)
        return -EINVAL;
    return on ? online(number) : offline(number);
}

s64 run_on(u64 number, void (*work)(void *), void *argument) {
    if (number >= cpu_count || (number && cpus[number].state != ONLINE))
        return -EINVAL;
    if (number == 0) {
        work(argument);
        return 0;
    }
    cpus[number].argument = argument;
    cpus[number].work = work;
    send(number, COMMAND_ASSERT | VECTOR_WAKE);
    return wait_until((volatile u64 *)&cpus[number].work, 0);
}

u64 others_offline(void) {
    u64 were = 0;
    for (u64 number = 1; number < cpu_count; number++)
        if (cpus[number].state == ONLINE && offline(number) == 0)
            were |= 1ull << number;
    return were;
}

void others_online(u64 which) {
    for (u64 number = 1; number < cpu_count; number++) {
        if (!(which & 1ull << number))
            continue;
        cpus[number].state = OFFLINE;
        if (online(number))
            log("selfguard: CPU %u does not come back\n", number);
    }
}

static u64 machine_cpus(void) {
    u8 signature[4];
    outw(FW_CFG_SELECT, FW_CFG_SIGNATURE);
    for (u32 i = 0; i < sizeof signature; i++)
        signature[i] = inb(FW_CFG_DATA);
    if (!same(signature, "QEMU", sizeof signature))
        return 1;
    outw(FW_CFG_SELECT, FW_CFG_CPUS);
    u64 count = inb(FW_CFG_DATA);
    return count | (u64)inb(FW_CFG_DATA) << 8;
}

/* After paging_init and interrupts_init, before protect: from then on the trampoline is sealed. */
void smp_init(void) {
    u8 *page = direct(TRAMPOLINE);
    memset(page, 0xCC, PAGE);
    memcpy(page, trampoline, (u64)(trampoline_end - trampoline));
    *(u64 *)(page + ((u64)&trampoline_cr4 - (u64)trampoline)) = read_cr4();
    cpu_count = machine_cpus();
    cpu_count = cpu_count > MAX_CPUS ? MAX_CPUS : cpu_count;
    for (u64 number = 1; number < cpu_count; number++)
        log("selfguard: CPU %u: %s\n", number, online(number) ? "does not start" : "online");
}
