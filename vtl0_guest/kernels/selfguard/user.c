/* The user program, at CPL3: reads command lines from COM2, does them by system calls, writes one answer line for each. The table
 * at the end lists the commands; README.md describes them. */
#include "layout.h"
#include "types.h"

s64 system_call(u64 number, u64 a, u64 b, u64 c, u64 d);
u64 user_guarded(u64 address, u64 argument, u64 *result);

struct fault {
    u64 vector, error, rip, cr2;
};
struct driver_request {
    u64 operation, address, size, value, arguments[6], result, cpu, faulted;
};
enum { DRIVER_READ, DRIVER_WRITE, DRIVER_COPY, DRIVER_CALL };

#define LINE 2048
static char line[LINE], answer[LINE];
static u64 answer_size;
static char *words[12];
static u64 word_count;

static void put(const char *text) {
    while (*text && answer_size < LINE - 1)
        answer[answer_size++] = *text++;
}

static void put_hex(u64 value) {
    char digits[17];
    u32 n = 16;
    digits[n] = 0;
    do {
        digits[--n] = "0123456789abcdef"[value & 15];
        value >>= 4;
    } while (value);
    put("0x");
    put(digits + n);
}

static void put_decimal(u64 value) {
    char digits[21];
    u32 n = 20;
    digits[n] = 0;
    do {
        digits[--n] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    put(digits + n);
}

static void put_fault(void) {
    static struct fault fault;
    system_call(SYS_LAST_FAULT, (u64)&fault, 0, 0, 0);
    put("fault vector=");
    put_decimal(fault.vector);
    put(" error=");
    put_hex(fault.error);
    put(" rip=");
    put_hex(fault.rip);
    put(" cr2=");
    put_hex(fault.cr2);
}

static void put_ok(u64 value) {
    put("ok ");
    put_hex(value);
}

static void put_status(s64 status) {
    if (status == -EFAULTED) {
        put_fault();
    } else if (status < 0 && status > -4096) {
        put("error errno=");
        put_decimal((u64)-status);
    } else {
        put_ok((u64)status);
    }
}

static bool is(const char *a, const char *b) {
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static u64 length(const char *text) {
    u64 n = 0;
    while (text[n])
        n++;
    return n;
}

static u32 digit(char c) {
    return c >= '0' && c <= '9' ? (u32)(c - '0') : c >= 'a' && c <= 'f' ? (u32)(c - 'a' + 10) : 16;
}

/* Word n as a number, "0x…" or decimal; 0 if there is no such word. */
static u64 number(u64 n) {
    if (n >= word_count)
        return 0;
    const char *text = words[n];
    u32 base = 10;
    if (text[0] == '0' && text[1] == 'x')
        base = 16, text += 2;
    u64 value = 0;
    for (; digit(*text) < base; text++)
        value = value * base + digit(*text);
    return value;
}

/* Word n as bytes; their count. */
static u64 bytes(u64 n, u8 *to, u64 size) {
    const char *text = n < word_count ? words[n] : "";
    u64 count = 0;
    for (; count < size && digit(text[0]) < 16 && digit(text[1]) < 16; text += 2)
        to[count++] = (u8)(digit(text[0]) << 4 | digit(text[1]));
    return count;
}

static struct driver_request request;

static void drive(u64 operation, u64 address, u64 size, u64 value) {
    request.operation = operation;
    request.address = address;
    request.size = size;
    request.value = value;
    s64 status = system_call(SYS_DRIVER, (u64)&request, 0, 0, 0);
    if (status < 0)
        put_status(status);
    else
        put_ok(operation == DRIVER_READ || operation == DRIVER_CALL ? request.result : 0);
}

static void do_ping(void) { put("ok pong"); }
static void do_read(void) { drive(DRIVER_READ, number(1), number(2), 0); }
static void do_write(void) { drive(DRIVER_WRITE, number(1), number(2), number(3)); }
static void do_copy(void) { drive(DRIVER_COPY, number(1), number(3), number(2)); }

static void do_call(void) {
    for (u64 i = 0; i < 6; i++)
        request.arguments[i] = number(2 + i);
    drive(DRIVER_CALL, number(1), 0, 0);
}

static void do_user(void) {
    static u64 result;
    if (user_guarded(number(1), number(2), &result))
        put_fault();
    else
        put_ok(result);
}

static void do_ticks(void) { put_status(system_call(SYS_TICKS, 0, 0, 0, 0)); }

static void do_module(void) {
    const char *name = word_count > 1 ? words[1] : "";
    put_status(system_call(SYS_MODULE, (u64)name, length(name), 0, 0));
}

static void do_patch(void) {
    static u8 code[8];
    u64 size = bytes(2, code, sizeof code);
    put_status(system_call(SYS_PATCH, number(1), (u64)code, size, 0));
}

static void do_control(void) { put_status(system_call(SYS_CONTROL, number(1), number(2), 0, 0)); }
static void do_map(void) { put_status(system_call(SYS_MAP, number(1), number(2), number(3), 0)); }
static void do_vtl(void) { put_status(system_call(SYS_VTL_CALL, number(1), number(2), number(3), number(4))); }

static void do_reset(void) {
    const char *way = word_count > 1 ? words[1] : "";
    put_status(system_call(SYS_RESET, (u64)way, length(way), 0, 0));
}

static void do_smi(void) { put_status(system_call(SYS_SMI, number(1), number(2), number(3), 0)); }

static void do_sleep(void) { put_status(system_call(SYS_SLEEP, number(1), number(2), 0, 0)); }

static void do_kexec(u64 operation, const char *name) { put_status(system_call(SYS_KEXEC, operation, (u64)name, length(name), 0)); }

/* Of "load", "exec", "jump", by their first letter. */
static void do_kexec_command(void) {
    static char none[1];
    const char *verb = word_count > 1 ? words[1] : none, *name = word_count > 2 ? words[2] : none;
    do_kexec(verb[0] == 'l' ? 0 : verb[0] == 'e' ? 1 : verb[0] == 'j' ? 2 : ~0ull, verb[0] == 'l' ? name : none);
}

static void do_kdump_command(void) { do_kexec(3, word_count > 2 ? words[2] : words[0]); }
static void do_crash(void) { do_kexec(4, words[0]); }

static void do_cpu(void) {
    const char *verb = word_count > 1 ? words[1] : words[0];
    if (is(verb, "online") || is(verb, "offline"))
        put_status(system_call(SYS_CPU, number(2), is(verb, "online"), 0, 0));
    else
        put("error no such command");
}

static void do_hypercall(void) { put_ok((u64)system_call(SYS_HYPERCALL, number(1), number(2), number(3), 0)); }

static void do_nmi(void) { put_status(system_call(SYS_NMI, number(1), 0, 0, 0)); }

static void do_on(void);

#define DRIVER_COMMANDS 4
static const struct {
    const char *name;
    void (*run)(void);
} commands[] = {
    {"read", do_read},           {"write", do_write},         {"copy", do_copy},       {"call", do_call},   {"ping", do_ping},
    {"user", do_user},           {"ticks", do_ticks},         {"module", do_module},   {"patch", do_patch}, {"control", do_control},
    {"map", do_map},             {"vtl", do_vtl},             {"reset", do_reset},     {"smi", do_smi},     {"sleep", do_sleep},
    {"kexec", do_kexec_command}, {"kdump", do_kdump_command}, {"crash", do_crash},     {"cpu", do_cpu},     {"on", do_on},
    {"hypercall", do_hypercall}, {"nmi", do_nmi},
};

static void obey(u64 count) {
    for (u64 i = 0; i < count; i++) {
        if (word_count && is(words[0], commands[i].name)) {
            commands[i].run();
            return;
        }
    }
    put("error no such command");
}

/* The driver's commands, on another processor. */
static void do_on(void) {
    request.cpu = number(1);
    word_count -= word_count < 2 ? word_count : 2;
    for (u64 i = 0; i < word_count; i++)
        words[i] = words[i + 2];
    obey(DRIVER_COMMANDS);
    request.cpu = 0;
}

static void split(void) {
    word_count = 0;
    for (char *c = line; *c;) {
        while (*c == ' ')
            *c++ = 0;
        if (!*c || word_count == sizeof words / sizeof words[0])
            return;
        words[word_count++] = c;
        while (*c && *c != ' ')
            c++;
    }
}

void user_main(void) {
    for (;;) {
        s64 size = system_call(SYS_READ_LINE, (u64)line, LINE - 1, 0, 0);
        if (size < 0)
            continue;
        line[size] = 0;
        answer_size = 0;
        split();
        obey(sizeof commands / sizeof commands[0]);
        put("\n");
        system_call(SYS_WRITE_LINE, (u64)answer, answer_size, 0, 0);
    }
}
