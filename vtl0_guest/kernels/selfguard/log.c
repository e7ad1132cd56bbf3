/* The kernel's log: text lines on COM1, polled. */
#include "kernel.h"

#define COM1 0x3F8
#define UART_FIFO 16

/* As much at once as the transmitter's FIFO takes. */
void uart_write(u16 port, const char *text, u64 size) {
    while (size) {
        while (!(inb(port + 5) & 0x20))
            ;
        u64 count = size < UART_FIFO ? size : UART_FIFO;
        outsb(port, text, count);
        text += count;
        size -= count;
    }
}

static void put(const char *text, u64 size) { uart_write(COM1, text, size); }

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
    u32 first = sizeof digits;
    do {
        digits[--first] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    put(digits + first, sizeof digits - first);
}

void log(const char *format, ...) {
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    while (*format) {
        const char *text = format;
        while (*format && *format != '%')
            format++;
        put(text, format - text);
        if (!*format)
            break;
        format++;
        switch (*format++) {
        case 's':
            text = __builtin_va_arg(arguments, const char *);
            put(text, length(text));
            break;
        case 'u':
            put_number(__builtin_va_arg(arguments, u64), 10);
            break;
        case 'x':
            put("0x", 2);
            put_number(__builtin_va_arg(arguments, u64), 16);
            break;
        }
    }
    __builtin_va_end(arguments);
}
