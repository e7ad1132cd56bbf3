"""The monitor as a process. It listens on two addresses, for the VMM and for clients; the gate tells them apart."""

from __future__ import annotations

import grpc

from vtl1_monitor.api import load_rules
from vtl1_monitor.metrics import collector
from vtl1_monitor.monitor import Monitor
from vtl1_monitor.quotes import load_quoter
from vtl1_monitor.sealed import SealedStore
from vtl1_monitor.service import MonitorService, VcpuService
from vtlab import logs, vcpu_rpc
from vtlab.channels import ServerConfig, serve
from vtlab.metrics import open_endpoint
from vtlab.process import switch_threads_soon
from vtlab.traced import answering
from vtlab.traces import open_spans
from vtlab.v1 import monitor_pb2_grpc


def main(config: ServerConfig) -> None:
    """Serves until SIGTERM, then wipes VTL1's memory. Raises BadArgument, PeerUnavailable."""
    logs.configure(config.role, config.log_format)
    switch_threads_soon()
    spans = open_spans(config.traces, config.role)
    around = (lambda execute: answering(execute, spans)) if spans is not None else (lambda execute: execute)
    monitor = Monitor(load_rules(config.rules), SealedStore(config.state), load_quoter(config.trust), around)
    monitor.restore()

    def register(server: grpc.Server) -> None:
        vcpu_rpc.add_to_server(VcpuService(monitor), server)
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server(MonitorService(monitor), server)

    server = serve(config, register)
    endpoint = open_endpoint(config.metrics, collector(monitor), config.allow_any_address)
    try:
        server.wait()
    finally:
        if endpoint is not None:
            endpoint.close()
        monitor.close()
        if spans is not None:
            spans.close()
