/* Addresses that assembly, C and attack scripts share. */
#pragma once

#define KERNEL_VMA 0xFFFFFFFF80000000
#define DIRECT_MAP 0xFFFF888000000000   /* all RAM, writable, no execute */
#define SPARE_WINDOW (KERNEL_VMA + 0x10000) /* 16 pages without a mapping */
#define DRIVER_WINDOW (KERNEL_VMA + 0x20000) /* what the vulnerable driver maps for itself */
#define APIC_WINDOW (KERNEL_VMA + 0x1E000) /* of SPARE_WINDOW's: the processor's local APIC */
#define DEVICE_WINDOW (KERNEL_VMA + 0x1F000) /* the last of them: the guard device, if the kernel uses it */
#define USER_DEVICE_WINDOW 0x5FF000 /* the same for the user program */
#define DEVICE_TAIL 0x28
#define PAGE 4096

/* Low memory, while one kernel makes way for another (kexec.c, relocate.S), or for itself (hibernate.c). */
#define RELOCATE_CODE 0x7000
#define RELOCATE_LIST 0x8000
#define RELOCATE_INFO 0x9000 /* two pages */
#define RELOCATE_TABLES 0x11000 /* three pages */

#define SELECTOR_KERNEL_CODE 0x08
#define SELECTOR_KERNEL_DATA 0x10
#define SELECTOR_USER_BASE 0x18 /* SYSRET: SS = base + 8, CS = base + 16 */
#define SELECTOR_USER_DATA 0x20
#define SELECTOR_USER_CODE 0x28
#define SELECTOR_TSS 0x30 /* of processor 0; the next one's is 16 further */

#define VECTORS 49
#define VECTOR_WAKE 48 /* from processor 0 to another one */
#define SYSCALL_MASK 0x47700 /* AC, NT, IOPL, DF, IF, TF */

#define SYS_READ_LINE 0  /* (buffer, size): waits in HLT for a line from COM2; its length */
#define SYS_WRITE_LINE 1 /* (buffer, size): to COM2 */
#define SYS_TICKS 2      /* (): timer interrupts so far */
#define SYS_DRIVER 3     /* (struct driver_request *): the vulnerable driver */
#define SYS_RECOVERY 4   /* (rip, rsp): where a fault of user code goes */
#define SYS_LAST_FAULT 5 /* (struct fault *) */
#define SYS_MODULE 6     /* (name, length): loads and runs a multiboot module */
#define SYS_PATCH 7      /* (address, bytes, size): kernel text, by the kernel's own rules */
#define SYS_CONTROL 8    /* (0 or 4, value): CR0 or CR4 */
#define SYS_MAP 9        /* (address, physical, flags): one page, by the kernel's own rules */
#define SYS_VTL_CALL 10  /* (service, a, b, c) */
#define SYS_HYPERCALL 11 /* (control, rdx, r8) */
#define SYS_RESET 12      /* (name, length): does not come back */
#define SYS_SMI 13        /* (command, value, address): to the SMI handler */
#define SYS_SLEEP 14      /* (state 0, 3 or 4, ticks): suspends the machine; returns when it is awake */
#define SYS_KEXEC 15      /* (operation, name, length): comes back where it is refused */
#define SYS_CPU 16        /* (number, 0 or 1): takes a processor offline, or online */
#define SYS_NMI 17        /* (count): changes CR4 until so many NMIs have come */
#define SYS_COUNT 18

#define EPERM 1
#define ENOENT 2
#define EIO 5
#define ENOEXEC 8
#define ENOMEM 12
#define EFAULT 14
#define EBUSY 16
#define EINVAL 22
#define ENOSYS 38
#define EFAULTED 512 /* no errno: the operation took a fault, which SYS_LAST_FAULT tells */
