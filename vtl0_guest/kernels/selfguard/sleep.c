/* Suspend to idle: every interrupt but the timer's is off, and the processor waits in HLT. */
#include "kernel.h"

#define PIC1_MASK 0x21

/* Timer interrupts that came meanwhile. */
s64 suspend_to_idle(u64 duration) {
    u64 start = ticks;
    u8 mask = inb(PIC1_MASK);
    outb(PIC1_MASK, 0xFE);
    while (ticks - start < duration)
        wait_for_interrupt();
    outb(PIC1_MASK, mask);
    return (s64)(ticks - start);
}
