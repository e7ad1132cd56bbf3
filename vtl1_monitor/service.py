"""VcpuService for the VMM and MonitorService for clients: forwarding, nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc

from vtl1_monitor.monitor import Monitor
from vtlab.v1 import monitor_pb2, monitor_pb2_grpc, vcpu_pb2, vcpu_pb2_grpc
from vtlab.v1.vcpu_pb2 import Enter


def _ended(context: grpc.ServicerContext) -> threading.Event:
    """An event that is set when the call is over."""
    event = threading.Event()
    if not context.add_callback(event.set):
        event.set()
    return event


class VcpuService(vcpu_pb2_grpc.VcpuServiceServicer):
    """VTL1 as a processor that is entered and exits."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def Attach(self, request: vcpu_pb2.AttachRequest, context: grpc.ServicerContext) -> vcpu_pb2.AttachResponse:
        self._monitor.attach(request)
        return vcpu_pb2.AttachResponse(reference=self._monitor.reference())

    def Reconnect(
        self, request: vcpu_pb2.ReconnectRequest, context: grpc.ServicerContext
    ) -> vcpu_pb2.ReconnectResponse:
        return vcpu_pb2.ReconnectResponse(enters=self._monitor.reconnect(request.vm, request.generation))

    def Detach(self, request: vcpu_pb2.DetachRequest, context: grpc.ServicerContext) -> vcpu_pb2.DetachResponse:
        self._monitor.detach(request.vm, reset=request.reset)
        return vcpu_pb2.DetachResponse()

    def Run(self, enters: Iterator[Enter], context: grpc.ServicerContext) -> Iterator[bytes]:  # type: ignore[override]
        """Without its envelopes: see vtlab.vcpu_rpc."""
        return map(self._monitor.run, enters)

    def Kick(self, request: vcpu_pb2.KickRequest, context: grpc.ServicerContext) -> vcpu_pb2.KickResponse:
        return vcpu_pb2.KickResponse(running=self._monitor.kick(request.vp_index, request.sequence))

    def GetState(self, request: vcpu_pb2.GetStateRequest, context: grpc.ServicerContext) -> vcpu_pb2.GetStateResponse:
        return vcpu_pb2.GetStateResponse(state=self._monitor.state(request.vp_index))

    def Events(
        self, request: vcpu_pb2.EventsRequest, context: grpc.ServicerContext
    ) -> Iterator[vcpu_pb2.EventsResponse]:
        yield from self._monitor.events(context.add_callback)


class MonitorService(monitor_pb2_grpc.MonitorServiceServicer):
    """The policy, for its operator."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def GetPolicy(
        self, request: monitor_pb2.GetPolicyRequest, context: grpc.ServicerContext
    ) -> monitor_pb2.GetPolicyResponse:
        return monitor_pb2.GetPolicyResponse(policy=self._monitor.policy(request.vm))

    def SetPolicy(
        self, request: monitor_pb2.SetPolicyRequest, context: grpc.ServicerContext
    ) -> monitor_pb2.SetPolicyResponse:
        policy = self._monitor.set_policy(request.vm, request.text, request.file_name)
        return monitor_pb2.SetPolicyResponse(policy=policy)

    def LockPolicy(
        self, request: monitor_pb2.LockPolicyRequest, context: grpc.ServicerContext
    ) -> monitor_pb2.LockPolicyResponse:
        return monitor_pb2.LockPolicyResponse(policy=self._monitor.lock_policy(request.vm))

    def CheckPolicy(
        self, request: monitor_pb2.CheckPolicyRequest, context: grpc.ServicerContext
    ) -> monitor_pb2.CheckPolicyResponse:
        return self._monitor.check_policy(request.vm, request.text, request.file_name)

    def GetQuote(
        self, request: monitor_pb2.GetQuoteRequest, context: grpc.ServicerContext
    ) -> monitor_pb2.GetQuoteResponse:
        return monitor_pb2.GetQuoteResponse(quote=self._monitor.quote(request.vm, request.nonce))

    def WatchVerdicts(
        self, request: monitor_pb2.WatchVerdictsRequest, context: grpc.ServicerContext
    ) -> Iterator[monitor_pb2.WatchVerdictsResponse]:
        if request.until_now:
            yield from self._monitor.verdicts_so_far(request.vm)
        else:
            yield from self._monitor.verdicts(request.vm, _ended(context))
