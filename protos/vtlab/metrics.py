"""Metrics of a process for Prometheus. Off unless a process is told where to answer.

All of them are read from where the state is when somebody asks; nothing is counted for them alone but exits by kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vtlab.channels import check_address
from vtlab.errors import BadArgument

_log = logging.getLogger(__name__)


@dataclass
class Metric:
    """A family of values.

    Attributes:
        name: without "vtlab_"; that of a counter ends in "_total".
        help: what it says, for people.
        values: by the values of its labels, in their order.
        labels: their names.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict)

    def set(self, value: float, *labels: str | int) -> None:
        """Labels in the order of their names."""
        self.values[tuple(str(label) for label in labels)] = value

    def set_all(self, values: Mapping[Any, float], *labels: str | int) -> None:
        """One value for each key, which is the last label."""
        for key, value in values.items():
            self.set(value, *labels, str(key))


class Endpoint:
    """Answers at http://HOST:PORT/metrics until close()."""

    def __init__(self, address: str, collect: Callable[[], Iterable[Metric]], allow_any_address: bool = False) -> None:
        """Raises BadArgument: the package is missing, or the address is malformed, taken, or not on loopback."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server
            from prometheus_client.gc_collector import GCCollector
            from prometheus_client.platform_collector import PlatformCollector
            from prometheus_client.process_collector import ProcessCollector
        except ImportError as error:
            missing = f"need a package that is missing: pip install 'vtlab[metrics]' ({error})"
            raise BadArgument("metrics", missing) from None
        check_address(address, allow_any_address)
        host, _, port = address.rpartition(":")
        if address.startswith("unix:"):
            raise BadArgument(f"metrics {address!r}", "Prometheus asks by TCP: expected HOST:PORT")
        registry = CollectorRegistry()
        registry.register(_Collector(collect))
        for standard in (ProcessCollector, PlatformCollector, GCCollector):
            standard(registry=registry)
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise BadArgument(f"metrics {address!r}", f"cannot be bound: {error}") from None
        self.address = f"{host}:{self._server.server_port}"
        _log.info("metrics are at http://%s/metrics", self.address)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(1)


class _Collector:
    """What prometheus_client asks for at each scrape."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def describe(self) -> list[Any]:
        return []  # or the values would be asked for at registration, when there may be none

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for metric in self._collect():
            counts = metric.name.endswith("_total")
            family = (CounterMetricFamily if counts else GaugeMetricFamily)(
                f"vtlab_{metric.name}", metric.help, labels=metric.labels
            )
            for labels, value in metric.values.items():
                family.add_metric(labels, value)
            yield family


def open_endpoint(
    address: str, collect: Callable[[], Iterable[Metric]], allow_any_address: bool = False
) -> Endpoint | None:
    """None where nobody may ask. Raises as Endpoint."""
    return Endpoint(address, collect, allow_any_address) if address else None
