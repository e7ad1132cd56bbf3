/* One kernel makes way for another: a multiboot module that is a signed kernel image (protos/vtlab/services.py, KexecType).
 *
 * Guarded, VTL1 checks the image, seals it, and does the rest by itself; this kernel only asks. Unguarded, this kernel copies the
 * image over itself and jumps, and nobody checks what it jumps to. */
#include "elf.h"
#include "kernel.h"
#include "services.h"

#define KEPT_SIZE 0x200000 /* for a crash kernel: what it will lie on */
#define ENTRY_MULTIBOOT 1
#define ENTRY_PAGE (PTE_PRESENT | PTE_WRITABLE)
#define MSR_GUEST_OS_ID 0x40000000
#define MSR_HYPERCALL 0x40000001

struct image_header {
    u8 magic[16];
    u32 version, entry, line_size, reserved;
    char command_line[];
};
struct multiboot_info {
    u32 flags, memory_lower, memory_upper, boot_device, command_line, module_count, modules;
};
struct copy {
    u64 to, from, file_size, memory_size;
};

extern u8 relocate_start[], relocate_end[];
static u64 ram;
static struct {
    u64 start, size;
} images[2]; /* for kexec, for a crash */
static struct kimage {
    u64 count, reserved;
    struct kexec_module modules[64];
} __attribute__((aligned(PAGE))) kimages[2];
_Static_assert(sizeof kimages[0] == PAGE, "each list has a page of its own");

void kexec_init(u64 ram_size) { ram = ram_size; }

static s64 validate(u64 start, u64 size, bool crash) {
    static struct heki_page table __attribute__((aligned(PAGE)));
    u64 kimage = physical(&kimages[crash]), kept = (ram & ~(u64)(KEPT_SIZE - 1)) - 2 * KEPT_SIZE;
    table.nranges = crash ? 3 : 2;
    table.ranges[0] = (struct heki_range){0, kimage, kimage + PAGE, KEXEC_KIMAGE};
    table.ranges[1] = (struct heki_range){0, start, start + size, KEXEC_KERNEL};
    table.ranges[2] = (struct heki_range){0, kept, kept + KEPT_SIZE, KEXEC_PAGES};
    return vtl_call(SERVICE_KEXEC_VALIDATE, physical(&table), table.nranges, crash);
}

static s64 load(const char *name, bool crash) {
    u64 start, size;
    if (!find_module(name, &start, &size))
        return -ENOENT;
    const struct image_header *header = direct(start);
    if (size < sizeof *header || !same(header->magic, "vtlab kexec 1\0\0", 16) || header->entry != ENTRY_MULTIBOOT)
        return -ENOEXEC;
    if (guarded) {
        s64 status = vtl_call(SERVICE_KEXEC_VALIDATE, 0, 0, crash); /* what was loaded before may be written again */
        if (status < 0)
            return status;
        kimages[crash].count = list_modules(kimages[crash].modules);
        status = validate(start, size, crash);
        if (status < 0)
            return status;
    }
    images[crash].start = start;
    images[crash].size = size;
    return 0;
}

/* The list of copies, ended by one of nothing; the entry point. */
static u64 plan(const struct image_header *header) {
    struct copy *copies = direct(RELOCATE_LIST);
    u64 elf_start = (u64)header->command_line + ((header->line_size + 7) & ~7u);
    const struct elf_header *elf = (void *)elf_start;
    const struct program_header *segment = (void *)(elf_start + elf->program_headers);
    for (u64 i = 0; i < elf->program_header_count && i < PAGE / sizeof *copies - 1; i++, segment++)
        if (segment->type == 1 && segment->memory_size)
            *copies++ = (struct copy){segment->physical_address, elf_start + segment->offset - DIRECT_MAP, segment->file_size,
                                      segment->memory_size};
    *copies = (struct copy){0};
    return elf->entry;
}

static void inform(const struct image_header *header) {
    u8 *page = direct(RELOCATE_INFO);
    struct multiboot_info *info = (void *)page;
    struct boot_module *list = (void *)(page + 88);
    static struct kexec_module modules[64];
    u64 count = list_modules(modules), at = 88 + count * sizeof *list;
    memset(page, 0, 2 * PAGE);
    for (u64 i = 0; i < count; i++, at += sizeof modules[i].command_line) {
        list[i] = (struct boot_module){(u32)modules[i].start, (u32)modules[i].end, RELOCATE_INFO + (u32)at, 0};
        memcpy(page + at, modules[i].command_line, sizeof modules[i].command_line);
    }
    memcpy(page + at, header->command_line, header->line_size < PAGE ? header->line_size : PAGE);
    *info = (struct multiboot_info){
        .flags = 1 | 1 << 2 | 1 << 3,
        .memory_lower = 639,
        .memory_upper = (u32)(ram >> 10) - 1024,
        .command_line = RELOCATE_INFO + (u32)at,
        .module_count = (u32)count,
        .modules = RELOCATE_INFO + 88,
    };
}

/* All memory one to one, and the kernel where it runs, in the three pages at RELOCATE_TABLES. */
void map_one_to_one(u64 *tables) {
    memset(tables, 0, 2 * PAGE);
    tables[0] = tables[511] = (RELOCATE_TABLES + PAGE) | ENTRY_PAGE;
    tables[512] = tables[512 + 510] = (RELOCATE_TABLES + 2 * PAGE) | ENTRY_PAGE;
    for (u64 i = 0; i < 512; i++)
        tables[1024 + i] = i << 21 | ENTRY_PAGE | PTE_LARGE;
}

/* The kernel's own way, as relocate_kernel of Linux goes it: tables that map all one to one and the kernel where it runs, then code
 * outside of what is overwritten. */
static void jump(u64 image) {
    const struct image_header *header = direct(image);
    u64 *tables = direct(RELOCATE_TABLES);
    u64 entry = plan(header);
    inform(header);
    memcpy(direct(RELOCATE_CODE), relocate_start, (u64)(relocate_end - relocate_start));
    map_one_to_one(tables);
    others_offline();
    write_cr3(RELOCATE_TABLES);
    wrmsr(MSR_HYPERCALL, 0); /* else its page stays laid over the next kernel */
    wrmsr(MSR_GUEST_OS_ID, 0);
    ((void (*)(u64, u64))RELOCATE_CODE)(RELOCATE_LIST, entry);
}

static s64 execute(bool crash) {
    if (guarded)
        return vtl_call(SERVICE_KEXEC_EXECUTE, crash, 0, 0);
    if (!images[crash].start)
        return -ENOENT;
    jump(images[crash].start);
    return -EINVAL;
}

/* From a trap that nobody recovers from. Comes back if there is no crash kernel. */
void kexec_crash(void) { execute(true); }

s64 kexec(u64 operation, const char *name) {
    switch (operation) {
    case KEXEC_LOAD:
    case KEXEC_LOAD_CRASH:
        return load(name, operation == KEXEC_LOAD_CRASH);
    case KEXEC_EXECUTE:
        log("selfguard: kexec\n");
        return execute(false);
    case KEXEC_JUMP: /* whatever VTL1 says to it */
        if (!images[0].start)
            return -ENOENT;
        jump(images[0].start);
        return -EINVAL;
    case KEXEC_CRASH:
        *guard_slot() = 0; /* nobody recovers from this */
        asm volatile("ud2");
    }
    return -EINVAL;
}
