"""Design `mmio-device`: a synthetic device with registers in memory and a ring of requests in guest memory.

Christopherson, 2024-05-06: a VMCALL cannot say who may ask for what, a synthetic device with an MMIO interface could,
and userspace could evolve it without waiting for KVM. Delegation and restriction are vmm.designs.guard_requests'.

Registers, of one page at BASE, little-endian; writes have 4 or 8 bytes:

    00 u32 magic     04 u32 version   08 u64 actions that exist (bit n: action n)
    10 u64 ring GPA  18 u32 entries (a power of two up to 256)
    20 u32 head (RO) 28 u32 tail; writing it is the doorbell. Both count on, modulo 2**32
    30 u32 status (RO): bit 0 enabled, bit 1 locked, bits 15:8 why the last access failed
    38 u32 control: bit 0 enables; a ring can be set only while that is clear
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from vmm.board import Answer, Board, complete
from vmm.designs import kvm_abi
from vmm.designs.guard_requests import (
    DESCRIPTOR,
    STATUS,
    STATUS_OFFSET,
    Action,
    Authority,
    Request,
    StandDown,
    Status,
    decode,
)
from vmm.designs.heki import record_verdict
from vmm.designs.native import Native
from vmm.discovery import Leaf
from vmm.memory import WRITE
from vmm.processor import Processor
from vtlab.errors import VtlabError
from vtlab.ram import PAGE_SIZE
from vtlab.v1 import registers_pb2, vcpu_pb2, vmm_pb2
from vtlab.v1.registers_pb2 import RegisterValue
from vtlab.v1.vcpu_pb2 import Exit, InterceptFilter, PageAccess, ProtectionUpdate, Resolution, Update
from vtlab.v1.vmm_pb2 import DeviceEvent, MachineSpec
from vtlab.x86.registers import Cr0, Cr4

BASE = 1 << 39  # above all RAM, below 2**40
LEAF = 0x4000_0010
MAGIC, VERSION = 0x47534D4D, 1
MAX_ENTRIES = 256
_ACTIONS = sum(1 << action for action in Action)
_REGISTERS = struct.Struct("<2IQQ8I")
Arguments = tuple[int, int, int, int]
_ALL = (1 << 64) - 1
_COMMIT = Resolution(action=vcpu_pb2.ACTION_COMMIT)
_NAMES = {0: registers_pb2.REGISTER_NAME_CR0, 4: registers_pb2.REGISTER_NAME_CR4}
_NUMBERS = {name: number for number, name in _NAMES.items()}
# What WRITE_REGISTER may change: bits that leave the processor in the mode it is in.
_CHANGEABLE = {
    0: int(Cr0.WP | Cr0.AM),
    4: int(Cr4.SMEP | Cr4.SMAP | Cr4.UMIP | Cr4.FSGSBASE | Cr4.DE),
}
_READ, _WRITE, _EXECUTE = 1, 2, 4
_FULL = PageAccess(read=True, write=True, kernel_execute=True, user_execute=True)


class Error(IntEnum):
    """Status bits 15:8."""

    NONE = 0
    BAD_RING = 1
    BAD_TAIL = 2
    NOT_ENABLED = 3
    BAD_ACCESS = 4


@dataclass
class _State:
    """Of the device, from a reset to the next."""

    ring: int = 0
    entries: int = 0
    head: int = 0
    tail: int = 0
    enabled: bool = False
    error: Error = Error.NONE
    pins: dict[int, int] = field(default_factory=lambda: {0: 0, 4: 0})
    msrs: set[int] = field(default_factory=set)
    runs: list[tuple[int, int]] = field(default_factory=list)
    authority: Authority = field(default_factory=Authority)


class MmioDevice(Native):
    """A reset resets the device, like any other."""

    def __init__(self, spec: MachineSpec) -> None:
        super().__init__(spec)
        self._state = _State()

    def reset(self) -> None:
        self._state = _State()

    def filter(self) -> InterceptFilter:
        wanted, state = super().filter(), self._state
        wanted.cr0_mask, wanted.cr4_mask = state.pins[0], state.pins[4]
        for index in sorted(state.msrs):
            wanted.msr_writes.add(index=index, mask=_ALL)
        return wanted

    def leaf(self, board: Board, number: int) -> Leaf:
        if number == LEAF:
            return BASE & 0xFFFF_FFFF, BASE >> 32, PAGE_SIZE, VERSION
        found = kvm_abi.leaf(number)
        return (LEAF, *found[1:]) if found[0] else found

    def intercepted(self, board: Board, processor: Processor, exit_: Exit) -> Answer:
        """What is watched is what was pinned or protected: all of it is #GP(0)."""
        resolution = Resolution(action=vcpu_pb2.ACTION_DENY, reason=self._objection(exit_))
        if not resolution.reason:
            return processor.resume(_COMMIT)
        record_verdict(board, processor, exit_, resolution)
        return processor.resume(resolution)

    def _objection(self, exit_: Exit) -> str:
        kind = exit_.WhichOneof("reason")
        if kind == "register_write":
            number = _NUMBERS.get(exit_.register_write.name)
            changed = exit_.register_write.old_value ^ exit_.register_write.new_value
            pinned = changed & self._state.pins[number] if number is not None else 0
            return f"CR{number}: changes pinned bits {pinned:#x}" if pinned else ""
        if kind == "msr":
            return f"MSR {exit_.msr.index:#x}: pinned" if exit_.msr.index in self._state.msrs else ""
        return f"page {exit_.memory_fault.gpa >> 12:#x}: protected"

    # ------------------------------------------------------------------------------------------------- the registers

    def unmapped(self, board: Board, processor: Processor, exit_: Exit) -> Answer | None:
        fault = exit_.memory_fault
        offset = fault.gpa - BASE
        if not 0 <= offset < PAGE_SIZE:
            return None
        if fault.access == vcpu_pb2.ACCESS_KIND_READ:
            raw = self._registers()[offset : offset + 8]
            return processor.resume(complete(int.from_bytes(raw, "little")))
        self._state.error = self._store(board, processor, exit_, offset)
        return processor.resume(complete(0))

    def _registers(self) -> bytes:
        state = self._state
        status = int(state.enabled) | state.authority.locked << 1 | state.error << 8
        ring = (state.ring, state.entries, 0, state.head, 0, state.tail, 0, status, 0)
        return _REGISTERS.pack(MAGIC, VERSION, _ACTIONS, *ring) + STATUS.pack(int(state.enabled))

    def _store(self, board: Board, processor: Processor, exit_: Exit, offset: int) -> Error:
        data = exit_.memory_fault.data
        state, value = self._state, int.from_bytes(data, "little")
        if len(data) not in (4, 8):
            return Error.BAD_ACCESS
        if offset == 0x28:
            return self._doorbell(board, processor, exit_, value & 0xFFFF_FFFF)
        if exit_.registers.cpl:
            return Error.BAD_ACCESS  # what is delegated are requests, not the device
        if offset == 0x38:
            return self._control(board, value)
        if offset not in (0x10, 0x18) or state.enabled:
            return Error.BAD_ACCESS
        if offset == 0x10:
            state.ring = value
        else:
            state.entries = value & 0xFFFF_FFFF
        return Error.NONE

    def _control(self, board: Board, value: int) -> Error:
        state = self._state
        if not value & 1:
            if state.authority.locked:
                return Error.BAD_ACCESS
            state.enabled = False
            return Error.NONE
        size = state.entries * DESCRIPTOR.size
        power = state.entries > 0 and state.entries & state.entries - 1 == 0
        if not power or state.entries > MAX_ENTRIES or state.ring % DESCRIPTOR.size:
            return Error.BAD_RING
        try:
            board.memory.check(state.ring, size, WRITE)
        except VtlabError:
            return Error.BAD_RING
        state.enabled, state.head, state.tail = True, 0, 0
        return Error.NONE

    # ---------------------------------------------------------------------------------------------------- the ring

    def _doorbell(self, board: Board, processor: Processor, exit_: Exit, tail: int) -> Error:
        state = self._state
        if not state.enabled:
            return Error.NOT_ENABLED
        waiting = tail - state.head & 0xFFFF_FFFF
        if waiting > state.entries:
            return Error.BAD_TAIL
        state.tail = tail
        for _ in range(waiting):
            gpa = state.ring + state.head % state.entries * DESCRIPTOR.size
            try:
                board.memory.check(gpa, DESCRIPTOR.size, WRITE)
                request = decode(board.memory.read(gpa, DESCRIPTOR.size))
            except VtlabError:
                return Error.BAD_RING
            status = self._perform(board, processor, exit_, request)
            state.head = state.head + 1 & 0xFFFF_FFFF
            self._log(board, exit_, request, status, gpa)
            try:
                board.memory.write(gpa + STATUS_OFFSET, STATUS.pack(status))
            except VtlabError:  # the request took the ring's own page away
                return Error.BAD_RING
        return Error.NONE

    def _log(self, board: Board, exit_: Exit, request: Request, status: Status, gpa: int) -> None:
        name = Action(request.action).name if request.action in set(Action) else f"action {request.action:#x}"
        what = f"{name}: {status.name} (RIP {exit_.registers.rip:#x}, CPL{exit_.registers.cpl})"
        event = DeviceEvent(device="guard", what=what, gpa=gpa, size=DESCRIPTOR.size, refused=status is not Status.OK)
        board.events.record(vmm_pb2.EVENT_KIND_DEVICE, event)

    def _perform(self, board: Board, processor: Processor, exit_: Exit, request: Request) -> Status:
        perform = _PERFORM.get(request.action)
        if perform is None:
            return Status.UNKNOWN_ACTION
        if not request.clean:
            return Status.RESERVED_SET
        if not self._state.authority.permits(request.action, exit_.registers.rip, exit_.registers.cpl):
            return Status.DENIED
        return perform(self, board, processor, exit_, request.arguments)

    def _pin(self, board: Board, _processor: Processor, _exit: Exit, arguments: Arguments) -> Status:
        number, mask, *spare = arguments
        if number not in _NAMES or not mask or any(spare):
            return Status.BAD_ARGUMENT
        self._state.pins[number] |= mask
        board.watch_all(self.filter())
        return Status.OK

    def _pin_msr(self, board: Board, _processor: Processor, _exit: Exit, arguments: Arguments) -> Status:
        index, *spare = arguments
        if index >> 32 or any(spare):
            return Status.BAD_ARGUMENT
        if len(self._state.msrs) >= MAX_ENTRIES:
            return Status.TOO_MANY
        self._state.msrs.add(index)
        board.watch_all(self.filter())
        return Status.OK

    def _protect(self, board: Board, _processor: Processor, _exit: Exit, arguments: Arguments) -> Status:
        """`gpa + size` is of unbounded numbers here: what wraps around lies outside of RAM."""
        gpa, size, rights, spare = arguments
        inside = size > 0 and gpa + size <= board.memory.size and not (gpa | size) % PAGE_SIZE
        if not inside or rights & ~(_READ | _WRITE | _EXECUTE) or not rights & _READ or spare:
            return Status.BAD_ARGUMENT
        write, execute = bool(rights & _WRITE), bool(rights & _EXECUTE)
        run = (gpa // PAGE_SIZE, size // PAGE_SIZE)
        if run not in self._state.runs:
            if len(self._state.runs) >= MAX_ENTRIES:
                return Status.TOO_MANY
            self._state.runs.append(run)
        access = PageAccess(read=True, write=write, kernel_execute=execute, user_execute=True)
        store = vcpu_pb2.PAGE_STORE_WRITABLE if write else vcpu_pb2.PAGE_STORE_SEALED
        board.protect([ProtectionUpdate(runs=run, access=access, store=store)])
        return Status.OK

    def _write_register(self, _board: Board, processor: Processor, exit_: Exit, arguments: Arguments) -> Status:
        number, value, *spare = arguments
        if number not in _NAMES or any(spare):
            return Status.BAD_ARGUMENT
        old = exit_.registers.cr0 if number == 0 else exit_.registers.cr4
        if (old ^ value) & ~_CHANGEABLE[number]:
            return Status.BAD_ARGUMENT
        processor.post(Update(register=RegisterValue(name=_NAMES[number], value=value)))
        return Status.OK

    def _stand_down(self, board: Board, _processor: Processor, _exit: Exit, arguments: Arguments) -> Status:
        kind, *spare = arguments
        if kind not in set(StandDown) or any(spare):
            return Status.BAD_ARGUMENT
        state = self._state
        updates = [ProtectionUpdate(runs=run, access=_FULL, store=vcpu_pb2.PAGE_STORE_WRITABLE) for run in state.runs]
        board.protect(updates)
        state.pins, state.msrs, state.runs, state.authority = {0: 0, 4: 0}, set(), [], Authority()
        board.watch_all(self.filter())
        return Status.OK

    def _delegate(self, _board: Board, _processor: Processor, _exit: Exit, arguments: Arguments) -> Status:
        return self._state.authority.delegate(arguments)

    def _restrict(self, _board: Board, _processor: Processor, _exit: Exit, arguments: Arguments) -> Status:
        return self._state.authority.restrict(arguments)

    def _lock(self, _board: Board, _processor: Processor, _exit: Exit, arguments: Arguments) -> Status:
        return Status.BAD_ARGUMENT if any(arguments) else self._state.authority.lock()


_PERFORM: dict[int, Callable[[MmioDevice, Board, Processor, Exit, Arguments], Status]] = {
    Action.PIN: MmioDevice._pin,
    Action.PIN_MSR: MmioDevice._pin_msr,
    Action.PROTECT: MmioDevice._protect,
    Action.WRITE_REGISTER: MmioDevice._write_register,
    Action.STAND_DOWN: MmioDevice._stand_down,
    Action.DELEGATE: MmioDevice._delegate,
    Action.RESTRICT: MmioDevice._restrict,
    Action.LOCK: MmioDevice._lock,
}
