/* CR0 and CR4: by the kernel's own code until VTL1 has taken that away, by VTL1's service from then on. */
#include "kernel.h"
#include "services.h"

void control_init(void) {
    u64 cr4 = CR4_PAE | CR4_PGE;
    struct cpuid features = cpuid(7, 0);
    if (cpuid(1, 0).d & 1 << 7)
        cr4 |= CR4_MCE;
    if (features.b & 1 << 7)
        cr4 |= CR4_SMEP;
    if (features.b & 1 << 20)
        cr4 |= CR4_SMAP;
    if (features.c & 1 << 2)
        cr4 |= CR4_UMIP;
    write_cr4(cr4);
}

s64 set_control(u64 number, u64 value) {
    if (number != 0 && number != 4)
        return -EINVAL;
    if (guarded)
        return vtl_call(SERVICE_WRITE_CONTROL_REGISTER, number, value, 0);
    (number == 0 ? native_write_cr0 : native_write_cr4)(value);
    return 0;
}
