"""Hooks in machine code: they record why the guest stops, and leave the block exactly there.

A Python callback inside translated code costs a microsecond and cannot leave a block. These functions run on the
engine's thread at points where the state is exact: at an exit, in IN/OUT, SYSCALL and SYSENTER, at a refused store,
where an address is translated, and, where that is switched on, at the start of each block. They fill the mailbox and
leave.

Calling convention: System V x86-64. The mailbox is the hooks' user data.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from enum import IntEnum
from typing import NamedTuple

from vtl0_guest.cpu import layout
from vtl0_guest.cpu.native_memory import NativeMemory
from vtl0_guest.cpu.unicorn_library import EngineUnsupported, address_of

# Mailbox: byte offsets of its words.
BUDGET = 8  # i64, blocks left; counted while the block hook is on
REASON = 16  # u32, Reason
DETAIL = 20  # u32: exit number, or port
SIZE = 24  # u32, bytes
VALUE = 32  # u64
ADDRESS = 40  # u64
GUARD_CR3 = 48  # u64: CR3 as the core last saw it
GUARD_TR = 56  # u64: TR base likewise
KERNEL_ROOT = 64  # u64: nested root of translations below CPL3
USER_ROOT = 72  # u64: of those at CPL3
MAILBOX_SIZE = 80

UNLIMITED = (1 << 63) - 1


class Reason(IntEnum):
    """Why the engine stopped."""

    NONE = 0
    EXIT = 1  # AMD-V exit or exception; DETAIL is 0x100 + exit code, or the vector
    IN = 2
    OUT = 3
    SYSCALL = 4
    SYSENTER = 5
    STORE_REFUSED = 6  # a store to a page that is mapped read-only: VALUE, SIZE, ADDRESS (system-physical)
    BUDGET_SPENT = 7
    TASK_SWITCH = 8  # CR3 or TR changed behind the core's back


def _movabs(register_opcode: bytes, value: int) -> bytes:
    return register_opcode + struct.pack("<Q", value)


_RAX, _RDI, _R10 = b"\x48\xb8", b"\x48\xbf", b"\x49\xba"  # movabs opcodes


def _store(displacement: int, opcode: str) -> bytes:
    """An instruction whose last byte is an 8-bit displacement from the mailbox register."""
    return bytes.fromhex(opcode) + bytes([displacement])


def _reason(opcode: str, reason: Reason) -> bytes:
    """mov dword [mailbox + REASON], reason"""
    return _store(REASON, opcode) + struct.pack("<I", reason)


class _Jump(NamedTuple):
    """A conditional near jump."""

    opcode: bytes
    label: str


_JNE, _JS = b"\x0f\x85", b"\x0f\x88"


def _link(parts: list[bytes | _Jump | str]) -> bytes:
    """Joins code; a string is a label, a _Jump goes to one."""
    places: dict[str, int] = {}
    at = 0
    for part in parts:
        if isinstance(part, str):
            places[part] = at
        else:
            at += 6 if isinstance(part, _Jump) else len(part)
    code = b""
    for part in parts:
        if isinstance(part, _Jump):
            code += part.opcode + struct.pack("<i", places[part.label] - len(code) - 6)
        elif isinstance(part, bytes):
            code += part
    return code


class NativeHooks:
    """The machine code of one engine's hooks; every attribute is a function's address."""

    def __init__(
        self, processor: int, environment: int, mailbox: int, nested_cr3: int, lines: int, memory: NativeMemory
    ) -> None:
        """Takes addresses: QEMU's CPUState, CPUX86State, the mailbox, the nested CR3, the interrupt lines."""
        emu_stop, loop_exit = address_of("uc_emu_stop"), address_of("cpu_loop_exit_x86_64")
        self._code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._used = 0
        # Ends a hook: stop the engine, leave the block at the restored instruction. The stack is aligned for the call.
        leave = (
            b"\x48\x83\xec\x08"
            + _movabs(_RAX, emu_stop)
            + b"\xff\xd0"
            + _movabs(_RDI, processor)
            + _movabs(_RAX, loop_exit)
            + b"\xff\xe0"
        )
        stop = _movabs(_RAX, emu_stop) + b"\xff\xe0"
        # (uc, esi number, rdx user). The interrupt lines are lowered, or the engine would never look at the stop.
        lower = _movabs(_RAX, lines) + b"\x66\xc7\x00\x00\x00"  # mov word [rax], 0
        self.exit = self._add(_store(DETAIL, "8972") + _reason("c742", Reason.EXIT) + lower + stop)
        self.port_out = self._add(  # (uc, esi port, edx size, ecx value, r8 user)
            _store(DETAIL, "418970")
            + _store(SIZE, "418950")
            + b"\x89\xc9"  # clears the upper half of rcx
            + _store(VALUE, "498948")
            + _reason("41c740", Reason.OUT)
            + leave
        )
        self.port_in = self._add(  # (uc, esi port, edx size, rcx user)
            _store(DETAIL, "8971") + _store(SIZE, "8951") + _reason("c741", Reason.IN) + leave
        )
        self.syscall = self._add(_reason("c746", Reason.SYSCALL) + leave)  # (uc, rsi user)
        self.sysenter = self._add(_reason("c746", Reason.SYSENTER) + leave)
        # (uc, esi type, rdx address, ecx size, r8 value, r9 user)
        record = _store(ADDRESS, "498951") + _store(SIZE, "418949") + _store(VALUE, "4d8941") + _store(DETAIL, "418971")
        self.store_refused = self._add(record + _reason("41c741", Reason.STORE_REFUSED) + leave)
        self.block = self._add(_block_code(environment, stop))
        self.translate = self._add(_translate_code(mailbox, nested_cr3, memory))

    def _add(self, code: bytes) -> int:
        if self._used + len(code) > len(self._code):
            raise EngineUnsupported("native hooks: the code does not fit in its page")
        self._code[self._used : self._used + len(code)] = code
        address = self._base + self._used
        self._used += (len(code) + 15) & ~15
        return address


def _block_code(environment: int, stop: bytes) -> bytes:
    """(uc, rsi address, edx size, rcx mailbox), run at the start of a block: counts it, and compares CR3 and TR.

    A hardware task switch changes them without an exit.
    """

    def load(offset: int) -> bytes:
        return b"\x49\x8b\x82" + struct.pack("<i", offset)  # mov rax, [r10 + offset]

    def end(reason: Reason) -> bytes:
        return _reason("c741", reason) + stop

    return _link(
        [
            _store(BUDGET, "48ff49"),  # dec qword [rcx + BUDGET]
            _Jump(_JS, "spent"),
            _movabs(_R10, environment),
            load(layout.CR + 3 * 8),
            _store(GUARD_CR3, "483941"),  # cmp [rcx + GUARD_CR3], rax
            _Jump(_JNE, "switched"),
            load(layout.SEGMENTS + 7 * layout.SEGMENT_SIZE + 8),
            _store(GUARD_TR, "483941"),
            _Jump(_JNE, "switched"),
            b"\xc3",
            "spent",
            end(Reason.BUDGET_SPENT),
            "switched",
            end(Reason.TASK_SWITCH),
        ]
    )


def _translate_code(mailbox: int, nested_cr3: int, memory: NativeMemory) -> bytes:
    """Stands before QEMU's tlb_fill (cpu, address, size, access, r8d MMU index, ...): chooses the nested root.

    It also names this engine as the running one to native_memory.py.

    The engine keeps separate TLBs for CPL3 and below, so what a root allows is only ever used at its own level.
    """
    return (
        _movabs(_RAX, mailbox)
        + _store(KERNEL_ROOT, "4c8b50")  # mov r10, [rax + KERNEL_ROOT]
        + b"\x41\x83\xf8\x01"  # cmp r8d, MMU_USER_IDX
        + _store(USER_ROOT, "4c0f4450")  # cmove r10, [rax + USER_ROOT]
        + _movabs(_RAX, nested_cr3)
        + b"\x4c\x89\x10"  # mov [rax], r10
        + _movabs(_RAX, memory.running)
        + _movabs(_R10, memory.record)
        + b"\x4c\x89\x10"
        + _movabs(_RAX, address_of("x86_cpu_tlb_fill_x86_64"))
        + b"\xff\xe0"
    )
