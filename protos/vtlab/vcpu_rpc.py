"""VcpuService on a server: as generated, but that Run takes Enters and gives serialized Exits (vtlab.run_messages)."""

from __future__ import annotations

from typing import Any, cast

import grpc

from vtlab.run_messages import framed
from vtlab.v1 import vcpu_pb2, vcpu_pb2_grpc

NAME = vcpu_pb2.DESCRIPTOR.services_by_name["VcpuService"].full_name


def _enter(data: bytes) -> vcpu_pb2.Enter:
    return vcpu_pb2.RunRequest.FromString(data).enter


class _Handlers:
    """Stands in for the server while the generated code adds its handlers."""

    def __init__(self) -> None:
        self.by_service: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """The same handlers, by another way."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.by_service[service] = handlers


def add_to_server(servicer: vcpu_pb2_grpc.VcpuServiceServicer, server: grpc.Server) -> None:
    """Adds the service; the servicer's Run makes an Iterator[Enter] an Iterator[bytes]."""
    handlers = _Handlers()
    vcpu_pb2_grpc.add_VcpuServiceServicer_to_server(servicer, cast(grpc.Server, handlers))
    run: grpc.RpcMethodHandler[vcpu_pb2.Enter, bytes] = grpc.stream_stream_rpc_method_handler(
        cast(Any, servicer.Run), request_deserializer=_enter, response_serializer=framed
    )
    by_name = handlers.by_service[NAME] | {"Run": run}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, by_name),))
    cast(Any, server).add_registered_method_handlers(NAME, by_name)  # as the generated code does
