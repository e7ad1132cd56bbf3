"""What a VMM tells Prometheus: read from machines, event logs, channels and journal when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from vmm.journal import Journal
from vmm.machine import Machine
from vmm.states import STATES, state_name
from vtlab.metrics import Metric
from vtlab.v1.vmm_pb2 import EventKind

STORES = ("writable", "sealed", "private")


def collector(machines: Callable[[], Iterable[Machine]], journal: Journal) -> Callable[[], Iterator[Metric]]:
    """What gives the values of now."""

    def collect() -> Iterator[Metric]:
        present = list(machines())
        for family in _FAMILIES:
            yield family(present)
        yield _single("journal_transactions_total", "Transactions of the journal.", journal.transactions)
        yield _single("journal_bytes", "Size of the journal without its write-ahead log.", journal.size)

    return collect


def _single(name: str, text: str, value: float) -> Metric:
    metric = Metric(name, text)
    metric.set(value)
    return metric


def _state(machines: Iterable[Machine]) -> Metric:
    metric = Metric("machine_state", "1 for the state that a machine is in.", ("vm", "state"))
    for machine in machines:
        now = machine.describe().state
        metric.set_all({state_name(state).lower(): float(state == now) for state in STATES}, machine.vm)
    return metric


def _generation(machines: Iterable[Machine]) -> Metric:
    metric = Metric("machine_generation", "Counts the resets of a machine from 1.", ("vm",))
    for machine in machines:
        metric.set(machine.describe().generation, machine.vm)
    return metric


def _exits(machines: Iterable[Machine]) -> Metric:
    metric = Metric("exits_total", "Exits that this VMM served, by reason.", ("vm", "reason"))
    for machine in machines:
        metric.set_all({reason: count for reason, count in machine.exits.items() if count}, machine.vm)
    return metric


def _enters(machines: Iterable[Machine]) -> Metric:
    metric = Metric("enters", "Enters of a vCPU at a level since the machine's last reset.", ("vm", "vp", "vtl"))
    for machine in machines:
        for vp_index, counts in enumerate(machine.enters):
            metric.set_all(dict(enumerate(counts)), machine.vm, vp_index)
    return metric


def _pages(machines: Iterable[Machine]) -> Metric:
    metric = Metric("pages", "Pages of RAM by the file that holds them.", ("vm", "store"))
    for machine in machines:
        metric.set_all(dict(zip(STORES, machine.pages, strict=True)), machine.vm)
    return metric


def _events(machines: Iterable[Machine]) -> Metric:
    metric = Metric("events_total", "Events recorded, by kind.", ("vm", "kind"))
    for machine in machines:
        metric.set_all({_kind(kind): count for kind, (count, _) in machine.events.counts().items()}, machine.vm)
    return metric


def _dropped(machines: Iterable[Machine]) -> Metric:
    text = "Events that the log does not keep any more: who had not read them is told."
    metric = Metric("events_dropped_total", text, ("vm", "kind"))
    for machine in machines:
        metric.set_all({_kind(kind): count for kind, (_, count) in machine.events.counts().items()}, machine.vm)
    return metric


def _missed(machines: Iterable[Machine]) -> Metric:
    metric = Metric("events_missed_total", "Events that readers were told they missed, all readers together.", ("vm",))
    for machine in machines:
        metric.set(machine.events.missed, machine.vm)
    return metric


def _readers(machines: Iterable[Machine]) -> Metric:
    metric = Metric("event_readers", "Open streams of events.", ("vm",))
    for machine in machines:
        metric.set(machine.events.readers, machine.vm)
    return metric


def _breaks(machines: Iterable[Machine]) -> Metric:
    metric = Metric("level_breaks_total", "Streams to a level that broke and were taken up again.", ("vm", "vtl"))
    for machine in machines:
        metric.set_all({level.vtl: level.recoveries.count for level in machine.levels()}, machine.vm)
    return metric


def _away(machines: Iterable[Machine]) -> Metric:
    text = "Seconds from the break of a stream to the next exit of its vCPU, all breaks together."
    metric = Metric("level_recovery_seconds_total", text, ("vm", "vtl"))
    for machine in machines:
        metric.set_all({level.vtl: level.recoveries.seconds for level in machine.levels()}, machine.vm)
    return metric


def _longest(machines: Iterable[Machine]) -> Metric:
    metric = Metric("level_recovery_seconds_longest", "The longest of them.", ("vm", "vtl"))
    for machine in machines:
        metric.set_all({level.vtl: level.recoveries.longest for level in machine.levels()}, machine.vm)
    return metric


def _kind(kind: int) -> str:
    return EventKind.Name(kind).removeprefix("EVENT_KIND_").lower()  # type: ignore[arg-type]


_FAMILIES: tuple[Callable[[Iterable[Machine]], Metric], ...] = (
    _state,
    _generation,
    _exits,
    _enters,
    _pages,
    _events,
    _dropped,
    _missed,
    _readers,
    _breaks,
    _away,
    _longest,
)
