/* One named copy of each instruction that has to be a function. */
#include "kernel.h"

u64 rdmsr(u32 index) {
    u32 low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (u64)high << 32 | low;
}

void wrmsr(u32 index, u64 value) { asm volatile("wrmsr" ::"c"(index), "a"((u32)value), "d"((u32)(value >> 32))); }

void invlpg(u64 address) { asm volatile("invlpg (%0)" ::"r"(address) : "memory"); }

void outl(u16 port, u32 value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }

u32 inl(u16 port) {
    u32 value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* STI takes effect after the next instruction, so no interrupt is lost between it and HLT. */
void wait_for_interrupt(void) { asm volatile("sti; hlt; cli" ::: "memory"); }

void stop(void) {
    for (;;)
        asm volatile("cli; hlt");
}
