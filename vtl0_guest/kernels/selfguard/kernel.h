/* What the kernel's files offer one another. */
#pragma once

#include "layout.h"
#include "x86.h"

#define RO_AFTER_INIT __attribute__((section(".ro_after_init")))

/* Linker script. */
extern u8 text_start[], text_end[], privileged_start[], privileged_end[], rodata_start[], rodata_end[], patches_start[],
    patches_end[], policy_start[], policy_end[], user_text_start[], user_text_end[], user_data_start[], user_data_end[], data_start[],
    kernel_end[];
/* data.S */
extern u8 certificate_start[], certificate_end[], hypercall_page[], vtl1_memory[], vtl1_memory_end[], module_area[],
    module_area_end[];

static inline u64 physical(const void *kernel_address) { return (u64)kernel_address - KERNEL_VMA; }
static inline void *direct(u64 physical_address) { return (void *)(DIRECT_MAP + physical_address); }

/* string.c */
void *memcpy(void *to, const void *from, unsigned long size);
void *memset(void *to, int byte, unsigned long size);
bool same(const void *a, const void *b, u64 size);
u64 length(const char *text);

/* log.c: COM1. Conversions: %s, %u (decimal u64), %x (hexadecimal u64). */
void log_init(void);
void log(const char *format, ...);
void uart_write(u16 port, const char *text, u64 size);

/* console.c: COM2. */
void console_init(void);
void console_interrupt(void);
u64 console_read_line(char *buffer, u64 size);
void console_write(const char *text, u64 size);

/* interrupts.c: PIC and PIT. */
extern volatile u64 ticks;
void interrupts_init(void);
void interrupt(u32 line);

/* descriptors.c */
void descriptors_init(void);
struct table_register {
    u16 limit;
    u64 base;
} __attribute__((packed));

/* traps.c */
struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax, vector, error, rip, cs, rflags, rsp, ss;
};
struct fault {
    u64 vector, error, rip, cr2;
};
extern struct fault last_fault;
void trap(struct frame *frame);
u64 *guard_slot(void);
void set_user_recovery(u64 rip, u64 rsp);
s64 guarded_call(void (*function)(void *), void *argument);

/* paging.c */
void paging_init(u64 ram_size);
s64 map_page(u64 address, u64 page, u64 flags);

/* main.c */
bool option(const char *line, const char *word);

/* control.c */
void control_init(void);
s64 set_control(u64 number, u64 value);

/* native_pinning.c */
void native_pinning_init(void);
void native_write_cr0(u64 value);
void native_write_cr4(u64 value);

/* heki.c */
s64 kvm_hypercall(u64 number, u64 a0, u64 a1, u64 a2, u64 a3);
void heki_v3(void);
void heki_v2(void);

/* guard_device.c, privileged.S */
void guard_device_init(void);
void guard_doorbell(u32 tail);

/* protect.c */
void protection_choose(const char *command_line);
void protect(void);

/* syscalls.c */
void syscalls_init(void);
void syscall_entry(void);
s64 copy_from_user(void *to, u64 from, u64 size);
s64 copy_to_user(u64 to, const void *from, u64 size);

/* driver.c */
struct driver_request {
    u64 operation, address, size, value, arguments[6], result, cpu, faulted;
};
enum { DRIVER_READ, DRIVER_WRITE, DRIVER_COPY, DRIVER_CALL };
void driver_init(void);
s64 driver_request(struct driver_request *request);

/* modules.c */
struct boot_module {
    u32 start, end, command_line, reserved;
};
void modules_init(const struct boot_module *list, u64 count);
s64 load_module(const char *name);
bool find_module(const char *name, u64 *start, u64 *size);
struct kexec_module {
    u64 start, end;
    char command_line[32];
};
u64 list_modules(struct kexec_module *to);

/* kexec.c, relocate.S */
enum { KEXEC_LOAD, KEXEC_EXECUTE, KEXEC_JUMP, KEXEC_LOAD_CRASH, KEXEC_CRASH };
void kexec_init(u64 ram_size);
s64 kexec(u64 operation, const char *name);
void kexec_crash(void);
void map_one_to_one(u64 *tables);

/* reset.c */
s64 reset_machine(const char *name);

/* smm.c */
void smm_init(void);
s64 smi(u64 command, u64 value, u64 address);

/* smp.c */
void smp_init(void);
void wake_interrupt(void);
void send_nmi(u64 number);
u64 this_cpu(void);
s64 cpu_set(u64 number, bool on);
s64 run_on(u64 number, void (*work)(void *), void *argument);
u64 others_offline(void); /* which were online, one bit each */
void others_online(u64 which);

/* sleep.c */
void sleep_init(void);
s64 sleep_in(u64 state, u64 duration);

/* hibernate.c */
void hibernate_init(u64 ram_size);
s64 hibernate(void);
void hibernate_resume(bool by_vtl1);

/* hardware.c */
void nmi(void);
bool machine_check(void);
s64 nmi_storm(u64 count);

/* text_poke.c */
s64 text_poke(u64 address, const void *bytes, u64 size);

/* vtl.c */
struct heki_range {
    u64 va, pa, epa, attributes;
};
struct heki_page {
    u64 next, next_pa, nranges;
    struct heki_range ranges[127];
    u64 padding;
};
extern bool guarded; /* VTL1 has the policy, and boot is over */
void vtl_init(bool heki);
bool hypercall_page_init(void);
s64 vtl_call(u64 service, u64 a, u64 b, u64 c);
u64 hypercall(u64 control, u64 rdx, u64 r8);
