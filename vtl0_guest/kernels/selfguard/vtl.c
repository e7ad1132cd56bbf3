/* The deprivileging sequence: this kernel, at VTL0, brings VTL1 to life, hands it the policy, and gives up what it no longer needs.
 * Nobody outside chose the policy; it is a section of this image. Any step that fails stops the kernel: better no guest than one
 * that believes it is guarded. */
#include "kernel.h"
#include "services.h"

#define MSR_GUEST_OS_ID 0x40000000
#define MSR_HYPERCALL 0x40000001
#define GUEST_OS_ID 0x8F00000000000000 /* open source, an identifier nobody owns */
#define HVCALL_ENABLE_PARTITION_VTL 0x0D
#define HVCALL_ENABLE_VP_VTL 0x0F
#define HVCALL_GET_VP_REGISTERS 0x50
#define REGISTER_VSM_CODE_PAGE_OFFSETS 0x000D0002
#define PARTITION_SELF 0xFFFFFFFFFFFFFFFFull
#define VP_SELF 0xFFFFFFFEu

struct segment {
    u64 base;
    u32 limit;
    u16 selector, attributes;
};
struct table {
    u16 padding[3], limit;
    u64 base;
};
struct vp_context {
    u64 rip, rsp, rflags;
    struct segment cs, ds, es, fs, gs, ss, tr, ldtr;
    struct table idtr, gdtr;
    u64 efer, cr0, cr3, cr4, pat;
};
_Static_assert(sizeof(struct vp_context) == 224, "initial VP context, TLFS");

struct enable_vp_vtl {
    u64 partition;
    u32 vp;
    u8 vtl, reserved[3];
    struct vp_context context;
};
struct enable_partition_vtl {
    u64 partition;
    u8 vtl, flags, reserved[6];
};
struct get_vp_registers {
    u64 partition;
    u32 vp;
    u8 vtl, reserved[3];
    u32 name;
};

extern u64 vtl_call_offset;
/* Stands for what a kernel would give VTL1 to keep: once VTL1 owns the page, only VTL1 has it. */
static const char secret[] = "a secret that VTL0 gives to VTL1";
bool guarded;
static u8 input[PAGE] __attribute__((aligned(PAGE)));
static u64 output[2] __attribute__((aligned(16)));

static void require(bool held, const char *step, s64 result) {
    if (held)
        return;
    log("selfguard: deprivileging failed: %s: %x\n", step, (u64)result);
    stop();
}

static void call(u64 control, const char *step) {
    u64 result = hypercall(control, physical(input), physical(output));
    require((result & 0xFFFF) == 0, step, (s64)result);
}

static void serve(u64 service, u64 a, u64 b, const char *step) {
    s64 result = vtl_call(service, a, b, 0);
    require(result >= 0, step, result);
    log("selfguard: VTL1: %s\n", step);
}

bool hypercall_page_init(void) {
    struct cpuid vendor = cpuid(0x40000000, 0);
    if (vendor.a < 0x40000005 || vendor.b != 0x7263694D || vendor.c != 0x666F736F || vendor.d != 0x76482074) /* "Microsoft Hv" */
        return false;
    wrmsr(MSR_GUEST_OS_ID, GUEST_OS_ID);
    wrmsr(MSR_HYPERCALL, physical(hypercall_page) | 1);
    return rdmsr(MSR_HYPERCALL) & 1;
}

/* What a VTL1 that is guest code would start with. A VTL1 whose code comes with the host takes nothing from it. */
static struct vp_context initial_context(void) {
    struct segment code = {0, 0xFFFFFFFF, SELECTOR_KERNEL_CODE, 0xA09B}, data = {0, 0xFFFFFFFF, SELECTOR_KERNEL_DATA, 0xC093};
    return (struct vp_context){
        .rip = (u64)vtl1_memory,
        .rsp = (u64)vtl1_memory_end,
        .rflags = 2,
        .cs = code,
        .ds = data,
        .es = data,
        .fs = data,
        .gs = data,
        .ss = data,
        .tr = {0, 0xFFFF, 0, 0x8B},
        .efer = rdmsr(MSR_EFER),
        .cr0 = read_cr0(),
        .cr3 = read_cr3(),
        .cr4 = read_cr4(),
        .pat = 0x0007040600070406,
    };
}

static void load_kdata(void) {
    static struct heki_page table __attribute__((aligned(PAGE)));
    table.nranges = 2;
    table.ranges[0] = (struct heki_range){(u64)certificate_start, physical(certificate_start), physical(certificate_end),
                                          KDATA_SYSTEM_CERTIFICATES};
    table.ranges[1] = (struct heki_range){(u64)patches_start, physical(patches_start), physical(patches_end), KDATA_PATCHES};
    serve(SERVICE_LOAD_KDATA, physical(&table), table.nranges, "certificate and patch list loaded");
}

static void enable_vtl1(void) {
    *(struct enable_partition_vtl *)input = (struct enable_partition_vtl){.partition = PARTITION_SELF, .vtl = 1, .flags = 1 /* MBEC */};
    call(HVCALL_ENABLE_PARTITION_VTL, "HvCallEnablePartitionVtl");
    *(struct enable_vp_vtl *)input =
        (struct enable_vp_vtl){.partition = PARTITION_SELF, .vp = VP_SELF, .vtl = 1, .context = initial_context()};
    call(HVCALL_ENABLE_VP_VTL, "HvCallEnableVpVtl");
    *(struct get_vp_registers *)input =
        (struct get_vp_registers){.partition = PARTITION_SELF, .vp = VP_SELF, .name = REGISTER_VSM_CODE_PAGE_OFFSETS};
    call(HVCALL_GET_VP_REGISTERS | 1ull << 32, "HvCallGetVpRegisters");
    vtl_call_offset = output[0] & 0xFFF;
    log("selfguard: VTL1 enabled, VTL call at %x\n", vtl_call_offset);
}

void vtl_init(bool heki) {
    memcpy(vtl1_memory, secret, sizeof secret);
    bool hypercalls = hypercall_page_init();
    if (!heki)
        return;
    require(hypercalls, "hypercall page", 0);
    enable_vtl1();
    hibernate_resume(true);
    serve(SERVICE_TAKE_POLICY, physical(policy_start), (u64)(policy_end - policy_start), "policy taken");
    load_kdata();
    serve(SERVICE_LOCK_REGS, 0, 0, "registers locked");
    serve(SERVICE_SIGNAL_END_OF_BOOT, 0, 0, "boot ended");
    guarded = true;
}
