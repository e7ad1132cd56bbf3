/* Keeping memory on the disk: what the kernel, its restoring code and attack scripts share. */
#pragma once

#define DISK_CAPACITY 0x9200 /* vmm/devices/disk.py */
#define DISK_FIRST 0x9204
#define DISK_COUNT 0x9208
#define DISK_PAGE 0x920C
#define DISK_COMMAND 0x9210
#define DISK_READ 1
#define DISK_WRITE 2
#define DISK_MAX_PAGES 256

#define SLEEP_TO_DISK (2 << 10)
#define STATE_ROOM 64 /* pages for VTL1's state */

/* struct hibernated (hibernate.c) */
#define HIBERNATED_CR0 0
#define HIBERNATED_CR3 8
#define HIBERNATED_CR4 16
#define HIBERNATED_RSP 24
