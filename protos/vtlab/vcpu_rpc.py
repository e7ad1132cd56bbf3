"""VcpuService on a server: as generated, but that Run takes Enters and gives serialized Exits (vtlab.run_messages)."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import grpc

from vtlab import raw_rpc
from vtlab.run_messages import framed
from vtlab.v1 import vcpu_pb2, vcpu_pb2_grpc

NAME = vcpu_pb2.DESCRIPTOR.services_by_name["VcpuService"].full_name


def _enter(data: bytes) -> vcpu_pb2.Enter:
    return vcpu_pb2.RunRequest.FromString(data).enter


def add_to_server(servicer: vcpu_pb2_grpc.VcpuServiceServicer, server: grpc.Server) -> None:
    """Adds the service; the servicer's Run makes an Iterator[Enter] an Iterator[bytes]."""
    run: raw_rpc.Handler = grpc.stream_stream_rpc_method_handler(
        cast(Any, servicer.Run), request_deserializer=_enter, response_serializer=framed
    )
    generated = partial(vcpu_pb2_grpc.add_VcpuServiceServicer_to_server, servicer)
    raw_rpc.add_to_server(server, NAME, generated, {"Run": run})
