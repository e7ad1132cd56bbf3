/* The part of firmware: installs the SMI handler in SMRAM and locks it, before anybody else runs. Machines whose SMRAM is locked
 * already, or that have none, keep what they have. */
#include "kernel.h"
#include "smm.h"
#include "smp.h"

#define CONFIG_ADDRESS 0xCF8
#define CONFIG_DATA 0xCFC
#define HOST_BRIDGE 0x80000000
#define SMRAM_REGISTER 0x9D
#define SMRAM_OPEN 0x40
#define SMRAM_LOCK 0x10
#define SMRAM_ENABLE 0x08
#define APM_CONTROL 0xB2
#define SMI_ENABLE 0x630
#define SMI_ENABLE_GLOBAL_APM 0x21
#define MSR_APIC_BASE 0x1B
#define APIC_BASE_X2APIC (1u << 10)
#define MSR_X2APIC_LINT0 0x835
#define LINT_SMI 0x200
#define LINT_EXTINT 0x700
#define MSR_X2APIC_SPURIOUS 0x80F
#define APIC_ENABLED 0x100
#define PIC 0x20
#define PIC_READ_REQUESTS 0x0A

extern const u8 smm_relocation[], smm_relocation_end[], smm_handler[], smm_handler_end[];

static bool installed;
static const u8 smm_return[] = {0x0F, 0xAA}; /* RSM */

static u8 smram_control(u8 value, bool write) {
    outl(CONFIG_ADDRESS, HOST_BRIDGE | (SMRAM_REGISTER & ~3u));
    if (write)
        outb(CONFIG_DATA + (SMRAM_REGISTER & 3), value);
    return inb(CONFIG_DATA + (SMRAM_REGISTER & 3));
}

/* A host bridge with an identity has firmware that sees to its SMRAM. */
static bool is_ours(void) {
    outl(CONFIG_ADDRESS, HOST_BRIDGE);
    return inl(CONFIG_DATA) == 0xFFFFFFFF && !(smram_control(0, false) & (0x80 | SMRAM_LOCK));
}

/* How many SMIs there have been. */
static u64 request(u8 command, u64 value, u64 address) {
    u64 count = command;
    asm volatile("outb %%al, %1" : "+a"(count) : "N"(APM_CONTROL), "b"(value), "c"(address) : "memory");
    return count;
}

/* The SMBASE of RESET lies in memory that belongs to somebody else: it is lent for one SMI. */
static void relocate(void *number) {
    static u8 code[64], area[SMM_SAVE_AREA_SIZE];
    u8 *entry = direct(SMBASE_AFTER_RESET + SMM_ENTRY), *saved = direct(SMBASE_AFTER_RESET + SMM_SAVE_AREA);
    memcpy(code, entry, sizeof code);
    memcpy(area, saved, sizeof area);
    u64 size = (u64)(smm_relocation_end - smm_relocation), base = SMRAM + (u64)number * SMBASE_STEP;
    memcpy(entry, smm_relocation, size);
    *(u32 *)(entry + size - sizeof smm_return - sizeof(u32)) = (u32)base;
    request(SMM_NOTHING, 0, 0);
    memcpy(entry, code, sizeof code);
    memcpy(saved, area, sizeof area);
}

void smm_init(void) {
    if (!is_ours())
        return;
    smram_control(SMRAM_OPEN | SMRAM_ENABLE, true);
    memset(direct(SMM_DATA), 0, 8);
    memcpy(direct(SMRAM + SMM_ENTRY), smm_handler, (u64)(smm_handler_end - smm_handler));
    outl(SMI_ENABLE, SMI_ENABLE_GLOBAL_APM);
    relocate(0);
    for (u64 number = 1; number < MAX_CPUS; number++) {
        memcpy(direct(SMRAM + number * SMBASE_STEP + SMM_ENTRY), smm_return, sizeof smm_return);
        run_on(number, relocate, (void *)number);
    }
    installed = request(SMM_NOTHING, 0, 0) == 1;
    smram_control(SMRAM_LOCK | SMRAM_ENABLE, true);
    log("selfguard: SMI handler %s\n", installed ? "installed" : "does not run");
}

/* Writes CR4 in the kernel's way, over and over, until an SMI that nobody here asked for has come: the timer's. */
static s64 smi_storm(void) {
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | APIC_BASE_X2APIC);
    wrmsr(MSR_X2APIC_SPURIOUS, APIC_ENABLED | 0xFF);
    wrmsr(MSR_X2APIC_LINT0, LINT_EXTINT);
    s64 status = 0;
    for (u64 start = ticks; ticks == start;)
        wait_for_interrupt();
    wrmsr(MSR_X2APIC_LINT0, LINT_SMI);
    for (u32 after = 0; after < 4 && status == 0;) {
        status = set_control(4, read_cr4() ^ CR4_PGE);
        outb(PIC, PIC_READ_REQUESTS);
        after += inb(PIC) & 1;
    }
    wrmsr(MSR_X2APIC_LINT0, LINT_EXTINT);
    log("selfguard: back from SMI storm\n");
    return status;
}

s64 smi(u64 command, u64 value, u64 address) {
    if (!installed)
        return -ENOSYS;
    if (command == SMM_STORM)
        return smi_storm();
    u64 count = request((u8)command, value, address);
    log("selfguard: back from SMI %u\n", count);
    return (s64)count;
}
