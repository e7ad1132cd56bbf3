/* The kernel's log: text lines on COM1, polled. */
#include "kernel.h"

#define COM1 0x3F8

static void put(char c) {
    while (!(inb(COM1 + 5) & 0x20))
        ;
    outb(COM1, (u8)c);
}

void log_init(void) {
    outb(COM1 + 1, 0);    /* no interrupts */
    outb(COM1 + 3, 0x80); /* divisor 1: 115200 */
    outb(COM1, 1);
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x03); /* 8N1 */
    outb(COM1 + 2, 0x07); /* FIFO */
    outb(COM1 + 4, 0x03);
}

static void put_number(u64 value, u32 base) {
    char digits[20];
    u32 n = 0;
    do {
        digits[n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (n)
        put(digits[--n]);
}

void log(const char *format, ...) {
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            for (const char *text = __builtin_va_arg(arguments, const char *); *text; text++)
                put(*text);
            break;
        case 'u':
            put_number(__builtin_va_arg(arguments, u64), 10);
            break;
        case 'x':
            put('0');
            put('x');
            put_number(__builtin_va_arg(arguments, u64), 16);
            break;
        }
    }
    __builtin_va_end(arguments);
}
