/* Where exceptions and interrupts end up. A fault inside a guarded call (driver.c) or in guarded user code ends that operation
 * only; any other fault ends the kernel. */
#include "kernel.h"

extern u8 guard_landing[];

struct fault last_fault;
static u64 recovery_rip, recovery_rsp;

void set_user_recovery(u64 rip, u64 rsp) {
    recovery_rip = rip;
    recovery_rsp = rsp;
}

void trap(struct frame *frame) {
    if (frame->vector >= 32) {
        interrupt((u32)frame->vector - 32);
        return;
    }

    if (frame->vector == 2) {
        nmi();
        return;
    }
    if (frame->vector == 18 && machine_check())
        return;

    bool from_user = frame->cs & 3;
    last_fault = (struct fault){frame->vector, frame->error, frame->rip, frame->vector == 14 ? read_cr2() : 0};
    log("oops: vector=%u error=%x rip=%x cr2=%x cpl=%u\n", last_fault.vector, last_fault.error, last_fault.rip, last_fault.cr2,
        frame->cs & 3);

    if (from_user && recovery_rip) {
        frame->rip = recovery_rip;
        frame->rsp = recovery_rsp;
        frame->rflags = 0x202;
    } else if (!from_user && *guard_slot()) {
        frame->rip = (u64)guard_landing;
        frame->rsp = *guard_slot();
        frame->rflags = 0x2;
        frame->ss = SELECTOR_KERNEL_DATA;
    } else {
        if (this_cpu() == 0)
            kexec_crash();
        log("selfguard: stopped\n");
        stop();
    }
}
