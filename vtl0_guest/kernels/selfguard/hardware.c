/* What hardware tells at any instant: NMIs, and errors of memory. */
#include "kernel.h"

#define MSR_MCG_CAP 0x179
#define MSR_MCG_STATUS 0x17A
#define MSR_MC0_STATUS 0x401
#define MSR_MC0_ADDR 0x402
#define MCG_RESTART 1
#define STATUS_VALID (1ull << 63)
#define STATUS_CORRUPT (1ull << 57) /* of the processor's context */
#define PATIENCE 1000 /* timer interrupts */

u64 driver_invoke(u64 address, const u64 *arguments);

/* Whoever wants to hear of NMIs, as the chain of Linux's nmiaction: in ordinary memory. */
struct {
    u64 handler, arguments[6];
} nmi_action;
volatile u64 nmi_count;
struct {
    volatile u64 count, status, address;
} machine_checks;

void nmi(void) {
    nmi_count++;
    if (nmi_action.handler)
        driver_invoke(nmi_action.handler, nmi_action.arguments);
}

/* False if this processor cannot go on. A page that is bad is left aside; the address is all that is kept of it. */
bool machine_check(void) {
    if (!(rdmsr(MSR_MCG_CAP) & 0xFF))
        return false;
    u64 status = rdmsr(MSR_MC0_STATUS), global = rdmsr(MSR_MCG_STATUS);
    machine_checks.count++;
    machine_checks.status = status;
    machine_checks.address = rdmsr(MSR_MC0_ADDR);
    log("selfguard: machine check: status %x, address %x\n", machine_checks.status, machine_checks.address);
    if (!(status & STATUS_VALID) || status & STATUS_CORRUPT || !(global & MCG_RESTART))
        return false;
    wrmsr(MSR_MC0_STATUS, 0);
    wrmsr(MSR_MCG_STATUS, 0);
    return true;
}

/* Changes CR4 in the kernel's way, over and over, until so many NMIs have come, of which some are its own. */
s64 nmi_storm(u64 count) {
    u64 first = nmi_count, start = ticks;
    log("selfguard: NMI storm\n");
    s64 status = 0;
    for (u64 i = 0; status == 0 && nmi_count - first < count; i++) {
        status = set_control(4, read_cr4() ^ CR4_PGE);
        if (i % 4 == 0)
            send_nmi(0);
        asm volatile("sti; pause; cli" ::: "memory");
        if (ticks - start > PATIENCE)
            return -EIO;
    }
    return status ? status : (s64)(nmi_count - first);
}
