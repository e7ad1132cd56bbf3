/* COM2: lines in by interrupt, lines out polled. Its reader waits in HLT with interrupts on. */
#include "kernel.h"

#define COM2 0x2F8

static char ring[4096];
static volatile u32 ring_head, ring_tail, ring_lines;

void console_init(void) {
    outb(COM2 + 3, 0x80);
    outb(COM2, 1);
    outb(COM2 + 1, 0);
    outb(COM2 + 3, 0x03);
    outb(COM2 + 2, 0x07);
    outb(COM2 + 4, 0x0B); /* OUT2 lets the interrupt through */
    outb(COM2 + 1, 0x01); /* received data */
}

void console_interrupt(void) {
    while (inb(COM2 + 5) & 0x01) {
        char c = (char)inb(COM2);
        if (c == '\r' || ring_head - ring_tail == sizeof ring)
            continue;
        ring[ring_head++ % sizeof ring] = c;
        ring_lines += c == '\n';
    }
}

/* Without its newline; what does not fit is cut. */
u64 console_read_line(char *buffer, u64 size) {
    static bool announced;
    if (!announced)
        log("selfguard: ready\n");
    announced = true;

    while (!ring_lines)
        wait_for_interrupt();
    u64 n = 0;
    for (;;) {
        char c = ring[ring_tail++ % sizeof ring];
        if (c == '\n')
            break;
        if (n < size)
            buffer[n++] = c;
    }
    ring_lines--;
    return n;
}

void console_write(const char *text, u64 size) { uart_write(COM2, text, size); }
