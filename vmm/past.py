"""A machine as the journal of an earlier VMM tells of it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from vmm import plain
from vmm.board import Board
from vmm.events import Kept, is_complete
from vmm.journal import Journal
from vmm.ledger import COUNT, MACHINE, PAGES, PARTITION, TRANSACTIONS, VCPU
from vmm.vtl import VTL0
from vtlab.errors import InternalError
from vtlab.v1.journal_pb2 import MachineRecord, PartitionRecord, VcpuRecord
from vtlab.v1.vmm_pb2 import Event

_Record = TypeVar("_Record", bound=Message)


class Past:
    """Attributes:
    machine: as it was.
    transactions: how many were made of it.
    pages: see Memory.take_records.
    events: for EventLog.
    """

    def __init__(self, journal: Journal, vm: str) -> None:
        """Raises InternalError if the records make no machine."""
        self._vm = vm
        rows = journal.read(vm)
        self.machine = self._parse(MachineRecord, rows, MACHINE)
        count = self.machine.machine.spec.vp_count
        self._vcpus = [self._parse(VcpuRecord, rows, f"{VCPU}{index}") for index in range(count)]
        self._partition = self._parse(PartitionRecord, rows, PARTITION)
        try:
            (self.transactions,) = COUNT.unpack(rows[TRANSACTIONS])
        except (KeyError, struct.error):
            raise self._damaged(TRANSACTIONS) from None
        self.pages = {int(name.removeprefix(PAGES)): row for name, row in rows.items() if name.startswith(PAGES)}
        kept, dropped = journal.events(vm)
        events = [self._parse_event(number, row) for number, row in enumerate(kept)]
        self.events = Kept(events, dropped, journal.next_event() - 1)

    def _parse(self, kind: type[_Record], rows: Mapping[str, bytes], name: str) -> _Record:
        try:
            return kind.FromString(rows[name])
        except (KeyError, DecodeError):
            raise self._damaged(name) from None

    def _parse_event(self, number: int, row: bytes) -> Event:
        name = f"event {number}"
        event = self._parse(Event, {name: row}, name)
        if not is_complete(event):
            raise self._damaged(name)
        return event

    def _damaged(self, name: str) -> InternalError:
        return InternalError(f"machine '{self._vm}'", f"the journal's record {name!r} is missing or damaged")

    def _load(self, name: str, load: Callable[[], object]) -> None:
        try:
            load()
        except ValueError:
            raise self._damaged(name) from None

    def restore(self, board: Board) -> None:
        """Puts levels, MSRs, devices, connections and vCPUs of a new board as they were. Raises InternalError."""
        record = self._partition
        self._load(PARTITION, lambda: plain.load(board.vtl, record.vtl))
        self._load(PARTITION, lambda: board.connections.restore(record.connections))
        self._load(PARTITION, lambda: board.design.restore(record.design))
        for msrs, kept in ((board.msrs, record.msrs), (board.upper_msrs, record.upper_msrs)):
            if msrs is not None:
                msrs.guest_os_id, msrs.hypercall = kept.guest_os_id, kept.hypercall
        for device, state in zip(board.ports.devices, record.devices, strict=False):
            self._load(PARTITION, lambda device=device, state=state: device.restore(state))  # type: ignore[misc]
        for processor, vcpu in zip(board.processors, self._vcpus, strict=True):
            self._load(f"{VCPU}{processor.index}", lambda processor=processor, vcpu=vcpu: processor.restore(vcpu))  # type: ignore[misc]
            for vtl in vcpu.halted:
                board.gate.halt(processor.index, vtl)
            if board.guest_code:
                board.gate.interrupt(processor.index)  # whether one waits only its level knows: it is asked
            else:
                processor.vtl.active = VTL0  # VTL1 is entered within an exit, which is served again
