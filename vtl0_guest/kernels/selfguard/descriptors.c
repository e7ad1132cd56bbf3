/* GDT, TSS and IDT. They lie in .ro_after_init, which the final page tables map read-only; so every descriptor has its accessed
 * bit set, and the task register is loaded while the early page tables are still in force. */
#include "kernel.h"

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

extern u64 trap_stubs[48];
extern u8 kernel_stack_top[], fault_stack_top[];

RO_AFTER_INIT struct tss tss;
RO_AFTER_INIT struct gate interrupt_descriptor_table[256];
RO_AFTER_INIT u64 global_descriptor_table[8] = {
    [SELECTOR_KERNEL_CODE / 8] = 0x00AF9B000000FFFF,
    [SELECTOR_KERNEL_DATA / 8] = 0x00CF93000000FFFF,
    [SELECTOR_USER_BASE / 8] = 0x00CFFB000000FFFF, /* 32-bit code: not used */
    [SELECTOR_USER_DATA / 8] = 0x00CFF3000000FFFF,
    [SELECTOR_USER_CODE / 8] = 0x00AFFB000000FFFF,
};

void descriptors_init(void) {
    u64 base = (u64)&tss;
    tss.rsp[0] = (u64)kernel_stack_top;
    tss.ist[0] = (u64)fault_stack_top;
    tss.io_map = sizeof tss;
    global_descriptor_table[SELECTOR_TSS / 8] = (sizeof tss - 1) | (base & 0xFFFFFF) << 16 | 0x89ull << 40 | (base >> 24 & 0xFF) << 56;
    global_descriptor_table[SELECTOR_TSS / 8 + 1] = base >> 32;

    for (u32 vector = 0; vector < 48; vector++) {
        u64 stub = trap_stubs[vector];
        bool own_stack = vector == 2 || vector == 8;
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
