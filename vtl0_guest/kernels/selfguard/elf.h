/* ELF64 headers, as far as modules and kernels to come need them (System V ABI). */
#pragma once
#include "types.h"

struct elf_header {
    u8 identification[16];
    u16 type, machine;
    u32 version;
    u64 entry, program_headers, section_headers;
    u32 flags;
    u16 header_size, program_header_size, program_header_count;
} __attribute__((packed));

struct program_header {
    u32 type, flags;
    u64 offset, virtual_address, physical_address, file_size, memory_size, alignment;
};
