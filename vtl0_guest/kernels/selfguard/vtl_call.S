/* Through the hypercall page (TLFS, "Hypercall Page"; offsets as VsmCodePageOffsets reports them). */

    .text
/* hypercall(control, rdx, r8) -> status in RAX */
    .globl hypercall
hypercall:
    mov %rdx, %r8
    mov %rsi, %rdx
    mov %rdi, %rcx
    lea hypercall_page(%rip), %rax
    jmp *%rax

/* vtl_call(service, a, b, c) -> R8. VTL1 sees RDI RSI RDX R8; RAX, RBX, RCX and RBP to R15 are shared registers, so all that the
 * compiler counts on is saved here. */
    .globl vtl_call
vtl_call:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rcx, %r8
    xor %ecx, %ecx
    lea hypercall_page(%rip), %rax
    add vtl_call_offset(%rip), %rax
    call *%rax
    mov %r8, %rax
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .data
    .globl vtl_call_offset
vtl_call_offset: .quad 0x0F
