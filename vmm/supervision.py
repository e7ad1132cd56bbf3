"""What the process that restarts the others tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vmm.supervisor import Supervisor
from vtlab.metrics import Metric


def collector(supervisor: Supervisor) -> Callable[[], Iterator[Metric]]:
    """What gives the values of now."""

    def collect() -> Iterator[Metric]:
        restarts = Metric("process_restarts_total", "How often a process is back after a death.", ("role",))
        seconds = Metric("process_restart_seconds_total", "From the deaths until they answered again.", ("role",))
        for role in list(supervisor.processes):
            restarts.set(supervisor.restarts(role), role)
            seconds.set(supervisor.away(role), role)
        yield from (restarts, seconds)

    return collect
