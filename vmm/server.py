"""The VMM as a process."""

from __future__ import annotations

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
from vtlab.trust.certificates import Credentials, load_credentials
from vtlab.trust.roles import Role

# Seconds within which VTL1 must answer an enter.
MONITOR_PATIENCE = 10.0


class Levels:
    """Channels to the guest and the monitor, dialled when a machine first needs them and kept.

    After a rotation of certificates a new machine gets new channels; those of before stay with who has them.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._channels: dict[tuple[Role, Credentials], grpc.Channel] = {}

    def __call__(self, vtl: int, *, present: bool = True) -> RemoteLevel:
        """See vmm.machines.Dial."""
        role, address = ((Role.GUEST, self._config.guest), (Role.MONITOR, self._config.monitor))[vtl]
        if not address:
            raise Unsupported(f"VTL{vtl}", f"this VMM was given no address of a {role}")
        key = role, load_credentials(self._config.trust, Role.VMM)
        if key not in self._channels:
            reach = dial if present else channel_to
            self._channels[key] = reach(address, self._config.trust, Role.VMM, role)
        patience = MONITOR_PATIENCE if vtl else None
        return RemoteLevel(
            self._channels[key], vtl, f"{role} at {address}", patience, restart_budget=self._config.restart_budget
        )

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
