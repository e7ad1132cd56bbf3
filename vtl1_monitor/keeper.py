"""Keeps what VTL1 knows in the sealed store, and brings it back in the process that takes this one's place.

What is sealed is a machine between two services. While one waits for protections, what it began with and has asked for
is sealed beside: a monitor that died in between begins it anew, from the state before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtl1_monitor import rights, snapshot
from vtl1_monitor.machine import Machine
from vtl1_monitor.rights import Change, Run
from vtl1_monitor.sealed import BrokenSeal, SealedStore
from vtl1_monitor.snapshot import Interrupted, Sealed
from vtl1_monitor.tickets import Ticket
from vtlab.run_messages import numbered
from vtlab.session import Session
from vtlab.v1 import vcpu_pb2

_CODES = {
    vcpu_pb2.PAGE_STORE_WRITABLE: rights.WRITABLE,
    vcpu_pb2.PAGE_STORE_SEALED: rights.SEALED,
    vcpu_pb2.PAGE_STORE_PRIVATE: rights.PRIVATE,
}


class Keeper:
    """Of one monitor, which calls it with the machine's turn held.

    Attributes:
        sealed: what the store holds.
    """

    def __init__(self, store: SealedStore) -> None:
        self.sealed = Sealed()
        self._store = store

    def load(self) -> Sealed | None:
        """What a monitor that died has left; None if nothing. Raises BrokenSeal."""
        content = self._store.unseal()
        if content is None:
            return None
        try:
            self.sealed = snapshot.load_value(content, Sealed)
        except Exception as error:  # noqa: BLE001 - a content of another version may fail in any way
            raise BrokenSeal(f"the sealed store cannot be read: {type(error).__name__}: {error}") from None
        return self.sealed

    def attached(self, request: vcpu_pb2.AttachRequest, machine: Machine) -> None:
        """A machine in its first state."""
        self.sealed.request, self.sealed.machine = request.SerializeToString(), snapshot.dump(machine)
        self.sealed.sessions, self.sealed.interrupted = [], None
        self.sealed.tickets = machine.tickets.kept()
        self._seal()

    def detached(self, overrides: dict[str, tuple[str, str]], tickets: dict[str, Ticket]) -> None:
        """No machine; operators' policies stay, and what may be restored."""
        self.sealed = Sealed(overrides=overrides, tickets=tickets)
        if overrides or tickets:
            self._seal()
        else:
            self._store.wipe()

    def wipe(self) -> None:
        """The monitor ends for good."""
        self.sealed = Sealed()
        self._store.wipe()

    def changed(self, machine: Machine, overrides: dict[str, tuple[str, str]]) -> None:
        """By an operator."""
        self.sealed.overrides, self.sealed.tickets = overrides, machine.tickets.kept()
        if machine.serving is None:
            self.sealed.machine = snapshot.dump(machine)
        self._seal()

    def answered(
        self, machine: Machine, sessions: Sequence[Session], vp_index: int, enter: vcpu_pb2.Enter, exit_: vcpu_pb2.Exit
    ) -> None:
        """An exit is about to leave: seals what led to it, if anything changed."""
        sealed, tickets = self.sealed, machine.tickets.kept()
        if exit_.HasField("protect") or exit_.HasField("state_request"):
            if sealed.interrupted is None:
                sealed.interrupted = Interrupted(vp_index, enter.SerializeToString())
            if exit_.HasField("protect"):
                sealed.interrupted.asked.append(exit_.protect.SerializeToString())
        else:
            state = snapshot.dump(machine)
            if state == sealed.machine and sealed.interrupted is None and tickets == sealed.tickets:
                return
            sealed.machine, sealed.interrupted = state, None
        sealed.tickets = tickets
        sealed.sessions = [session.kept for session in sessions]
        answer = numbered(exit_.SerializeToString(), enter.sequence)
        sealed.sessions[vp_index] = enter.sequence, enter.SerializeToString(), answer
        self._seal()

    def _seal(self) -> None:
        self._store.seal(snapshot.dump_value(self.sealed))


def after_interruption(machine: Machine, interrupted: Interrupted) -> list[Change]:
    """Brings what VTL1 knows of pages to what the interrupted service may have made of them.

    Pages that it sealed are to become ordinary again before it begins anew, since it will look whether they are. What
    it opened stays open and what it took for VTL1 stays taken: neither is given back to hold what it held before.

    Returns:
        The changes that make the first kind ordinary.
    """
    memory = machine.memory
    before = bytes(memory.codes)
    now = bytearray(before)
    for asked in interrupted.asked:
        for update in vcpu_pb2.Protect.FromString(asked).protections:
            access = update.access
            code = rights.READ * access.read | rights.WRITE * access.write | rights.PAGE_TABLE * access.page_table
            code |= rights.KERNEL_EXECUTE * access.kernel_execute | rights.USER_EXECUTE * access.user_execute
            code |= _CODES[update.store]
            for first, pages in zip(update.runs[::2], update.runs[1::2], strict=True):
                now[first : first + pages] = bytes([code]) * pages
    undo, holds = [], []
    for gfn in range(memory.pages) if now != before else ():
        old, new = before[gfn], now[gfn]
        if old == new:
            continue
        run, owner = Run(gfn, 1), memory.owner(gfn)
        closed = old & rights.STORE_MASK == rights.WRITABLE and new & rights.STORE_MASK == rights.SEALED
        if closed:
            undo.append(Change(run, old, owner))
        opened = new & rights.STORE_MASK == rights.WRITABLE
        if opened and machine.guard is not None:
            machine.guard.forget(gfn)
        holds.append(Change(run, new, machine.rules.default_name if opened else owner))
    memory.record(holds)
    return undo
