"""What of a machine goes into the journal, and when: before the reply that follows from it.

Whoever changes what a restarted VMM must know calls touch(); a transaction then takes all that changed since the last
one together with the answer to the exit that is being served. An exit that touches nothing costs none: its level holds
it, and a restarted VMM serves it again with the same outcome. A record is made anew only if what it tells has changed.

Transactions are made with Board.serving held, by the thread of a vCPU or of a client.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from vmm import plain
from vmm.events import LASTING, EventLog
from vmm.journal import Journal
from vtlab.v1.journal_pb2 import MachineRecord, PartitionRecord

if TYPE_CHECKING:
    from vmm.board import Board

# Names of the records of a machine.
MACHINE, PARTITION, VCPU, PAGES = "machine", "partition", "vcpu/", "pages/"
# Its content: how many transactions there were, this one included, u64.
TRANSACTIONS, COUNT = "transactions", struct.Struct("<Q")
# Events of one kind that the log drops before the journal does.
_TRIM = 256


class Ledger:
    """Of one machine.

    Attributes:
        dirty: something has changed since the last transaction.
        transactions: how many the journal holds of the machine. Enters carry it, so that an old journal is noticed.
    """

    def __init__(self, journal: Journal | None = None, vm: str = "", transactions: int = 0) -> None:
        """Without a journal nothing is kept, and transactions only publish events."""
        self.dirty = False
        self.transactions = transactions
        self._journal = journal
        self._vm = vm
        self._written: dict[str, bytes] = {}
        self._trimmed: dict[int, int] = {}
        self._stamp: tuple[object, ...] = ()
        self._kept = b""

    def touch(self) -> None:
        """Something has changed. From any thread."""
        self.dirty = True

    def commit(self, board: Board, only: Collection[int] = (), machine: MachineRecord | None = None) -> None:
        """A transaction of all that changed.

        Args:
            machine: its state, where that changes.
            only: kinds of events that are published with it; empty means all that wait.

        Raises:
            InternalError: it cannot be written. Nothing that follows from it may be done.
        """
        self.dirty = bool(only)  # what is left waits for the end of the exit
        if self._journal is None and not board.events.staged:
            return
        data = {f"{VCPU}{processor.index}": processor.record() for processor in board.processors}
        data[PARTITION] = self._partition(board)
        if machine is not None:
            data[MACHINE] = machine.SerializeToString(deterministic=True)
        forget = PAGES if board.memory.take_renewal() else ""
        if board.memory.changed:
            data |= {f"{PAGES}{number}": record for number, record in board.memory.take_records().items()}
        self._write(data, board.events, only, forget)

    def _write(self, data: Mapping[str, bytes], events: EventLog, only: Collection[int], forget: str) -> None:
        with events.publishing(only) as published:
            if self._journal is None:
                return
            new = {name: record for name, record in data.items() if self._written.get(name) != record}
            rows = [(event.sequence, event.kind, event.SerializeToString()) for event in published]
            kinds: set[int] = {int(event.kind) for event in published} & LASTING
            dropped = {kind: events.dropped(kind) for kind in kinds}
            due = {kind: row for kind, row in dropped.items() if row[0] >= self._trimmed.get(kind, 0) + _TRIM}
            if new or rows or forget:
                count = {TRANSACTIONS: COUNT.pack(self.transactions + 1)}
                self._journal.write(self._vm, {**new, **count}, rows, due, forget)
                self.transactions += 1
            self._trimmed |= {kind: row[0] for kind, row in due.items()}
            self._written |= {name: record for name, record in new.items() if not name.startswith(PAGES)}

    def _partition(self, board: Board) -> bytes:
        """The record, made anew if anything in it changed."""
        msrs = tuple([(msrs.guest_os_id, msrs.hypercall) if msrs else None for msrs in (board.msrs, board.upper_msrs)])
        devices = [device.save() for device in board.ports.devices]
        design = board.design.save()
        stamp = (plain.stamp(board.vtl), board.connections, board.connections.changes, msrs, design, *devices)
        if stamp != self._stamp:
            record = PartitionRecord(
                vtl=plain.dump(board.vtl), connections=board.connections.save(), design=design, devices=devices
            )
            for field, kept in zip((record.msrs, record.upper_msrs), msrs, strict=True):
                if kept is not None:
                    field.guest_os_id, field.hypercall = kept
            self._stamp, self._kept = stamp, record.SerializeToString(deterministic=True)
        return self._kept

    def forget(self) -> None:
        """The machine is no more."""
        if self._journal is not None:
            self._journal.forget(self._vm)
