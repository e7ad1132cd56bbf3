/* How the kernel asks for protection: protect=NAME on the command line, one way a design (docs/designs.md). */
#include "kernel.h"

static void unprotected(void) { vtl_init(false); }
static void by_vtl1(void) { vtl_init(true); }

static void by_itself(void) {
    unprotected();
    native_pinning_init();
}

static const struct {
    const char *word;
    void (*ask)(void);
} ways[] = {
    {"protect=vtl", by_vtl1},
    {"heki=1", by_vtl1},
    {"protect=none", by_itself},
    {"protect=heki-v3", heki_v3},
    {"protect=heki-v2", heki_v2},
    {"protect=mmio", guard_device_init},
    {"protect=cr-filter", unprotected}, /* the machine's owner filters, without being asked */
};

static void (*chosen)(void) = unprotected;

/* While the loader's command line is mapped. */
void protection_choose(const char *command_line) {
    for (u64 i = 0; i < sizeof ways / sizeof ways[0]; i++)
        if (option(command_line, ways[i].word))
            chosen = ways[i].ask;
}

void protect(void) {
    if (chosen != by_vtl1) /* which asks VTL1 */
        hibernate_resume(false);
    chosen();
}
