#include "kernel.h"

void *memcpy(void *to, const void *from, unsigned long size) {
    void *result = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
    return result;
}

void *memset(void *to, int byte, unsigned long size) {
    void *result = to;
    asm volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(byte) : "memory");
    return result;
}

bool same(const void *a, const void *b, u64 size) {
    for (u64 i = 0; i < size; i++)
        if (((const u8 *)a)[i] != ((const u8 *)b)[i])
            return false;
    return true;
}

u64 length(const char *text) {
    u64 n = 0;
    while (text[n])
        n++;
    return n;
}
