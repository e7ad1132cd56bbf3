/* Instructions that C has no words for, and the bits they take (Intel SDM volume 3, sections 2.5 and 4.5). */
#pragma once

#include "types.h"

#define CR0_TS (1ull << 3)
#define CR0_WP (1ull << 16)
#define CR4_PAE (1ull << 5)
#define CR4_MCE (1ull << 6)
#define CR4_PGE (1ull << 7)
#define CR4_UMIP (1ull << 11)
#define CR4_SMEP (1ull << 20)
#define CR4_SMAP (1ull << 21)

#define PTE_PRESENT (1ull << 0)
#define PTE_WRITABLE (1ull << 1)
#define PTE_USER (1ull << 2)
#define PTE_UNCACHED (1ull << 4)
#define PTE_ACCESSED (1ull << 5)
#define PTE_DIRTY (1ull << 6)
#define PTE_LARGE (1ull << 7)
#define PTE_GLOBAL (1ull << 8)
#define PTE_NX (1ull << 63)
#define PTE_ADDRESS 0x000FFFFFFFFFF000ull

#define MSR_SYSENTER_CS 0x174
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176
#define MSR_EFER 0xC0000080
#define MSR_STAR 0xC0000081
#define MSR_LSTAR 0xC0000082
#define MSR_CSTAR 0xC0000083
#define MSR_SFMASK 0xC0000084

static inline void outb(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outsb(u16 port, const void *from, u64 count) {
    asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(port) : "memory");
}
static inline u8 inb(u16 port) {
    u8 value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u64 read_cr0(void) {
    u64 value;
    asm volatile("mov %%cr0, %0" : "=r"(value));
    return value;
}
static inline u64 read_cr2(void) {
    u64 value;
    asm volatile("mov %%cr2, %0" : "=r"(value));
    return value;
}
static inline u64 read_cr3(void) {
    u64 value;
    asm volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}
static inline u64 read_cr4(void) {
    u64 value;
    asm volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}

struct cpuid {
    u32 a, b, c, d;
};
static inline struct cpuid cpuid(u32 leaf, u32 subleaf) {
    struct cpuid r;
    asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(subleaf));
    return r;
}

static inline void stac(void) { asm volatile("stac" ::: "memory"); }
static inline void clac(void) { asm volatile("clac" ::: "memory"); }

/* cpu.c; out of line, so that there is one of each and it has a name. */
u64 rdmsr(u32 index);
void wrmsr(u32 index, u64 value);
void invlpg(u64 address);
void outl(u16 port, u32 value);
u32 inl(u16 port);
void wait_for_interrupt(void);
_Noreturn void stop(void);

/* privileged.S; gone when VTL1 has ended boot. */
void write_cr0(u64 value);
void write_cr3(u64 value);
void write_cr4(u64 value);
void load_gdt(const void *table);
void load_idt(const void *table);
void load_task_register(u16 selector);
