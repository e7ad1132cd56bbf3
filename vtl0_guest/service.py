"""VcpuService of VTL0: each method only forwards."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from vtl0_guest.session import Guest
from vtlab.v1 import vcpu_pb2, vcpu_pb2_grpc
from vtlab.v1.vcpu_pb2 import Enter


class VcpuService(vcpu_pb2_grpc.VcpuServiceServicer):
    """Answers for one process. Errors are VtlabError; the gate of the server makes statuses of them."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def Attach(self, request: vcpu_pb2.AttachRequest, context: grpc.ServicerContext) -> vcpu_pb2.AttachResponse:
        self._guest.attach(request)
        return vcpu_pb2.AttachResponse()

    def Reconnect(
        self, request: vcpu_pb2.ReconnectRequest, context: grpc.ServicerContext
    ) -> vcpu_pb2.ReconnectResponse:
        return vcpu_pb2.ReconnectResponse(enters=self._guest.reconnect(request.vm, request.generation))

    def Detach(self, request: vcpu_pb2.DetachRequest, context: grpc.ServicerContext) -> vcpu_pb2.DetachResponse:
        self._guest.detach(request.vm)
        return vcpu_pb2.DetachResponse()

    def Run(self, enters: Iterator[Enter], context: grpc.ServicerContext) -> Iterator[bytes]:  # type: ignore[override]
        """Without its envelopes: see vtlab.vcpu_rpc."""
        answer = None
        for enter in enters:
            if answer is None:
                answer = self._guest.stream(enter.vp_index)
            yield answer(enter)

    def Kick(self, request: vcpu_pb2.KickRequest, context: grpc.ServicerContext) -> vcpu_pb2.KickResponse:
        return vcpu_pb2.KickResponse(running=self._guest.kick(request.vp_index, request.sequence))

    def GetState(self, request: vcpu_pb2.GetStateRequest, context: grpc.ServicerContext) -> vcpu_pb2.GetStateResponse:
        return vcpu_pb2.GetStateResponse(state=self._guest.state(request.vp_index))

    def Events(
        self, request: vcpu_pb2.EventsRequest, context: grpc.ServicerContext
    ) -> Iterator[vcpu_pb2.EventsResponse]:
        yield from self._guest.events(context.add_callback)
