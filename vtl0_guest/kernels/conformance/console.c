/* COM1, and the end of the machine. */
#include "kernel.h"

enum { COM1 = 0x3F8, LINE_STATUS = 5, TRANSMITTER_EMPTY = 0x20, DEBUG_EXIT = 0xF4 };

static void put(u8 byte)
{
    while (!(inb(COM1 + LINE_STATUS) & TRANSMITTER_EMPTY))
        ;
    outb(COM1, byte);
}

void say(const char *text)
{
    for (; *text; text++)
        put(*text);
}

void say_hex(u64 value)
{
    int shift = 60;
    say("0x");
    while (shift && !(value >> shift & 0xF))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 0xF]);
}

void finish(u32 value)
{
    outl(DEBUG_EXIT, value);
    for (;;)
        __asm__ volatile("cli; hlt");
}
