"""Log of what happened to a machine: bounded, numbered, for many readers, none of whom can hold it up.

Recording keeps a reference to the message at hand; the Event itself is built when somebody reads it, once for all
readers, as bytes. Each kind has its own ring, so that a flood of exits does not push the last state change out. What
recording costs does not grow with the number of readers (vmm.event_readers).

Events of lasting kinds outlive the VMM: they are staged, written to the journal in the transaction of what they tell
of, and shown to readers only then, so that none is told twice or lost. Exits, verdicts and VTL switches are shown at
once and are gone with the process; a reader that comes back is told that it missed some.
"""

from __future__ import annotations

import itertools
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from vmm.event_readers import Reader, Readers
from vtlab.v1 import vmm_pb2
from vtlab.v1.vmm_pb2 import Event, EventKind, EventsLost

# kind -> the field of Event.detail that holds its message
_FIELDS: dict[int, str] = {
    vmm_pb2.EVENT_KIND_STATE: "state",
    vmm_pb2.EVENT_KIND_EXIT: "exit",
    vmm_pb2.EVENT_KIND_VERDICT: "verdict",
    vmm_pb2.EVENT_KIND_SERIAL: "serial",
    vmm_pb2.EVENT_KIND_PROTECTION: "protection",
    vmm_pb2.EVENT_KIND_VTL: "vtl_event",
    vmm_pb2.EVENT_KIND_DEVICE: "device",
    vmm_pb2.EVENT_KIND_USERSPACE_EXIT: "userspace_exit",
}
# kind -> what makes its message from the tuple that was recorded
_BUILDERS: dict[int, Callable[..., Any]] = {
    vmm_pb2.EVENT_KIND_VERDICT: lambda exit_, resolution: vmm_pb2.Verdict(exit=exit_, resolution=resolution),
    vmm_pb2.EVENT_KIND_VTL: lambda what, code: vmm_pb2.VtlEvent(what=what, code=code),
}
# Kinds that are kept in the journal.
LASTING = frozenset(
    {
        vmm_pb2.EVENT_KIND_STATE,
        vmm_pb2.EVENT_KIND_SERIAL,
        vmm_pb2.EVENT_KIND_PROTECTION,
        vmm_pb2.EVENT_KIND_DEVICE,
    }
)
# Entries of the same kind that are kept, and the sum of their weights (bytes or runs; see record).
CAPACITY = 2048
WEIGHT = 4 << 20
# The same where every exit may be wanted.
LARGE_CAPACITY = 1 << 17
LARGE_WEIGHT = 128 << 20
# Seconds after which a waiting reader looks whether its client is still there.
_LOOK = 1.0
# Events, and about so many of their bytes, that a reader takes at once.
BATCH = 256
_BATCH_BYTES = 1 << 20


# What is recorded: sequence, time in ns, vp_index, vtl, enter_sequence, detail, weight, and the Event once it was
# serialized. The detail is the message, or what _BUILDERS makes it from. Anything better than a plain list costs as
# much as all else.
_Record = list[Any]


class Kept(NamedTuple):
    """What the journal holds of a log.

    Attributes:
        events: those of lasting kinds, oldest first.
        dropped: kind -> how many older ones there were, and the number of the last of them.
        lost_before: volatile events with lower numbers are gone.
    """

    events: list[Event]
    dropped: dict[int, tuple[int, int]]
    lost_before: int


class _Ring:
    """The last entries of one kind. `first` is the position of the oldest kept one, counted from the start."""

    def __init__(self, capacity: int, weight: int) -> None:
        self.entries: deque[_Record] = deque()
        self.first = 0
        self.last_dropped = 0
        self._capacity = capacity
        self._weight = weight
        self._used = 0

    def append(self, record: _Record) -> None:
        entries = self.entries
        entries.append(record)
        self._used += record[6]
        while len(entries) > self._capacity or (self._used > self._weight and len(entries) > 1):
            dropped = entries.popleft()
            self._used -= dropped[6]
            self.first += 1
            self.last_dropped = dropped[0]


class EventLog:
    """Events of one machine. Thread-safe.

    Attributes:
        missed: how many events readers were told that they missed.
    """

    def __init__(
        self,
        vm: str,
        numbers: Iterator[int] | None = None,
        capacity: int = CAPACITY,
        weight: int = WEIGHT,
        on_staged: Callable[[], object] | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Makes an empty log, or one that goes on from what was kept.

        Args:
            numbers: gives sequence numbers, shared by the machines of a VMM.
            on_staged: is told that an event waits for publishing(); None: there is no journal, and none waits.
            kept: of an earlier life of the VMM.
        """
        self._vm = vm
        self._on_staged = on_staged
        self._staged: list[tuple[int, tuple[int, int, int, int, Any, int]]] = []
        self._numbers = numbers or itertools.count(1)
        self._lock = threading.Lock()
        self._rings = {kind: _Ring(capacity, weight) for kind in _FIELDS}
        self._readers = Readers(f"events-{vm}", self._lock)
        self._closed = False
        self.missed = 0
        if kept is not None:
            self._restore(kept)

    def _restore(self, kept: Kept) -> None:
        for kind, ring in self._rings.items():
            if kind in LASTING:
                ring.first, ring.last_dropped = kept.dropped.get(kind, (0, 0))
            else:
                ring.first = ring.last_dropped = kept.lost_before
        for event in kept.events:
            kind = event.kind
            detail = getattr(event, _FIELDS[kind])
            if kind in _BUILDERS:
                detail = (detail.what, detail.code)
            self._rings[kind].append(
                [
                    event.sequence,
                    event.time.ToNanoseconds(),
                    event.vp_index,
                    event.vtl,
                    event.enter_sequence,
                    detail,
                    event.ByteSize(),
                    None,
                ]
            )

    def record(
        self,
        kind: EventKind.ValueType,
        detail: object,
        vp_index: int = 0,
        vtl: int = 0,
        enter_sequence: int = 0,
        weight: int = 0,
        lasting: bool = False,
    ) -> None:
        """Adds an event; one that lasts is seen from the next publishing() on.

        Args:
            detail: the message of that kind, not changed afterwards; for VERDICT the pair (exit, resolution), for VTL
                (what, code).
            weight: size of a detail that can be large, so that the log stays bounded in bytes too.
            lasting: it belongs into the journal although its kind does not.
        """
        if self._on_staged is not None and (lasting or kind in LASTING):
            with self._lock:
                self._staged.append((kind, (time.time_ns(), vp_index, vtl, enter_sequence, detail, weight)))
            self._on_staged()
            return
        with self._lock:
            self._rings[kind].append(
                [next(self._numbers), time.time_ns(), vp_index, vtl, enter_sequence, detail, weight, None]
            )
            self._readers.news(kind)

    @property
    def staged(self) -> bool:
        """Events wait for publishing()."""
        return bool(self._staged)

    @contextmanager
    def publishing(self, only: Collection[int] = ()) -> Iterator[list[Event]]:
        """The events that wait, for the block to write down; it ends with their being seen. All others wait for it.

        Args:
            only: kinds; empty means all.
        """
        with self._lock:
            now = [item for item in self._staged if not only or item[0] in only]
            numbered = [(kind, [next(self._numbers), *rest, None]) for kind, rest in now]
            yield [self._build(kind, record) for kind, record in numbered]
            self._staged = [item for item in self._staged if only and item[0] not in only]
            self._show(numbered)

    def _show(self, numbered: Iterable[tuple[int, _Record]]) -> None:
        for kind, record in numbered:
            self._rings[kind].append(record)
            self._readers.news(kind)

    def counts(self) -> dict[int, tuple[int, int]]:
        """By kind: how many events there were, and how many of them are not kept any more."""
        with self._lock:
            return {kind: (ring.first + len(ring.entries), ring.first) for kind, ring in self._rings.items()}

    @property
    def readers(self) -> int:
        """Who watches now."""
        return self._readers.count

    def dropped(self, kind: int) -> tuple[int, int]:
        """How many events of a kind are not kept any more, and the number of the last of them. For publishing()."""
        ring = self._rings[kind]
        return ring.first, ring.last_dropped

    def close(self) -> None:
        """Readers get what there is, then end."""
        with self._lock:
            self._closed = True
        self._readers.close()

    def watch(
        self, from_sequence: int = 0, kinds: Collection[int] = (), active: Callable[[], bool] = lambda: True
    ) -> Iterator[list[bytes]]:
        """Events in order, serialized, from the first number wanted (0: from the oldest kept), for ever.

        A reader that lags behind gets an EventsLost with the exact number of events of its kinds that it missed.

        Args:
            kinds: those wanted; empty means all.
            active: ends the iteration, within a second, once it returns False.

        Yields:
            At least one, at most BATCH of them and an EventsLost.
        """
        wanted = _wanted(kinds)
        reader = Reader(wanted)
        with self._lock:
            positions = {kind: self._position(self._rings[kind], from_sequence) for kind in wanted}
        with self._readers.added(reader):
            while True:
                reader.wake.clear()
                batch, lost, closed, more = self._take(positions)
                if lost:
                    self.missed += lost
                    before = batch[0][1][0] - 1 if batch else 0
                    event = self._event(before, vmm_pb2.EVENT_KIND_LOST, lost=EventsLost(count=lost))
                    yield [event.SerializeToString(), *self._serialized(batch)]
                elif batch:
                    yield self._serialized(batch)
                elif closed or not active():
                    return
                if not (more or closed):
                    reader.wake.wait(_LOOK)

    def batches(self, kinds: Collection[int] = (), from_sequence: int = 0) -> Iterator[list[bytes]]:
        """The events that are kept now, in order, from a number on, as watch() gives them."""
        positions = {kind: self._rings[kind].first for kind in _wanted(kinds)}
        last = max((ring.entries[-1][0] for ring in self._rings.values() if ring.entries), default=0)
        while True:
            batch = self._take(positions)[0]
            wanted = [item for item in batch if from_sequence <= item[1][0] <= last]
            if wanted:
                yield self._serialized(wanted)
            if not batch or batch[-1][1][0] >= last:
                return

    def kept(self, kinds: Collection[int] = (), from_sequence: int = 0) -> list[Event]:
        """The events that are kept now, in order, from a number on."""
        return [Event.FromString(data) for batch in self.batches(kinds, from_sequence) for data in batch]

    @staticmethod
    def _position(ring: _Ring, from_sequence: int) -> int:
        """Where a reader starts in a ring. It may lie before the oldest kept entry: those are then lost to it."""
        if from_sequence == 0 or from_sequence > ring.last_dropped:
            return ring.first + bisect_left(ring.entries, from_sequence, key=itemgetter(0))
        return max(0, ring.first - (ring.last_dropped - from_sequence + 1))

    def _take(self, positions: dict[int, int]) -> tuple[list[tuple[int, _Record]], int, bool, bool]:
        """The oldest of what is new since `positions`, which it advances.

        Returns:
            The records by kind, how many were lost, whether the log is closed, whether there is more.
        """
        found: list[tuple[int, _Record]] = []
        lost = 0
        with self._lock:
            for kind, position in positions.items():
                ring = self._rings[kind]
                lost += max(0, ring.first - position)
                skip = max(0, position - ring.first)
                positions[kind] = ring.first + skip
                if skip < len(ring.entries):
                    found += [(kind, record) for record in itertools.islice(ring.entries, skip, skip + BATCH + 1)]
            closed = self._closed
        found.sort(key=lambda item: item[1][0])
        weight, more = 0, False
        for number, (kind, record) in enumerate(found):
            weight += record[6]
            if number == BATCH or (weight > _BATCH_BYTES and number):
                del found[number:]
                more = True
                break
            positions[kind] += 1
        return found, lost, closed, more

    def _serialized(self, batch: Iterable[tuple[int, _Record]]) -> list[bytes]:
        """Built by the reader that comes first."""
        data = []
        for kind, record in batch:
            event = record[7]
            if event is None:
                event = record[7] = self._build(kind, record).SerializeToString()
            data.append(event)
        return data

    def _build(self, kind: int, record: _Record) -> Event:
        sequence, time_ns, vp_index, vtl, enter_sequence, detail = record[:6]
        build = _BUILDERS.get(kind)
        if build is not None:
            detail = build(*detail)
        event = self._event(sequence, kind, **{_FIELDS[kind]: detail})
        event.time.CopyFrom(Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9))
        event.vp_index, event.vtl, event.enter_sequence = vp_index, vtl, enter_sequence
        return event

    def _event(self, sequence: int, kind: int, **detail: Any) -> Event:
        return Event(sequence=sequence, vm=self._vm, kind=EventKind.Name(kind), **detail)  # type: ignore[arg-type]


def is_complete(event: Event) -> bool:
    """Whether an event from elsewhere is one that a log holds: its kind is known, and its detail is of that kind."""
    return event.kind in _FIELDS and event.WhichOneof("detail") == _FIELDS[event.kind]


def _wanted(kinds: Collection[int]) -> list[int]:
    return [kind for kind in _FIELDS if not kinds or kind in kinds]
