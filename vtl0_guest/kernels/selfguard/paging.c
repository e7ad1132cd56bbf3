/* The final page tables: one address space, every mapping either writable or executable.
 *
 * Two mappings are weaker than they should be, for attacks to lean on, as real kernels had them: the direct map leaves kernel
 * text and rodata writable, and the driver's window (driver.c) holds a page that is writable and executable.
 *
 * All present entries have A set, and D where they are writable: when VTL1 guards the tables nobody, the processor included, may
 * need to store to them. */
#include "kernel.h"
#include "services.h"
#include "sleep.h"
#include "smp.h"

#define TABLE __attribute__((section(".page_tables"), aligned(PAGE)))

TABLE u64 kernel_pml4[512];
TABLE u64 kernel_pdpt[512];
TABLE u64 kernel_pd[512];
TABLE u64 kernel_pt[512];
TABLE u64 direct_pdpt[512];
TABLE u64 direct_pd[512];
TABLE u64 user_pdpt[512];
TABLE u64 user_pd[512];
TABLE u64 user_pt[512];
TABLE u64 low_pt[512]; /* the trampoline, where it runs when a processor turns paging on */

#define INDEX(address, level) ((address) >> (12 + 9 * (level)) & 511)
#define BRANCH (PTE_PRESENT | PTE_WRITABLE | PTE_ACCESSED | PTE_DIRTY)
#define READ_ONLY (PTE_PRESENT | PTE_ACCESSED | PTE_NX)
#define READ_WRITE (READ_ONLY | PTE_WRITABLE | PTE_DIRTY)
#define EXECUTE (PTE_PRESENT | PTE_ACCESSED)
#define APIC_BASE 0xFEE00000

static void map_kernel(const u8 *start, const u8 *end, u64 flags) {
    for (u64 address = (u64)start; address < (u64)end; address += PAGE)
        kernel_pt[INDEX(address, 0)] = physical((void *)address) | flags | PTE_GLOBAL;
}

static void map_user(const u8 *start, const u8 *end, u64 page, u64 flags) {
    for (u64 address = (u64)start; address < (u64)end; address += PAGE, page += PAGE)
        user_pt[INDEX(address, 0)] = page | flags | PTE_USER;
}

void paging_init(u64 ram_size) {
    extern u8 driver_scratch[];
    u64 user_text = physical(rodata_end), user_data = user_text + (u64)(user_text_end - user_text_start);

    kernel_pml4[INDEX(KERNEL_VMA, 3)] = physical(kernel_pdpt) | BRANCH;
    kernel_pdpt[INDEX(KERNEL_VMA, 2)] = physical(kernel_pd) | BRANCH;
    kernel_pd[INDEX(KERNEL_VMA, 1)] = physical(kernel_pt) | BRANCH;
    map_kernel(text_start, privileged_end, EXECUTE);
    map_kernel(rodata_start, rodata_end, READ_ONLY);
    map_kernel(data_start, module_area, READ_WRITE);
    map_kernel(module_area_end, kernel_end, READ_WRITE);
    kernel_pt[INDEX(DRIVER_WINDOW, 0)] = physical(driver_scratch) | EXECUTE | PTE_WRITABLE | PTE_DIRTY;
    kernel_pt[INDEX(DRIVER_WINDOW, 0) + 1] = user_text | EXECUTE;
    kernel_pt[INDEX(APIC_WINDOW, 0)] = APIC_BASE | READ_WRITE | PTE_UNCACHED;

    kernel_pt[INDEX(KERNEL_VMA + WAKE_PAGE, 0)] = WAKE_PAGE | EXECUTE; /* where the waking code changes tables */

    kernel_pml4[INDEX(DIRECT_MAP, 3)] = physical(direct_pdpt) | BRANCH;
    direct_pdpt[INDEX(DIRECT_MAP, 2)] = physical(direct_pd) | BRANCH;
    for (u64 i = 0; i < 512 && i << 21 < ram_size; i++)
        direct_pd[i] = i << 21 | READ_WRITE | PTE_LARGE | PTE_GLOBAL;

    kernel_pml4[0] = physical(user_pdpt) | BRANCH | PTE_USER;
    user_pdpt[0] = physical(user_pd) | BRANCH | PTE_USER;
    user_pd[INDEX((u64)user_text_start, 1)] = physical(user_pt) | BRANCH | PTE_USER;
    user_pd[0] = physical(low_pt) | BRANCH;
    low_pt[INDEX(TRAMPOLINE, 0)] = TRAMPOLINE | EXECUTE;
    map_user(user_text_start, user_text_end, user_text, EXECUTE);
    map_user(user_data_start, user_data_end, user_data, READ_WRITE);

    write_cr3(physical(kernel_pml4));
}

/* Sets the entry of one page of the kernel's 2 MiB: flags as in an entry, 0 to unmap. */
s64 map_page(u64 address, u64 page, u64 flags) {
    if (address < KERNEL_VMA || address >= KERNEL_VMA + 0x200000 || (address | page) & (PAGE - 1))
        return -EINVAL;
    u64 *entry = &kernel_pt[INDEX(address, 0)];
    u64 value = flags & PTE_PRESENT ? page | flags | PTE_ACCESSED | (flags & PTE_WRITABLE ? PTE_DIRTY : 0) : 0;
    if (guarded) {
        s64 status = vtl_call(SERVICE_WRITE_PAGE_TABLE, physical(entry), value, 0);
        if (status < 0)
            return status;
    } else {
        *entry = value;
    }
    invlpg(address);
    return 0;
}
