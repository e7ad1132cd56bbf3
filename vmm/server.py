"""The VMM as a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import grpc

from vmm.journal import Journal
from vmm.machines import Machines
from vmm.metrics import collector
from vmm.peers import RemoteLevel
from vmm.service import VmmService, add_to_server
from vmm.tracing import SwitchTracer
from vtlab import logs
from vtlab.channels import ServerConfig, channel_to, dial, serve
from vtlab.errors import Unsupported
from vtlab.metrics import open_endpoint
from vtlab.traces import open_spans
from vtlab.trust import servers
from vtlab.trust.certificates import Credentials, load_credentials
from vtlab.trust.roles import Role

# Seconds within which VTL1 must answer an enter.
MONITOR_PATIENCE = 10.0


class Levels:
    """Channels to the guest and the monitor, dialled when a machine first needs them and kept.

    Where certificates were replaced or revoked since, who connects again gets new channels; connections of before stay.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._channels: dict[tuple[Role, Credentials, bytes], grpc.Channel] = {}

    def __call__(self, vtl: int, *, present: bool = True) -> RemoteLevel:
        """See vmm.machines.Dial."""
        role, address = ((Role.GUEST, self._config.guest), (Role.MONITOR, self._config.monitor))[vtl]
        if not address:
            raise Unsupported(f"VTL{vtl}", f"this VMM was given no address of a {role}")
        return RemoteLevel(
            self._channel(role, address, dial if present else channel_to),
            vtl,
            f"{role} at {address}",
            MONITOR_PATIENCE if vtl else None,
            self._config.restart_budget,
            partial(self._channel, role, address, channel_to),
        )

    def _channel(self, role: Role, address: str, reach: Callable[..., grpc.Channel]) -> grpc.Channel:
        """Raises PeerUnavailable."""
        trust = self._config.trust
        key = role, load_credentials(trust, Role.VMM), servers.roots(trust, Role.VMM)
        if key not in self._channels:
            self._channels[key] = reach(address, trust, Role.VMM, role)
        return self._channels[key]

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


def main(config: ServerConfig) -> None:
    """Serves until SIGTERM; then every machine is stopped between two exits and left for the next VMM."""
    logs.configure(config.role, config.log_format)
    levels = Levels(config)
    journal = Journal(config.state / "journal.sqlite")
    spans = open_spans(config.traces, config.role)
    machines = Machines(config.state, levels, journal, SwitchTracer(spans) if spans else None)
    machines.revive()
    server = serve(config, partial(add_to_server, VmmService(machines)))
    endpoint = open_endpoint(config.metrics, collector(machines.all, journal), config.allow_any_address)
    try:
        server.wait()
    finally:
        if endpoint is not None:
            endpoint.close()
        machines.drain()
        levels.close()
        journal.close()
        if spans is not None:
            spans.close()
