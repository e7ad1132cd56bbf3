/* A kernel that pins its own control registers, as Linux does (arch/x86/kernel/cpu/common.c): first the write, then a look at
 * what is there, and the bits that went missing are written again. Whoever jumps to the MOV itself passes by the look. */
#include "kernel.h"

RO_AFTER_INIT static volatile u64 cr0_pinned, cr4_pinned; /* none until boot has set them all */

/* Pages of .ro_after_init are read-only by now; the direct map is not. */
static void set(volatile u64 *constant, u64 value) { *(volatile u64 *)direct(physical((void *)constant)) = value; }

void native_pinning_init(void) {
    set(&cr0_pinned, CR0_WP);
    set(&cr4_pinned, read_cr4() & (CR4_SMEP | CR4_SMAP | CR4_UMIP));
    log("selfguard: pinned by the kernel: CR0 %x, CR4 %x\n", cr0_pinned, cr4_pinned);
}

void native_write_cr0(u64 value) {
    write_cr0(value);
    if (cr0_pinned & ~value) {
        write_cr0(value | cr0_pinned);
        log("selfguard: CR0 WP bit went missing\n");
    }
}

void native_write_cr4(u64 value) {
    write_cr4(value);
    u64 missing = cr4_pinned & ~value;
    if (missing) {
        write_cr4(value | missing);
        log("selfguard: pinned CR4 bits changed: %x\n", missing);
    }
}
