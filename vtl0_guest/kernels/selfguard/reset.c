/* Every way of a PC to reset itself. None of them comes back; where one does, the machine has no such way. */
#include "kernel.h"

#define KEYBOARD_DATA 0x60
#define KEYBOARD_COMMAND 0x64
#define SYSTEM_CONTROL_A 0x92
#define RESET_CONTROL 0xCF9
#define MSR_APIC_BASE 0x1B
#define APIC_BASE_X2APIC (1u << 10)
#define MSR_X2APIC_ICR 0x830
#define ICR_INIT 0x4500 /* level asserted, physical destination 0: the boot processor */
#define MSR_HYPERV_RESET 0x40000003

extern u8 fault_stack_top[];

/* Kernels empty the IDT for this. Where VTL1 has frozen IDTR, another thing that delivery needs goes: the stacks. #UD finds no
 * stack, nor does the #DF that comes of it. */
static void by_triple_fault(void) {
    if (map_page((u64)fault_stack_top - PAGE, 0, 0) == 0)
        asm volatile("xor %%esp, %%esp; ud2" ::: "memory");
}

static void by_cf9(void) {
    outb(RESET_CONTROL, 0x02);
    outb(RESET_CONTROL, 0x06);
}

static void by_keyboard_pulse(void) { outb(KEYBOARD_COMMAND, 0xFE); }

static void by_keyboard_output_port(void) {
    outb(KEYBOARD_COMMAND, 0xD1);
    outb(KEYBOARD_DATA, 0x02); /* bit 0 low */
}

static void by_system_control(void) { outb(SYSTEM_CONTROL_A, inb(SYSTEM_CONTROL_A) | 1); }

static void by_hypervisor(void) { wrmsr(MSR_HYPERV_RESET, 1); }

static void by_init(void) {
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | APIC_BASE_X2APIC);
    wrmsr(MSR_X2APIC_ICR, ICR_INIT);
}

static const struct {
    const char *name;
    void (*reset)(void);
} ways[] = {
    {"triple", by_triple_fault},
    {"cf9", by_cf9},
    {"64", by_keyboard_pulse},
    {"d1", by_keyboard_output_port},
    {"92", by_system_control},
    {"msr", by_hypervisor},
    {"init", by_init},
};

s64 reset_machine(const char *name) {
    for (u64 i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        if (length(ways[i].name) == length(name) && same(ways[i].name, name, length(name))) {
            log("selfguard: reset by %s\n", name);
            ways[i].reset();
            return -EIO;
        }
    }
    return -EINVAL;
}
