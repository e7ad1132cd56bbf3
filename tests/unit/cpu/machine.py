"""A bare machine for tests: one core, identity-mapped page tables, a GDT, an IDT whose handlers report by hypercall."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import keystone

from vtl0_guest.cpu.core import Core
from vtl0_guest.cpu.devices.platform import build_platform
from vtl0_guest.cpu.devices.virtual_clock import VirtualClock
from vtlab.ram import Ram, RamFile
from vtlab.v1 import registers_pb2, vcpu_pb2

RAM_SIZE = 16 << 20
CODE, STACK, USER_STACK, DATA = 0x100000, 0x180000, 0x190000, 0x200000
PML4, PDPT, PD, PT = 0x10000, 0x11000, 0x12000, 0x13000  # the first 2 MiB are mapped by 4 KiB pages
GDT, IDT, TSS, HANDLERS = 0x5000, 0x6000, 0x7000, 0x8000
IST_STACK, KERNEL_STACK = 0x170000, 0x160000
KERNEL_CS, KERNEL_DS, USER_DS, USER_CS, TSS_SELECTOR, CODE32 = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x38

A = vcpu_pb2
RWX = A.PageAccess(read=True, write=True, kernel_execute=True, user_execute=True)

_ENGINES = {
    16: keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_16),
    32: keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_32),
    64: keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64),
}


def assemble(text: str, bits: int = 64, at: int = CODE) -> bytes:
    """Machine code of Intel-syntax assembly; lines are separated by semicolons or newlines."""
    code, _ = _ENGINES[bits].asm(text.replace("\n", ";"), at)
    return bytes(code)


def descriptor(attributes: int, base: int = 0, limit: int = 0xFFFFFFFF) -> int:
    """An 8-byte descriptor; attributes as in registers.proto."""
    if attributes & 0x8000:
        limit >>= 12
    return (
        (limit & 0xFFFF)
        | (base & 0xFFFFFF) << 16
        | (attributes & 0xF0FF) << 40
        | (limit & 0xF0000) << 32
        | (base & 0xFF000000) << 32
    )


def gate64(target: int, kind: int = 0xE, dpl: int = 0, ist: int = 0, selector: int = KERNEL_CS) -> bytes:
    low = target & 0xFFFF | selector << 16 | ist << 32 | (0x80 | dpl << 5 | kind) << 40 | (target >> 16 & 0xFFFF) << 48
    return struct.pack("<QQ", low, target >> 32)


def gate32(target: int, kind: int = 0xE, dpl: int = 0, selector: int = KERNEL_CS) -> bytes:
    return gate64(target, kind, dpl, 0, selector)[:8]


def _segment(selector: int, attributes: int, base: int = 0, limit: int = 0xFFFFFFFF) -> registers_pb2.Segment:
    return registers_pb2.Segment(selector=selector, attributes=attributes, base=base, limit=limit)


class Guest:
    """A bare machine whose vCPU 0 runs. `memory` is the writable file, `directory` holds all files."""

    def __init__(self, ram: Ram, directory: Path, vp_count: int = 1, seed: int | None = None) -> None:
        self.ram = ram
        self.directory = directory
        self.memory = ram.views[RamFile.WRITABLE]
        self.platform = build_platform(vp_count, ram.size, None if seed is None else VirtualClock())
        self.core = Core(ram, vp_count, 0, self.platform, seed=seed)
        self.processor = self.core.processor(0)
        self.exit = A.Exit()

    def close(self) -> None:
        self.core.close()

    def poke(self, at: int, data: bytes) -> None:
        self.memory[at : at + len(data)] = data

    def peek(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self.memory[at : at + size], "little")

    # ------------------------------------------------------------------------------------------------- modes

    def long_mode(self, code: str | bytes, *, cpl: int = 0, user_pages: bool = True) -> None:
        """64-bit mode, identity mapping of all RAM, each exception handler a VMMCALL (see `vector`)."""
        rights = 7 if user_pages else 3
        self.poke(PML4, struct.pack("<Q", PDPT | 7))
        self.poke(PDPT, struct.pack("<Q", PD | 7))
        large = [struct.pack("<Q", PT | 7)] + [
            struct.pack("<Q", number << 21 | 0x80 | rights) for number in range(1, RAM_SIZE >> 21)
        ]
        self.poke(PD, b"".join(large))
        self.poke(PT, b"".join(struct.pack("<Q", number << 12 | rights) for number in range(512)))
        self.poke(
            GDT,
            struct.pack(
                "<8Q",
                0,
                descriptor(0xA09B),
                descriptor(0xC093),
                descriptor(0xC0F3),
                descriptor(0xA0FB),
                descriptor(0x008B, TSS, 0x67),
                0,
                descriptor(0xC09B),
            ),
        )
        self.poke(TSS, b"\0" * 0x68)
        self.poke(TSS + 4, struct.pack("<Q", KERNEL_STACK))
        self.poke(TSS + 36, struct.pack("<Q", IST_STACK))
        for vector in range(256):
            self.poke(IDT + 16 * vector, gate64(HANDLERS + 16 * vector, dpl=3 if vector in (3, 0x80) else 0))
            self.poke(HANDLERS + 16 * vector, bytes.fromhex("0f01d9 48cf f4"))  # vmmcall; iretq; hlt
        self.poke(CODE, code if isinstance(code, bytes) else assemble(code))
        state = registers_pb2.ProcessorState()
        registers = state.registers
        registers.rip, registers.rsp, registers.rflags = CODE, USER_STACK if cpl else STACK, 2
        registers.cr0, registers.cr3, registers.cr4, registers.efer = 0x80010033, PML4, 0x220, 0xD01
        registers.cpl = cpl
        data = _segment(USER_DS if cpl else KERNEL_DS, 0xC0F3 if cpl else 0xC093)
        registers.cs.CopyFrom(_segment(USER_CS if cpl else KERNEL_CS, 0xA0FB if cpl else 0xA09B))
        for target in (registers.ss, registers.ds, state.es, state.fs, state.gs):
            target.CopyFrom(data)
        state.tr.CopyFrom(_segment(TSS_SELECTOR, 0x8B, TSS, 0x67))
        state.gdtr.base, state.gdtr.limit = GDT, 0x3F
        state.idtr.base, state.idtr.limit = IDT, 0xFFF
        self.processor.load_state(state)

    def protected_mode(self, code: str | bytes, *, cpl: int = 0) -> None:
        """32-bit protected mode without paging; handlers as in `long_mode`."""
        self.poke(
            GDT,
            struct.pack(
                "<6Q",
                0,
                descriptor(0xC09B),
                descriptor(0xC093),
                descriptor(0xC0F3),
                descriptor(0xC0FB),
                descriptor(0x008B, TSS, 0x67),
            ),
        )
        self.poke(TSS, struct.pack("<IIH", 0, KERNEL_STACK, KERNEL_DS).ljust(0x68, b"\0"))
        for vector in range(256):
            self.poke(IDT + 8 * vector, gate32(HANDLERS + 16 * vector, dpl=3 if vector in (3, 0x80) else 0))
            self.poke(HANDLERS + 16 * vector, bytes.fromhex("0f01d9 cf f4"))  # vmmcall; iretd; hlt
        self.poke(CODE, code if isinstance(code, bytes) else assemble(code, 32))
        state = registers_pb2.ProcessorState()
        registers = state.registers
        registers.rip, registers.rsp, registers.rflags = CODE, USER_STACK if cpl else STACK, 2
        registers.cr0, registers.cpl = 0x11, cpl
        data = _segment(USER_DS if cpl else KERNEL_DS, 0xC0F3 if cpl else 0xC093)
        registers.cs.CopyFrom(_segment(USER_CS if cpl else KERNEL_CS, 0xC0FB if cpl else 0xC09B))
        for target in (registers.ss, registers.ds, state.es, state.fs, state.gs):
            target.CopyFrom(data)
        state.tr.CopyFrom(_segment(TSS_SELECTOR, 0x8B, TSS, 0x67))
        state.gdtr.base, state.gdtr.limit = GDT, 0x2F
        state.idtr.base, state.idtr.limit = IDT, 0x7FF
        self.processor.load_state(state)

    def real_mode(self, code: str | bytes, at: int = 0x1000) -> None:
        """16-bit real mode at 0000:`at`; vectors 0 to 255 each lead to a HLT at 0000:0x2000 + vector * 4."""
        for vector in range(256):
            self.poke(vector * 4, struct.pack("<HH", 0x2000 + vector * 4, 0))
            self.poke(0x2000 + vector * 4, b"\xf4\xcf")  # hlt; iret
        self.poke(at, code if isinstance(code, bytes) else assemble(code, 16, at))
        state = registers_pb2.ProcessorState()
        registers = state.registers
        registers.rip, registers.rsp, registers.rflags, registers.cr0 = at, 0x7000, 2, 0x10
        registers.cs.CopyFrom(_segment(0, 0x9B, 0, 0xFFFF))
        for target in (registers.ss, registers.ds, state.es, state.fs, state.gs):
            target.CopyFrom(_segment(0, 0x93, 0, 0xFFFF))
        state.tr.CopyFrom(_segment(0, 0x8B, 0, 0xFFFF))
        state.idtr.limit = 0x3FF
        self.processor.load_state(state)

    # ----------------------------------------------------------------------------------------------- running

    def run(
        self,
        action: A.Action.ValueType = A.ACTION_COMPLETE,
        value: int = 0,
        updates: Sequence[A.Update] = (),
        exception: A.Exception | None = None,
    ) -> str:
        """Enters once; keeps the exit in `exit` and returns the name of its reason."""
        resolution = A.Resolution(action=action, value=value, exception=exception)
        enter = A.Enter(reason=A.ENTER_REASON_RESUME, resolution=resolution, updates=updates)
        self.exit = A.Exit.FromString(self.processor.run(enter))
        return self.exit.WhichOneof("reason") or ""

    def filter(self, **fields: object) -> None:
        """Sets the intercept filter with the next enter's updates applied at once."""
        update = A.Update(intercepts=A.InterceptFilter(**fields))  # type: ignore[arg-type]
        self.processor._resolver.prepare([update])

    def protect(
        self,
        address: int,
        pages: int = 1,
        *,
        access: A.PageAccess = RWX,
        store: A.PageStore.ValueType = A.PAGE_STORE_WRITABLE,
    ) -> None:
        self.core.protect(A.ProtectionUpdate(runs=[address >> 12, pages], access=access, store=store))

    @property
    def vector(self) -> int | None:
        """The exception whose handler has just reported, by its address."""
        registers = self.exit.registers
        at = registers.rip - HANDLERS
        inside = self.exit.WhichOneof("reason") == "hypercall" and 0 <= at < 256 * 16 and at % 16 == 0
        return at // 16 if inside else None

    def frame(self, words: int, size: int = 8) -> list[int]:
        """The top of the handler's stack."""
        rsp = self.exit.registers.rsp
        return [self.peek(rsp + size * number, size) for number in range(words)]
