/* The vulnerable driver: reads, writes, copies and calls what its caller asks for, at CPL0, without a check. This is what a signed
 * but broken driver gives an attacker ("bring your own vulnerable driver"). A fault on the way ends the request only,
 * on whatever processor it is done. */
#include "kernel.h"

u64 driver_invoke(u64 address, u64 *arguments);
u64 driver_checksum(u64 value);

/* Mapped writable and executable at DRIVER_WINDOW, for code that the driver generates. */
u8 driver_scratch[PAGE] __attribute__((aligned(PAGE)));
/* Nobody's data: a place for attacks to leave their mark, and to build in. */
u8 driver_mailbox[16 * PAGE] __attribute__((aligned(PAGE)));

const char driver_banner[] = "vulnerable driver 1.0";

void driver_init(void) { log("selfguard: %s, checksum %x\n", driver_banner, driver_checksum(physical(driver_scratch))); }

static void perform(void *argument) {
    struct driver_request *request = argument;
    void *address = (void *)request->address;
    switch (request->operation) {
    case DRIVER_READ:
        request->result = 0;
        memcpy(&request->result, address, request->size);
        break;
    case DRIVER_WRITE:
        memcpy(address, &request->value, request->size);
        break;
    case DRIVER_COPY:
        memcpy(address, (void *)request->value, request->size);
        break;
    case DRIVER_CALL:
        request->result = driver_invoke(request->address, request->arguments);
        break;
    }
}

static void perform_guarded(void *argument) {
    struct driver_request *request = argument;
    request->faulted = guarded_call(perform, request);
}

s64 driver_request(struct driver_request *request) {
    if (request->operation > DRIVER_CALL || (request->operation <= DRIVER_WRITE && request->size > 8))
        return -EINVAL;
    s64 status = run_on(request->cpu, perform_guarded, request);
    return status == 0 && request->faulted ? -EFAULTED : status;
}
