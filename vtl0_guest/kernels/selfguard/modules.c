/* Loads a multiboot module, by the name that is the last word of its command line, into the module area and runs its entry.
 *
 * A module is an ELF64 with one loadable segment of position-independent code. It is written through the direct map; the area
 * itself has no mapping until the code may run. Guarded, VTL1 checks the signature at the file's end, compares what was loaded,
 * and lets the pages be executed; only then does it accept an executable mapping of them. */
#include "elf.h"
#include "kernel.h"
#include "services.h"

#define MAX_MODULES 12

static struct {
    u64 start, size;
    char name[32];
} modules[MAX_MODULES];
static u64 module_count;
static s64 token; /* of the module that VTL1 let in, or 0 */

/* Copies the list out of low memory, while that is still mapped. */
void modules_init(const struct boot_module *list, u64 count) {
    for (; module_count < count && module_count < MAX_MODULES; module_count++) {
        const struct boot_module *from = &list[module_count];
        const char *name = (const char *)(u64)from->command_line;
        for (const char *c = name; *c; c++)
            if (*c == ' ')
                name = c + 1;
        u64 size = length(name);
        modules[module_count].start = from->start;
        modules[module_count].size = from->end - from->start;
        memcpy(modules[module_count].name, name, size < 31 ? size : 31);
        log("selfguard: module %s, %u bytes\n", modules[module_count].name, modules[module_count].size);
    }
}

static s64 map_area(u64 size, u64 flags) {
    for (u64 offset = 0; offset < size; offset += PAGE) {
        s64 status = map_page((u64)module_area + offset, physical(module_area) + offset, flags);
        if (status < 0)
            return status;
    }
    return 0;
}

static s64 validate(u64 file, u64 file_size, u64 text_size) {
    static struct heki_page table __attribute__((aligned(PAGE)));
    u64 text = physical(module_area);
    table.nranges = 2;
    table.ranges[0] = (struct heki_range){(u64)direct(file), file, file + file_size, MODULE_ELF};
    table.ranges[1] = (struct heki_range){(u64)module_area, text, text + text_size, MODULE_TEXT};
    return vtl_call(SERVICE_VALIDATE_MODULE, physical(&table), table.nranges, 0);
}

static s64 unload(void) {
    s64 status = map_area((u64)(module_area_end - module_area), 0);
    if (status == 0 && token)
        status = vtl_call(SERVICE_UNLOAD_MODULE, (u64)token, 0, 0);
    token = 0;
    return status;
}

/* The one loadable segment, or NULL if the file is not a module that fits. */
static const struct program_header *segment_of(u64 file, u64 file_size) {
    const struct elf_header *elf = direct(file);
    if (file_size < sizeof *elf || !same(elf->identification, "\x7f" "ELF\2\1", 6))
        return NULL;
    if (elf->program_headers > file_size || elf->program_header_count == 0 ||
        file_size - elf->program_headers < sizeof(struct program_header))
        return NULL;
    const struct program_header *segment = direct(file + elf->program_headers);
    u64 size = segment->memory_size;
    bool fits = size != 0 && size <= (u64)(module_area_end - module_area) && segment->file_size <= size &&
                segment->offset <= file_size && file_size - segment->offset >= segment->file_size &&
                elf->entry - segment->virtual_address < size;
    return fits ? segment : NULL;
}

static s64 load(u64 file, u64 file_size) {
    const struct elf_header *elf = direct(file);
    const struct program_header *segment = segment_of(file, file_size);
    if (!segment)
        return -ENOEXEC;
    s64 status = unload();
    if (status < 0)
        return status;
    u8 *area = direct(physical(module_area));
    memset(area, 0xCC, (u64)(module_area_end - module_area));
    memcpy(area, direct(file + segment->offset), segment->file_size);
    if (guarded) {
        token = validate(file, file_size, segment->memory_size);
        if (token < 0) {
            status = token;
            token = 0;
            return status;
        }
    }
    status = map_area(segment->memory_size, PTE_PRESENT | PTE_GLOBAL);
    if (status < 0)
        return status;
    u64 entry = (u64)module_area + (elf->entry - segment->virtual_address);
    return ((s64(*)(u64))entry)(ticks);
}

bool find_module(const char *name, u64 *start, u64 *size) {
    for (u64 i = 0; i < module_count; i++)
        if (same(modules[i].name, name, length(name) + 1)) {
            *start = modules[i].start;
            *size = modules[i].size;
            return true;
        }
    return false;
}

/* What the next kernel finds as its modules. */
u64 list_modules(struct kexec_module *to) {
    for (u64 i = 0; i < module_count; i++) {
        to[i].start = modules[i].start;
        to[i].end = modules[i].start + modules[i].size;
        memcpy(to[i].command_line, modules[i].name, sizeof to[i].command_line);
    }
    return module_count;
}

s64 load_module(const char *name) {
    u64 start, size;
    return find_module(name, &start, &size) ? load(start, size) : -ENOENT;
}
