/* What CPL3 may ask for. */
#include "kernel.h"

void syscalls_init(void) {
    wrmsr(MSR_STAR, (u64)(SELECTOR_USER_BASE | 3) << 48 | (u64)SELECTOR_KERNEL_CODE << 32);
    wrmsr(MSR_LSTAR, (u64)syscall_entry);
    wrmsr(MSR_CSTAR, (u64)syscall_entry);
    wrmsr(MSR_SFMASK, SYSCALL_MASK);
    wrmsr(MSR_SYSENTER_CS, 0);
    wrmsr(MSR_SYSENTER_ESP, 0);
    wrmsr(MSR_SYSENTER_EIP, 0);
}

static bool in_user_data(u64 address, u64 size) {
    return address >= (u64)user_data_start && size <= (u64)(user_data_end - user_data_start) && address + size <= (u64)user_data_end;
}

s64 copy_from_user(void *to, u64 from, u64 size) {
    if (!in_user_data(from, size))
        return -EFAULT;
    stac();
    memcpy(to, (void *)from, size);
    clac();
    return 0;
}

s64 copy_to_user(u64 to, const void *from, u64 size) {
    if (!in_user_data(to, size))
        return -EFAULT;
    stac();
    memcpy((void *)to, from, size);
    clac();
    return 0;
}

static s64 sys_read_line(u64 buffer, u64 size, u64 c, u64 d) {
    static char line[2048];
    (void)c, (void)d;
    u64 n = console_read_line(line, size < sizeof line ? size : sizeof line);
    s64 status = copy_to_user(buffer, line, n);
    return status < 0 ? status : (s64)n;
}

static s64 sys_write_line(u64 buffer, u64 size, u64 c, u64 d) {
    static char line[2048];
    (void)c, (void)d;
    if (size > sizeof line)
        return -EINVAL;
    s64 status = copy_from_user(line, buffer, size);
    if (status == 0)
        console_write(line, size);
    return status;
}

static s64 sys_ticks(u64 a, u64 b, u64 c, u64 d) {
    (void)a, (void)b, (void)c, (void)d;
    return (s64)ticks;
}

static s64 sys_driver(u64 user_request, u64 b, u64 c, u64 d) {
    static struct driver_request request;
    (void)b, (void)c, (void)d;
    s64 status = copy_from_user(&request, user_request, sizeof request);
    if (status == 0)
        status = driver_request(&request);
    return status == 0 ? copy_to_user(user_request, &request, sizeof request) : status;
}

static s64 sys_recovery(u64 rip, u64 rsp, u64 c, u64 d) {
    (void)c, (void)d;
    set_user_recovery(rip, rsp);
    return 0;
}

static s64 sys_last_fault(u64 to, u64 b, u64 c, u64 d) {
    (void)b, (void)c, (void)d;
    return copy_to_user(to, &last_fault, sizeof last_fault);
}

static s64 sys_module(u64 name, u64 size, u64 c, u64 d) {
    char text[32] = {0};
    (void)c, (void)d;
    if (size >= sizeof text)
        return -EINVAL;
    s64 status = copy_from_user(text, name, size);
    return status < 0 ? status : load_module(text);
}

static s64 sys_reset(u64 name, u64 size, u64 c, u64 d) {
    char text[16] = {0};
    (void)c, (void)d;
    if (size >= sizeof text)
        return -EINVAL;
    s64 status = copy_from_user(text, name, size);
    return status < 0 ? status : reset_machine(text);
}

static s64 sys_smi(u64 command, u64 value, u64 address, u64 d) {
    (void)d;
    return smi(command, value, address);
}

static s64 sys_sleep(u64 state, u64 duration, u64 c, u64 d) {
    (void)c, (void)d;
    return sleep_in(state, duration);
}

static s64 sys_cpu(u64 number, u64 on, u64 c, u64 d) {
    (void)c, (void)d;
    return cpu_set(number, on);
}

static s64 sys_nmi(u64 count, u64 b, u64 c, u64 d) {
    (void)b, (void)c, (void)d;
    return nmi_storm(count);
}

static s64 sys_kexec(u64 operation, u64 name, u64 size, u64 d) {
    char text[32] = {0};
    (void)d;
    if (size >= sizeof text)
        return -EINVAL;
    s64 status = copy_from_user(text, name, size);
    return status < 0 ? status : kexec(operation, text);
}

static s64 sys_patch(u64 address, u64 bytes, u64 size, u64 d) {
    u8 code[8];
    (void)d;
    if (size > sizeof code)
        return -EINVAL;
    s64 status = copy_from_user(code, bytes, size);
    return status < 0 ? status : text_poke(address, code, size);
}

static s64 sys_control(u64 number, u64 value, u64 c, u64 d) {
    (void)c, (void)d;
    return set_control(number, value);
}

static s64 sys_map(u64 address, u64 page, u64 flags, u64 d) {
    (void)d;
    return map_page(address, page, flags);
}

static s64 sys_hypercall(u64 control, u64 rdx, u64 r8, u64 d) {
    (void)d;
    return (s64)hypercall(control, rdx, r8);
}

static s64 (*const table[SYS_COUNT])(u64, u64, u64, u64) = {
    [SYS_READ_LINE] = sys_read_line, [SYS_WRITE_LINE] = sys_write_line,
    [SYS_TICKS] = sys_ticks,         [SYS_DRIVER] = sys_driver,
    [SYS_RECOVERY] = sys_recovery,   [SYS_LAST_FAULT] = sys_last_fault,
    [SYS_MODULE] = sys_module,       [SYS_PATCH] = sys_patch,
    [SYS_CONTROL] = sys_control,     [SYS_MAP] = sys_map,
    [SYS_VTL_CALL] = vtl_call,       [SYS_HYPERCALL] = sys_hypercall,
    [SYS_RESET] = sys_reset,         [SYS_SMI] = sys_smi,
    [SYS_SLEEP] = sys_sleep,         [SYS_KEXEC] = sys_kexec,
    [SYS_CPU] = sys_cpu,             [SYS_NMI] = sys_nmi,
};

struct request {
    u64 a, b, c, d, number;
    s64 result;
};

static void dispatch(void *argument) {
    struct request *request = argument;
    request->result = table[request->number](request->a, request->b, request->c, request->d);
}

/* From entry.S. The calls that can meet VTL1's refusal run guarded; the driver guards itself, and a line is waited for outside,
 * where a fault is the kernel's own. */
s64 syscall(u64 a, u64 b, u64 c, u64 d, u64 number) {
    if (number >= SYS_COUNT)
        return -ENOSYS;
    if (number < SYS_MODULE)
        return table[number](a, b, c, d);
    struct request request = {a, b, c, d, number, 0};
    return guarded_call(dispatch, &request) ? -EFAULTED : request.result;
}
