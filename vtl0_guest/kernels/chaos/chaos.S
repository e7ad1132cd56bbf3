# A guest whose work can be checked from outside, on one to sixteen vCPUs. 64-bit, identity-mapped, flat at LOAD.
#
# Every vCPU counts, chains a hash over its count, does things that exit once each and must take effect once each, and
# attempts one forbidden operation of each protected kind. What it saw lies in its status page (vmm/chaos/guest.py).

.intel_syntax noprefix
.code64
.text

.set LOAD,       0x100000
.set STATUS,     0x200000       # one page for each vCPU
.set ARRIVED,    0x210000       # dword: vCPUs that run
.set GO,         0x210008       # dword: the host has guarded the machine
.set AP_CR3,     0x210010
.set STACKS,     0x220000       # one page for each vCPU
.set INPUT,      0x230000       # of hypercalls, one page for each vCPU
.set SEALED,     0x300000       # r--
.set PRIVATE,    0x301000       # VTL1's
.set CODE,       0x302000       # rw-: never to be executed
.set TRAMPOLINE, 0x8000
.set APIC,       0xFEE00000

# Fields of the status page.
.set COUNT,      0              # rounds done
.set HASH,       8
.set FAULTS,     16             # exceptions taken
.set WINDOWS,    24             # forbidden operations that succeeded
.set KINDS,      32             # set of the kinds that did
.set DOUBLED,    40             # exits that took effect not once
.set LOGGED,     48             # lines written
.set ATTEMPTS,   56             # rounds of all forbidden operations

.set MULTIPLIER, 0x5851F42D4C957F2D
.set LSTAR,      0xC0000082
.set SMEP_BIT,   20
.set TSD,        4
.set EXPECTED,   r13            # CR4 as it must be
.set RESUME,     r15            # where the handler of an exception goes on

.global _start
_start:
    jmp 1f
.balign 8
processors:                     # how many vCPUs there are: whoever loads the image writes it here
    .long 1
1:  mov ebx, offset STATUS
    mov esp, offset STACKS + 0x1000
    xor r12d, r12d
    lgdt [rip + gdt_register]
    push 8
    lea rax, [rip + 1f]
    push rax
    retfq
1:  mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov rax, cr3
    mov [AP_CR3], rax
    # The page that is never to be executed holds code that would tell of it, the sealed one a pattern.
    lea rsi, [rip + forbidden]
    mov edi, offset CODE
    mov ecx, offset forbidden_end - forbidden
    rep movsb
    mov edi, offset SEALED
    mov ecx, 512
    mov rax, 0x1111111111111111
    rep stosq
    mov edi, offset PRIVATE
    mov ecx, 512
    mov rax, 0x5EC4E75EC4E75EC4
    rep stosq
    # The others start at the trampoline.
    lea rsi, [rip + trampoline]
    mov edi, offset TRAMPOLINE
    mov ecx, offset trampoline_end - trampoline
    rep movsb
    mov edi, offset APIC
    mov dword ptr [rdi + 0xF0], 0x1FF
    mov dword ptr [rdi + 0x300], 0xC4500
    mov dword ptr [rdi + 0x300], 0xC4600 + (TRAMPOLINE >> 12)
    mov dword ptr [rdi + 0x300], 0xC4600 + (TRAMPOLINE >> 12)
    call prepare
0:  pause
    mov eax, [ARRIVED]
    cmp eax, dword ptr [rip + processors]
    jne 0b
    lea rsi, [rip + ready]
    mov dx, 0x3F8
    call print
    jmp wait

ap_start:
    mov eax, 1
    cpuid
    shr ebx, 24
    mov r12d, ebx
    mov eax, ebx
    shl eax, 12
    lea ebx, [rax + STATUS]
    lea esp, [rax + STACKS + 0x1000]
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    lgdt [rip + gdt_register]
    call prepare
wait:
    pause
    cmp dword ptr [GO], 0
    je wait

    mov EXPECTED, cr4
round:
    # The hash is stored first: seen from outside it is that of the count, or of the next one.
    mov rax, [rbx + HASH]
    mov rcx, MULTIPLIER
    imul rax, rcx
    mov rcx, [rbx + COUNT]
    inc rcx
    add rax, rcx
    mov [rbx + HASH], rax
    mov [rbx + COUNT], rcx

    # A watched bit changes: the write must be committed once.
    xor EXPECTED, TSD
    mov cr4, EXPECTED
    mov rax, cr4
    cmp rax, EXPECTED
    je 1f
    inc qword ptr [rbx + DOUBLED]
    mov EXPECTED, rax
1:
    # Each read of the firmware configuration gives the next byte.
    test r12d, r12d
    jnz 1f
    mov dx, 0x510
    xor eax, eax
    out dx, ax
    mov dx, 0x511
    in al, dx
    ror eax, 8
    in al, dx
    ror eax, 8
    in al, dx
    ror eax, 8
    in al, dx
    ror eax, 8
    cmp eax, 0x554D4551         # "QEMU"
    je 1f
    inc qword ptr [rbx + DOUBLED]
1:
    cmp r12d, 2
    jae 1f
    test byte ptr [rbx + COUNT], 7
    jnz 1f
    call log
1:
    call attempts
    jmp round

# -------------------------------------------------------------------------------------------- forbidden operations
# Each must fault, or be without effect.

.macro attempt
    lea RESUME, [rip + 9f]
.endm
.macro succeeded kind
    inc qword ptr [rbx + WINDOWS]
    or qword ptr [rbx + KINDS], 1 << \kind
.endm

attempts:
    # 0: a sealed page
    attempt
    mov rax, [rbx + COUNT]
    mov [SEALED + r12 * 8], rax
    cmp [SEALED + r12 * 8], rax
    jne 9f
    succeeded 0
9:  # 1: VTL1's memory
    attempt
    mov rax, [PRIVATE]
    succeeded 1
9:  # 2: data as code
    attempt
    mov [rbx + 64], rsp
    mov eax, offset CODE
    call rax
9:  mov rsp, [rbx + 64]
    # 3: CR4.SMEP
    attempt
    mov rax, EXPECTED
    btr rax, SMEP_BIT
    mov cr4, rax
9:  mov rax, cr4
    bt rax, SMEP_BIT
    jc 8f
    succeeded 3
8:  # 4: CR0.WP
    attempt
    mov rax, cr0
    btr rax, 16
    mov cr0, rax
9:  mov rax, cr0
    bt rax, 16
    jc 8f
    succeeded 4
8:  # 5: an MSR
    attempt
    mov ecx, LSTAR
    mov eax, 0xBAD
    xor edx, edx
    wrmsr
9:  mov ecx, LSTAR
    rdmsr
    cmp eax, 0xBAD
    jne 8f
    succeeded 5
8:  # 6: the descriptor table of interrupts
    attempt
    lidt [rip + other_idt]
9:  sidt [rbx + 80]
    lea rax, [rip + gdt]
    cmp [rbx + 82], rax
    jne 8f
    succeeded 6
8:  # 7: a page table
    attempt
    mov rdx, cr3
    mov rax, [rdx + 8]
    xor rax, 1 << 9
    mov [rdx + 8], rax
    cmp [rdx + 8], rax
    jne 9f
    succeeded 7
9:  # 8: VTL0 gives itself rights
    attempt
    mov eax, r12d
    shl eax, 12
    lea rdx, [rax + INPUT]
    mov qword ptr [rdx], -1
    mov dword ptr [rdx + 8], 0xF
    mov dword ptr [rdx + 12], 0
    mov qword ptr [rdx + 16], SEALED >> 12
    movabs rcx, 0x10000000C
    xor r8d, r8d
    vmmcall
    test ax, ax
    jnz 9f
    succeeded 8
9:  inc qword ptr [rbx + ATTEMPTS]
    ret

forbidden:
    succeeded 2
    ret
forbidden_end:

# ------------------------------------------------------------------------------------------------------- the log

# "N", the number of the line in 8 hexadecimal digits, end of line. vCPU 0 on COM1, vCPU 1 on COM2.
log:
    mov dx, 0x3F8
    test r12d, r12d
    jz 1f
    mov dx, 0x2F8
1:  mov al, 'N'
    call put
    mov rdi, [rbx + LOGGED]
    mov ecx, 8
2:  rol edi, 4
    mov eax, edi
    and eax, 15
    cmp al, 10
    jb 3f
    add al, 'a' - '0' - 10
3:  add al, '0'
    call put
    dec ecx
    jnz 2b
    mov al, 10
    call put
    inc qword ptr [rbx + LOGGED]
    ret

print:
    lodsb
    test al, al
    jz 1f
    call put
    jmp print
1:  ret

# AL to the port at DX, when that takes it.
put:
    push rax
    add dx, 5
1:  in al, dx
    test al, 0x20
    jz 1b
    sub dx, 5
    pop rax
    out dx, al
    ret

# ---------------------------------------------------------------------------------------------------- exceptions

# IDT of this vCPU, SMEP, and the word that it runs.
prepare:
    lidt [rip + idt_register]
    mov rax, cr4
    bts rax, SMEP_BIT
    mov cr4, rax
    lock inc dword ptr [ARRIVED]
    ret

with_error:
    add rsp, 8
without_error:
    inc qword ptr [rbx + FAULTS]
    mov [rsp], RESUME
    iretq

.balign 8
gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
gdt_register:
    .word gdt_register - gdt - 1
    .quad gdt

.macro gate handler
    .word \handler - _start + (LOAD & 0xFFFF), 8, 0x8E00, LOAD >> 16
    .quad 0
.endm
.balign 16
idt:
    .rept 6
    gate without_error
    .endr
    gate without_error          # #UD
    gate without_error
    gate with_error
    gate without_error
    .rept 5
    gate with_error             # up to #PF
    .endr
idt_register:
    .word idt_register - idt - 1
    .quad idt
other_idt:
    .word 0xFFF
    .quad gdt

ready:
    .asciz "chaos: ready\n"

# ------------------------------------------------------------------------------------- from real mode to long mode

.code16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    lgdtd [cs:(trampoline_gdt_register - trampoline)]
    mov eax, 0x20               # PAE
    mov cr4, eax
    mov eax, 1
    mov cr0, eax
    .byte 0x66, 0xEA
    .long TRAMPOLINE + (trampoline_32 - trampoline)
    .word 24
.code32
trampoline_32:
    mov ax, 16
    mov ds, ax
    mov eax, [AP_CR3]
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x900               # LME, NXE
    wrmsr
    mov eax, 0x80010011         # PG, WP, ET, PE
    mov cr0, eax
    .byte 0xEA
    .long TRAMPOLINE + (trampoline_64 - trampoline)
    .word 8
.code64
trampoline_64:
    mov eax, offset ap_start
    jmp rax
.balign 8
trampoline_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF
trampoline_gdt_register:
    .word trampoline_gdt_register - trampoline_gdt - 1
    .long TRAMPOLINE + (trampoline_gdt - trampoline)
trampoline_end:
