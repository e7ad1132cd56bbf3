/* Hibernation (ACPI S4): memory is copied while nothing else runs, the copy goes to the disk, and the machine off. When it starts again
 * the kernel finds it there, before anything else holds it to anything. Guarded, VTL1 seals the copy and puts it back; unguarded, this
 * kernel copies it over itself. protos/vtlab/services.py, HIBERNATION_HEADER, has the layout. */
#include "hibernate.h"
#include "kernel.h"
#include "services.h"
#include "sleep.h"
#include "smp.h"

struct image {
    u8 magic[16];
    u64 count, state_size, rip, rsp;
    u64 cr3; /* for the kernel's own way back */
};
_Static_assert(sizeof(struct image) <= PAGE, "one page");

/* What the restoring code goes back to. It is part of what is kept, in ordinary memory. */
struct hibernated {
    u64 cr0, cr3, cr4, rsp;
} hibernated;
_Static_assert(__builtin_offsetof(struct hibernated, rsp) == HIBERNATED_RSP, "hibernate.h");

extern const u8 restore_code[], restore_code_end[];
s64 freeze(void);
void thaw(void);

static const u8 magic[16] = "vtlab memory 1\0";
static u64 ram;

void hibernate_init(u64 ram_size) { ram = ram_size; }

static struct image *image(void) { return direct(ram / 2 & ~(u64)(PAGE - 1)); }
static u64 index_pages(u64 count) { return (count * 8 + PAGE - 1) / PAGE; }
static u8 *page_of(u64 number) { return (u8 *)image() + number * PAGE; }

static bool transfer(u32 command, u64 first, u64 pages) {
    for (u64 done = 0; done < pages;) {
        u64 count = pages - done < DISK_MAX_PAGES ? pages - done : DISK_MAX_PAGES;
        outl(DISK_FIRST, (u32)(first + done));
        outl(DISK_COUNT, (u32)count);
        outl(DISK_PAGE, (u32)((u64)page_of(done) - DIRECT_MAP) / PAGE);
        outl(DISK_COMMAND, command);
        if (inl(DISK_COMMAND))
            return false;
        done += count;
    }
    return true;
}

static u64 capacity(void) {
    u32 pages = inl(DISK_CAPACITY);
    return pages == 0xFFFFFFFF ? 0 : pages;
}

/* Numbers of the pages that are in use, in order, and that VTL1 lets this kernel read. What is seen of the hypercall page is no memory. */
static u64 list_pages(u64 *to) {
    static struct kexec_module modules[64];
    u64 count = 0, own = physical(kernel_end) / PAGE;
    to[count++] = WAKE_PAGE / PAGE;
    to[count++] = TRAMPOLINE / PAGE;
    for (u64 page = 0x100000 / PAGE; page < own; page++) {
        const u8 *address = (const u8 *)(KERNEL_VMA + page * PAGE);
        if (address == hypercall_page)
            continue;
        if (guarded && ((address >= vtl1_memory && address < vtl1_memory_end) ||
                        (address >= privileged_start && address < privileged_end)))
            continue;
        to[count++] = page;
    }
    u64 last = own;
    for (u64 i = 0, n = list_modules(modules); i < n; i++)
        for (u64 page = modules[i].start / PAGE; page < (modules[i].end + PAGE - 1) / PAGE; page++)
            if (page >= last)
                to[count++] = page, last = page + 1;
    return count;
}

/* From freeze.S, with interrupts off: what the kernel does from here on is not in the copy. */
s64 copy_memory(void) {
    struct image *header = image();
    u64 *numbers = (u64 *)page_of(1);
    memset(header, 0, PAGE);
    memcpy(header->magic, magic, sizeof magic);
    header->rip = (u64)thaw;
    header->rsp = hibernated.rsp;
    header->cr3 = hibernated.cr3;
    header->count = list_pages(numbers);
    u8 *to = page_of(1 + index_pages(header->count));
    for (u64 i = 0; i < header->count; i++)
        memcpy(to + i * PAGE, direct(numbers[i] * PAGE), PAGE);
    u64 pages = 1 + index_pages(header->count) + header->count + STATE_ROOM;
    if (pages > capacity())
        return -ENOMEM;
    if (guarded) {
        s64 size = vtl_call(SERVICE_HIBERNATE, (u64)header - DIRECT_MAP, pages, 0);
        if (size < 0)
            return size;
    }
    return (s64)pages;
}

static void mark_used(void) {
    memset(image(), 0, PAGE);
    transfer(DISK_WRITE, 0, 1);
}

s64 hibernate(void) {
    if (!capacity())
        return -ENOSYS;
    log("selfguard: hibernating\n");
    hibernated = (struct hibernated){read_cr0(), read_cr3(), read_cr4(), 0};
    u64 others = others_offline();
    s64 pages = freeze();
    if (pages == 0) {
        interrupts_init();
        console_init();
        if (!guarded) /* else the kernel that had VTL1 restore this one has laid it where it was */
            hypercall_page_init();
        log("selfguard: awake, from the image\n");
    } else if (pages > 0 && transfer(DISK_WRITE, 0, (u64)pages)) {
        outw(PM1A_CONTROL, SLEEP_TO_DISK | SLEEP_ENABLE);
        log("selfguard: the machine does not go off\n");
        pages = -EIO;
    } else if (pages > 0) {
        pages = -EIO;
    }
    if (pages < 0 && guarded)
        vtl_call(SERVICE_HIBERNATE, 0, 0, 0);
    others_online(others);
    return pages;
}

/* Before this kernel asks for protection. Comes back if there is nothing to restore. `by_vtl1`: it was enabled, and has no policy. */
void hibernate_resume(bool by_vtl1) {
    struct image *header = image();
    u64 room = (ram - ((u64)header - DIRECT_MAP)) / PAGE;
    if (capacity() == 0 || !transfer(DISK_READ, 0, 1) || !same(header->magic, magic, sizeof magic))
        return;
    struct image kept = *header;
    u64 count = kept.count;
    u64 pages = 1 + index_pages(count) + count + STATE_ROOM;
    mark_used();
    if (count == 0 || count >= room || pages > room || pages > capacity() || !transfer(DISK_READ, 0, pages)) {
        log("selfguard: no image to go on with\n");
        return;
    }
    log("selfguard: image of %u pages\n", count);
    u64 others = others_offline();
    if (by_vtl1) {
        *header = kept;
        log("selfguard: VTL1 does not restore it: %x\n", (u64)vtl_call(SERVICE_RESTORE, (u64)header - DIRECT_MAP, pages, 0));
        others_online(others);
        return;
    }
    u64 *tables = direct(RELOCATE_TABLES), first = (u64)header - DIRECT_MAP;
    memcpy(direct(RELOCATE_CODE), restore_code, (u64)(restore_code_end - restore_code));
    map_one_to_one(tables);
    write_cr3(RELOCATE_TABLES);
    ((void (*)(u64, u64, u64, u64))RELOCATE_CODE)(first + PAGE, count, first + PAGE + index_pages(count) * PAGE, kept.cr3);
}
