/* The guard device of design mmio-device: found by CPUID, mapped, given a ring, and asked for protection. From the lock on only the
 * doorbell of this file (in .privileged) may ask for what lifts protection; user code may ask for pins, which lift nothing. */
#include "kernel.h"

#define LEAF 0x40000010
#define MAGIC 0x47534D4D
#define ENTRIES 64

enum { PIN = 1, PIN_MSR, PROTECT, WRITE_REGISTER, STAND_DOWN, DELEGATE, RESTRICT, LOCK };
#define RIGHT_READ 1
#define RIGHT_EXECUTE 4

struct request {
    u32 action, reserved;
    u64 arguments[4];
    u32 status, reserved2;
    u64 result, reserved3;
};
_Static_assert(sizeof(struct request) == 64, "descriptor of the guard device");

struct device {
    u32 magic, version;
    u64 actions, ring;
    u32 entries, reserved, head, reserved2, tail, reserved3, status, reserved4, control;
};

extern u64 user_pt[512];
struct request guard_ring[ENTRIES] __attribute__((aligned(PAGE)));
u32 guard_tail;

static u32 request(u32 action, u64 a, u64 b, u64 c, u64 d) {
    struct request *slot = &guard_ring[guard_tail % ENTRIES];
    *slot = (struct request){.action = action, .arguments = {a, b, c, d}};
    guard_doorbell(++guard_tail);
    return slot->status;
}

static void require(const char *what, u32 status) {
    if (status == 1)
        return;
    log("selfguard: guard device: %s: status %u\n", what, (u64)status);
    stop();
}

void guard_device_init(void) {
    vtl_init(false);
    volatile struct device *device = (void *)DEVICE_WINDOW;
    struct cpuid leaf = cpuid(LEAF, 0);
    u64 base = (u64)leaf.b << 32 | leaf.a;
    if (!base || map_page(DEVICE_WINDOW, base, PTE_PRESENT | PTE_WRITABLE | PTE_NX) || device->magic != MAGIC || device->version < 1) {
        log("selfguard: guard device: none\n");
        stop();
    }
    user_pt[USER_DEVICE_WINDOW >> 12 & 511] = base | PTE_PRESENT | PTE_WRITABLE | PTE_USER | PTE_NX | PTE_ACCESSED | PTE_DIRTY;
    device->ring = physical(guard_ring);
    device->entries = ENTRIES;
    device->control = 1;
    if (!(device->status & 1)) {
        log("selfguard: guard device: ring refused: %x\n", (u64)device->status);
        stop();
    }
    require("CR0", request(PIN, 0, CR0_WP, 0, 0));
    require("CR4", request(PIN, 4, CR4_SMEP | CR4_SMAP | CR4_UMIP, 0, 0));
    for (u32 index = MSR_EFER; index <= MSR_SFMASK; index++)
        require("MSR", request(PIN_MSR, index, 0, 0, 0));
    require("text", request(PROTECT, physical(text_start), (u64)(privileged_end - text_start), RIGHT_READ | RIGHT_EXECUTE, 0));
    require("rodata", request(PROTECT, physical(rodata_start), (u64)(rodata_end - rodata_start), RIGHT_READ, 0));
    for (u32 action = PROTECT; action <= STAND_DOWN; action++) {
        require("restriction", request(RESTRICT, action, 0, (u64)privileged_start - 1, 0));
        require("restriction", request(RESTRICT, action, (u64)privileged_end, ~0ull, 0));
    }
    require("delegation", request(DELEGATE, PIN, (u64)user_text_start, (u64)user_text_end - 1, 3));
    require("lock", request(LOCK, 0, 0, 0, 0));
    log("selfguard: guard device: version %u, locked\n", (u64)device->version);
}
