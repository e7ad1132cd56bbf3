/* GDT, TSS and IDT. They lie in .ro_after_init, which the final page tables map read-only; so every descriptor has its accessed
 * bit set, and the task register is loaded while the early page tables are still in force. */
#include "kernel.h"
#include "smp.h"

struct tss {
    u32 reserved0;
    u64 rsp[3];
    u64 reserved1;
    u64 ist[7];
    u64 reserved2;
    u16 reserved3, io_map;
} __attribute__((packed));

struct gate {
    u16 offset_low, selector;
    u8 ist, attributes;
    u16 offset_middle;
    u32 offset_high, reserved;
};

extern u64 trap_stubs[VECTORS];
extern u8 kernel_stack_top[], fault_stack_top[], machine_check_stack_top[], ap_stacks[MAX_CPUS - 1][1 << AP_STACK_SHIFT];

RO_AFTER_INIT struct tss tss[MAX_CPUS];
RO_AFTER_INIT struct gate interrupt_descriptor_table[256];
RO_AFTER_INIT u64 global_descriptor_table[GDT_SIZE / 8] = {
    [SELECTOR_KERNEL_CODE / 8] = 0x00AF9B000000FFFF,
    [SELECTOR_KERNEL_DATA / 8] = 0x00CF93000000FFFF,
    [SELECTOR_USER_BASE / 8] = 0x00CFFB000000FFFF, /* 32-bit code: not used */
    [SELECTOR_USER_DATA / 8] = 0x00CFF3000000FFFF,
    [SELECTOR_USER_CODE / 8] = 0x00AFFB000000FFFF,
};

void descriptors_init(void) {
    for (u64 i = 0; i < MAX_CPUS; i++) {
        u64 base = (u64)&tss[i], *descriptor = &global_descriptor_table[SELECTOR_TSS / 8 + 2 * i];
        tss[i].rsp[0] = i ? (u64)ap_stacks[i] : (u64)kernel_stack_top; /* where the next one's starts */
        tss[i].ist[0] = i ? (u64)ap_stacks[i - 1] + PAGE : (u64)fault_stack_top;
        tss[i].ist[1] = i ? (u64)ap_stacks[i - 1] + 2 * PAGE : (u64)machine_check_stack_top;
        tss[i].io_map = sizeof tss[i];
        descriptor[0] = (sizeof tss[i] - 1) | (base & 0xFFFFFF) << 16 | 0x89ull << 40 | (base >> 24 & 0xFF) << 56;
        descriptor[1] = base >> 32;
    }

    for (u32 vector = 0; vector < VECTORS; vector++) {
        u64 stub = trap_stubs[vector];
        u8 own_stack = vector == 2 || vector == 8 ? 1 : vector == 18 ? 2 : 0;
        interrupt_descriptor_table[vector] = (struct gate){
            .offset_low = (u16)stub,
            .selector = SELECTOR_KERNEL_CODE,
            .ist = own_stack,
            .attributes = vector == 3 ? 0xEE : 0x8E,
            .offset_middle = (u16)(stub >> 16),
            .offset_high = (u32)(stub >> 32),
        };
    }

    struct table_register gdtr = {sizeof global_descriptor_table - 1, (u64)global_descriptor_table};
    struct table_register idtr = {sizeof interrupt_descriptor_table - 1, (u64)interrupt_descriptor_table};
    load_gdt(&gdtr);
    load_task_register(SELECTOR_TSS);
    load_idt(&idtr);
}
