/* Changes of kernel text while it runs. Text is read-only to the kernel: unguarded it writes through the direct map, guarded it asks
 * VTL1, which knows the list of changes that may happen (.patches). */
#include "kernel.h"
#include "services.h"

struct heki_patch {
    u64 pa[2];
    u8 size, code[5], padding[2];
};

s64 text_poke(u64 address, const void *bytes, u64 size) {
    static struct heki_patch patch __attribute__((aligned(64)));
    if (address < (u64)text_start || size == 0 || size > sizeof patch.code || address + size > (u64)text_end)
        return -EINVAL;
    if (!guarded) {
        memcpy(direct(physical((void *)address)), bytes, size);
        return 0;
    }
    u64 second_page = (address + size - 1) & ~(u64)(PAGE - 1);
    patch = (struct heki_patch){.pa = {physical((void *)address)}, .size = (u8)size};
    if (second_page != (address & ~(u64)(PAGE - 1)))
        patch.pa[1] = physical((void *)second_page);
    memcpy(patch.code, bytes, size);
    return vtl_call(SERVICE_PATCH_TEXT, physical(&patch), 0, 0);
}
