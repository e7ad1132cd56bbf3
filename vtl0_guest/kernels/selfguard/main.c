/* Boot: from the multiboot loader's information to the user program. */
#include "kernel.h"

#define MULTIBOOT_MAGIC 0x2BADB002
#define INFO_MEMORY (1 << 0)
#define INFO_COMMAND_LINE (1 << 2)
#define INFO_MODULES (1 << 3)

struct multiboot_info {
    u32 flags, memory_lower, memory_upper, boot_device, command_line, module_count, modules;
};

extern u8 user_stack_top[];
void user_entry(void);
_Noreturn void enter_user(void (*rip)(void), u8 *rsp);

/* "name=value" as a word of the command line. */
bool option(const char *line, const char *word) {
    for (u64 size = length(word); *line; line++)
        if (same(line, word, size) && (line[size] == 0 || line[size] == ' '))
            return true;
    return false;
}

void kmain(u32 magic, const struct multiboot_info *info) {
    log_init();
    log("selfguard: at VTL0\n");
    if (magic != MULTIBOOT_MAGIC) {
        log("selfguard: not started by a multiboot loader\n");
        stop();
    }
    const char *line = info->flags & INFO_COMMAND_LINE ? (const char *)(u64)info->command_line : "";
    u64 ram = info->flags & INFO_MEMORY ? ((u64)info->memory_upper + 1024) << 10 : 16ull << 20;
    log("selfguard: command line: %s\n", line);
    protection_choose(line);
    if (info->flags & INFO_MODULES)
        modules_init((const struct boot_module *)(u64)info->modules, info->module_count);
    kexec_init(ram);
    hibernate_init(ram);

    descriptors_init();
    control_init();
    paging_init(ram);
    syscalls_init();
    interrupts_init();
    console_init();
    smp_init();
    smm_init();
    sleep_init();
    driver_init();
    protect();
    log("selfguard: %s\n", guarded ? "guarded by VTL1" : "not guarded");
    enter_user(user_entry, user_stack_top);
}
