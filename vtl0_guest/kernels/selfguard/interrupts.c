/* The 8259 pair at vectors 32-47 and the 8254 at 50 Hz. */
#include "kernel.h"

#define PIC1 0x20
#define PIC2 0xA0
#define HERTZ 50

volatile u64 ticks;

void interrupts_init(void) {
    outb(PIC1, 0x11);
    outb(PIC2, 0x11);
    outb(PIC1 + 1, 32);
    outb(PIC2 + 1, 40);
    outb(PIC1 + 1, 4);
    outb(PIC2 + 1, 2);
    outb(PIC1 + 1, 1);
    outb(PIC2 + 1, 1);
    outb(PIC1 + 1, (u8)~(1 << 0 | 1 << 3)); /* timer, COM2 */
    outb(PIC2 + 1, 0xFF);

    outb(0x43, 0x34); /* channel 0, rate generator */
    outb(0x40, (1193182 / HERTZ) & 0xFF);
    outb(0x40, (1193182 / HERTZ) >> 8);
}

void interrupt(u32 line) {
    switch (line) {
    case 0:
        ticks++;
        break;
    case 3:
        console_interrupt();
        break;
    case VECTOR_WAKE - 32:
        wake_interrupt();
        return;
    default: /* spurious: no end of interrupt */
        return;
    }
    outb(PIC1, 0x20);
}
