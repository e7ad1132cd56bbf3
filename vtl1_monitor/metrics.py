"""What a monitor tells Prometheus: read from the machine, its verdicts and the sealed store when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vtl1_monitor.monitor import Monitor
from vtlab.enums import name_of
from vtlab.metrics import Metric
from vtlab.v1 import vcpu_pb2


def collector(monitor: Monitor) -> Callable[[], Iterator[Metric]]:
    """What gives the values of now."""

    def collect() -> Iterator[Metric]:
        seals = Metric("seals_total", "How often something was sealed or wiped in the store, over restarts.")
        seals.set(monitor.seals)
        yield seals
        verdicts = Metric("verdicts_total", "Verdicts on VTL0, by rule and action.", ("vm", "rule", "action"))
        locked = Metric("policy_locked", "1 if nothing but a reset can replace the policy.", ("vm",))
        broken = Metric("vtl1_broken", "1 if VTL1 has given up: every service is refused.", ("vm",))
        machine = monitor.machine
        if machine is not None:
            for (rule, action), count in machine.verdicts.counts().items():
                name = name_of(vcpu_pb2.Action, action).removeprefix("ACTION_").lower()
                verdicts.set(count, machine.vm, rule, name)
            locked.set(float(machine.locked), machine.vm)
            broken.set(float(bool(machine.broken)), machine.vm)
        yield from (verdicts, locked, broken)

    return collect
