"""Hooks in machine code: they record why the guest stops, and stop it exactly.

A Python callback inside translated code costs a microsecond, and a stop that another thread asks for by `emu_stop`
is not exact (a read-modify-write may run twice). These hooks run on the engine's thread at points where the state
is exact: at the start of a block, at an exit, in IN/OUT, SYSCALL and SYSENTER, at a refused store. They fill the
mailbox and leave.

Calling convention: System V x86-64. The mailbox is the hooks' user data.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from enum import IntEnum
from typing import NamedTuple

from vtl0_guest.cpu import layout
from vtl0_guest.cpu.unicorn_library import EngineUnsupported, address_of

# Mailbox: byte offsets of its words.
STOP = 0  # u32, set by any thread: stop at the next block
PENDING = 4  # u16, set by any thread: an interrupt waits; stop at the first block where it can be taken
COUNTING = 6  # u16: BUDGET counts
BUDGET = 8  # i64, blocks left before the turn ends
REASON = 16  # u32, Reason
DETAIL = 20  # u32: exit number, or port
SIZE = 24  # u32, bytes
VALUE = 32  # u64
ADDRESS = 40  # u64
GUARD_CR3 = 48  # u64: CR3 as the core last saw it
GUARD_TR = 56  # u64: TR base likewise
CPL_MASK = 64  # u32: 3 if the nested roots of user and kernel differ, else 0
CPL_EXPECTED = 68  # u32: hidden flags under CPL_MASK for which the present root holds
MAILBOX_SIZE = 72


class Reason(IntEnum):
    """Why the engine stopped."""

    NONE = 0
    EXIT = 1  # AMD-V exit or exception; DETAIL is 0x100 + exit code, or the vector
    IN = 2
    OUT = 3
    SYSCALL = 4
    SYSENTER = 5
    STORE_REFUSED = 6  # a store to a page that is mapped read-only: VALUE, SIZE, ADDRESS (system-physical)
    ASKED = 7
    INTERRUPT_WINDOW = 8
    BUDGET_SPENT = 9
    TASK_SWITCH = 10  # CR3 or TR changed behind the core's back
    UNMAPPED = 11
    ROOT_SWAP = 12  # the privilege level changed and the nested roots differ


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


_JNE, _JE, _JS = b"\x0f\x85", b"\x0f\x84", b"\x0f\x88"


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

    def __init__(self, processor: int, environment: int) -> None:
        """Takes the addresses of QEMU's CPUState and CPUX86State."""
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
        self.exit = self._add(
            _store(DETAIL, "8972") + _reason("c742", Reason.EXIT) + stop
        )  # (uc, esi number, rdx user)
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
        self.unmapped = self._add(record + _reason("41c741", Reason.UNMAPPED) + leave)
        self.block = self._add(_block_code(environment, stop))

    def _add(self, code: bytes) -> int:
        if self._used + len(code) > len(self._code):
            raise EngineUnsupported("native hooks: the code does not fit in its page")
        self._code[self._used : self._used + len(code)] = code
        address = self._base + self._used
        self._used += (len(code) + 15) & ~15
        return address


def _block_code(environment: int, stop: bytes) -> bytes:
    """(uc, rsi address, edx size, rcx mailbox), run at the start of every block: what it costs, every block costs.

    One comparison covers all that another thread or the core may ask for; the rest is two guards. CR3 and TR are
    compared because a hardware task switch changes them without an exit, CPL because the nested roots may differ. The
    window test reads RFLAGS.IF and the interrupt shadow in place.
    """

    def field(opcode: str, offset: int) -> bytes:
        return bytes.fromhex(opcode) + struct.pack("<i", offset)  # an instruction on [r10 + offset]

    def test(offset: int, mask: int) -> bytes:
        return field("41f782", offset) + struct.pack("<I", mask)  # test dword [r10 + offset], mask

    def end(reason: Reason) -> bytes:
        return _reason("c741", reason) + stop

    tr_base = layout.SEGMENTS + 7 * layout.SEGMENT_SIZE + 8
    guards = [
        _movabs(_R10, environment),
        field("498b82", layout.CR + 3 * 8),  # mov rax, [r10 + CR3]
        _store(GUARD_CR3, "483341"),  # xor rax, [rcx + GUARD_CR3]
        field("498b92", tr_base),  # mov rdx, [r10 + TR base]
        _store(GUARD_TR, "483351"),  # xor rdx, [rcx + GUARD_TR]
        b"\x48\x09\xd0",  # or rax, rdx
        _Jump(_JNE, "switched"),
        field("418b92", layout.HIDDEN_FLAGS),  # mov edx, [r10 + hidden flags]
        _store(CPL_MASK, "2351"),  # and edx, [rcx + CPL_MASK]
        _store(CPL_EXPECTED, "3351"),  # xor edx, [rcx + CPL_EXPECTED]
        _Jump(_JNE, "root"),
    ]
    return _link(
        [
            _store(STOP, "488379") + b"\x00",  # cmp qword [rcx + STOP], 0: STOP, PENDING and COUNTING
            _Jump(_JNE, "attention"),
            *guards,
            "return",
            b"\xc3",
            "attention",
            _store(STOP, "8379") + b"\x00",  # cmp dword [rcx + STOP], 0
            _Jump(_JNE, "asked"),
            _store(COUNTING, "668379") + b"\x00",  # cmp word [rcx + COUNTING], 0
            _Jump(_JE, "uncounted"),
            _store(BUDGET, "48ff49"),  # dec qword [rcx + BUDGET]
            _Jump(_JS, "spent"),
            "uncounted",
            *guards,
            _store(PENDING, "668379") + b"\x00",  # cmp word [rcx + PENDING], 0
            _Jump(_JE, "return"),
            test(layout.RFLAGS, 0x200),
            _Jump(_JE, "return"),
            test(layout.HIDDEN_FLAGS, 0x8),
            _Jump(_JNE, "return"),
            end(Reason.INTERRUPT_WINDOW),
            "asked",
            end(Reason.ASKED),
            "spent",
            end(Reason.BUDGET_SPENT),
            "switched",
            end(Reason.TASK_SWITCH),
            "root",
            end(Reason.ROOT_SWAP),
        ]
    )
