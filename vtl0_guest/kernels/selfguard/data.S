/* Regions and files of the image that have no code of their own. */
#include "layout.h"

    .section .vtlab.policy, "a"
    .incbin "policy.yaml"

    .section .vtlab.certificate, "a"
    .globl certificate_start, certificate_end
certificate_start:
    .incbin "module/certificate.der"
    .balign 4096 /* room for certificates of whoever ships the image */
certificate_end:

/* The page that the hypervisor lays its hypercall page over. Below it stay these bytes. */
    .section .text.hypercall_page, "ax"
    .align 4096
    .globl hypercall_page
hypercall_page:
    .fill 4096, 1, 0xCC

    .section .vtl1_memory, "aw", @nobits
    .align 4096
    .globl vtl1_memory, vtl1_memory_end
vtl1_memory: .skip 16 * 4096
vtl1_memory_end:

    .section .module_area, "aw", @nobits
    .align 4096
    .globl module_area, module_area_end
module_area: .skip 4 * 4096
module_area_end:
