/* Suspending: to idle, where every interrupt but the timer's is off and the processor waits in HLT, and to RAM (ACPI S3). */
#include "kernel.h"
#include "sleep.h"

#define PIC1_MASK 0x21
#define CMOS_INDEX 0x70
#define CMOS_DATA 0x71
#define CMOS_SECONDS 0
#define CMOS_STATUS_B 0x0B
#define CMOS_STATUS_C 0x0C
#define CMOS_ALARM 0x20
#define ANY_TIME 0xC0

extern const u8 wake_code[], wake_code_end[];
extern const u64 global_descriptor_table[];
s64 suspend_to_ram(void);

/* What the waking code goes back to. Kernels keep it in ordinary memory, and so does this one. */
struct suspended {
    u64 cr0, cr3, cr4;
    u32 waking_vector, padding;
    u64 rsp;
    struct table_register gdtr, idtr, own_gdtr;
    u64 own_gdt[8];
} __attribute__((packed));
struct suspended suspended;
_Static_assert(__builtin_offsetof(struct suspended, rsp) == SUSPENDED_RSP, "sleep.h");
_Static_assert(__builtin_offsetof(struct suspended, own_gdtr) == SUSPENDED_OWN_GDTR, "sleep.h");

/* While boot still has control registers to itself. */
void sleep_init(void) {
    suspended = (struct suspended){.cr0 = read_cr0(), .cr3 = read_cr3(), .cr4 = read_cr4(), .waking_vector = WAKE_PAGE};
    asm volatile("sgdt %0; sidt %1" : "=m"(suspended.gdtr), "=m"(suspended.idtr));
    suspended.own_gdtr = (struct table_register){sizeof suspended.own_gdt - 1, (u64)suspended.own_gdt};
    memcpy(direct(WAKE_PAGE), wake_code, (u64)(wake_code_end - wake_code));
}

static u8 cmos(u8 index) {
    outb(CMOS_INDEX, index);
    return inb(CMOS_DATA);
}

static void set_cmos(u8 index, u8 value) {
    outb(CMOS_INDEX, index);
    outb(CMOS_DATA, value);
}

/* The clock's alarm, at the next second or the one after it. */
static void arm_alarm(void) {
    set_cmos(1, ANY_TIME);
    set_cmos(3, ANY_TIME);
    set_cmos(5, ANY_TIME);
    (void)cmos(CMOS_STATUS_C);
    set_cmos(CMOS_STATUS_B, cmos(CMOS_STATUS_B) | CMOS_ALARM);
}

static void disarm_alarm(void) {
    set_cmos(CMOS_STATUS_B, cmos(CMOS_STATUS_B) & ~CMOS_ALARM);
    (void)cmos(CMOS_STATUS_C);
}

/* Timer interrupts that came meanwhile. */
static s64 to_idle(u64 duration) {
    u64 start = ticks;
    u8 mask = inb(PIC1_MASK);
    outb(PIC1_MASK, 0xFE);
    while (ticks - start < duration)
        wait_for_interrupt();
    outb(PIC1_MASK, mask);
    return (s64)(ticks - start);
}

static s64 to_ram(void) {
    volatile u32 *facs = direct(FACS);
    if (facs[0] != 0x53434146) /* "FACS" */
        return -ENOSYS;
    facs[FACS_WAKING_VECTOR / 4] = suspended.waking_vector;
    log("selfguard: suspending to RAM\n");
    memcpy(suspended.own_gdt, global_descriptor_table, sizeof suspended.own_gdt);
    suspended.own_gdt[SELECTOR_TSS / 8] &= ~(1ull << 41); /* LTR wants a task-state segment that is not busy */
    arm_alarm();
    u64 others = others_offline();
    s64 way = suspend_to_ram();
    disarm_alarm();
    others_online(others);
    log("selfguard: awake, %s\n", way == 0 ? "by the waking vector" : "where it fell asleep");
    return way;
}

s64 sleep_in(u64 state, u64 duration) { return state == 0 ? to_idle(duration) : state == 3 ? to_ram() : state == 4 ? hibernate() : -EINVAL; }
