/* Heki: pins by KVM's hypercall 13, and in version 2 of it rights of pages by hypercall 14. As its authors' kernel does, this one
 * asks when its own mappings are final, and goes on if it is refused. */
#include "kernel.h"

#define KVM_HC_LOCK_CR_UPDATE 13
#define KVM_HC_PROTECT_MEMORY 14
#define KVM_LOCK_CR_UPDATE_VERSION 1

#define HEKI_READ 1
#define HEKI_EXEC 4
#define HEKI_IMMUTABLE 8

struct heki_page_list {
    u64 next, next_pa, npages;
    struct {
        u64 pa, epa, permissions;
    } pages[169];
    u64 padding[2];
};
_Static_assert(sizeof(struct heki_page_list) == PAGE, "one page");

s64 kvm_hypercall(u64 number, u64 a0, u64 a1, u64 a2, u64 a3) {
    s64 result;
    asm volatile("vmmcall" : "=a"(result) : "a"(number), "b"(a0), "c"(a1), "d"(a2), "S"(a3) : "memory");
    return result;
}

static void ask(const char *what, s64 result) {
    if (result < 0)
        log("selfguard: heki: %s: refused, %u\n", what, (u64)-result);
    else
        log("selfguard: heki: %s\n", what);
}

void heki_v3(void) {
    vtl_init(false);
    s64 version = kvm_hypercall(KVM_HC_LOCK_CR_UPDATE, 0, 0, KVM_LOCK_CR_UPDATE_VERSION, 0);
    if (version < 1) {
        log("selfguard: heki: not supported, %u\n", (u64)-version);
        return;
    }
    ask("CR0 locked", kvm_hypercall(KVM_HC_LOCK_CR_UPDATE, 0, CR0_WP, 0, 0));
    u64 pinned = read_cr4() & (CR4_SMEP | CR4_SMAP | CR4_UMIP);
    ask("CR4 locked", kvm_hypercall(KVM_HC_LOCK_CR_UPDATE, 4, pinned, 0, 0));
}

void heki_v2(void) {
    static struct heki_page_list list __attribute__((aligned(PAGE)));
    heki_v3();
    list.npages = 2;
    list.pages[0].pa = physical(text_start);
    list.pages[0].epa = physical(privileged_end);
    list.pages[0].permissions = HEKI_READ | HEKI_EXEC | HEKI_IMMUTABLE;
    list.pages[1].pa = physical(rodata_start);
    list.pages[1].epa = physical(rodata_end);
    list.pages[1].permissions = HEKI_READ | HEKI_IMMUTABLE;
    ask("memory protected", kvm_hypercall(KVM_HC_PROTECT_MEMORY, physical(&list), 0, 0, 0));
}
