"""Calls of any RPC with any certificate, as bytes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import vtlab.v1
from vtlab.client import Lab
from vtlab.status import from_rpc_error
from vtlab.trust.certificates import Credentials, load_credentials, server_name
from vtlab.trust.roles import Role

SERVERS = (Role.VMM, Role.GUEST, Role.MONITOR)
PATIENCE = 30.0


def contract() -> dict[str, MethodDescriptor]:
    """Every RPC of every .proto file of the contract."""
    found: dict[str, MethodDescriptor] = {}
    for module in pkgutil.iter_modules(vtlab.v1.__path__, "vtlab.v1."):
        if module.name.endswith("_pb2"):
            for service in importlib.import_module(module.name).DESCRIPTOR.services_by_name.values():
                found |= methods(service.full_name)
    return found


def methods(service: str) -> dict[str, MethodDescriptor]:
    descriptor = cast(Any, descriptor_pool.Default()).FindServiceByName(service)
    return {f"{service}/{method.name}": method for method in descriptor.methods}


def addresses(lab: Lab) -> dict[Role, str]:
    """Where each of the three listens for whoever may call it."""
    sockets = Path(lab.addresses.vmm.removeprefix("unix:")).parents[1]
    names = ("vmm/clients", "guest/vcpu", "monitor/vcpu")
    return {role: f"unix:{sockets / name}.sock" for role, name in zip(SERVERS, names, strict=True)}


def trust(lab: Lab) -> Path:
    return lab.addresses.trust.parent


def connect(lab: Lab, server: Role, credentials: Credentials) -> grpc.Channel:
    """A channel that did not say anything yet."""
    tls = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
    options = [("grpc.ssl_target_name_override", server_name(server)), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(addresses(lab)[server], tls, options)


def connect_as(lab: Lab, server: Role, role: Role) -> grpc.Channel:
    return connect(lab, server, load_credentials(trust(lab), role))


def served(lab: Lab, server: Role) -> dict[str, MethodDescriptor]:
    """Every RPC of a running server, by its own account."""
    with connect_as(lab, server, Role.OPERATOR) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE))
    names = [service.name for service in answer.list_services_response.service]
    return {rpc: method for name in names for rpc, method in methods(name).items()}


def start(channel: grpc.Channel, rpc: str, method: MethodDescriptor, request: bytes, timeout: float = PATIENCE) -> Any:
    """Begins a call with one request; what is returned is iterated for its answers."""
    shape = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call: Any = getattr(channel, shape)(f"/{rpc}")
    given = iter([request]) if method.client_streaming else request
    if method.server_streaming:
        return call(given, timeout=timeout)
    return call.future(given, timeout=timeout)


def outcome(
    channel: grpc.Channel, rpc: str, method: MethodDescriptor, request: bytes, timeout: float = PATIENCE
) -> Exception | None:
    """How a call ends: None with an answer, else the error that the caller sees."""
    call = start(channel, rpc, method, request, timeout)
    try:
        if method.server_streaming:
            next(cast("Iterator[bytes]", call), None)
        else:
            call.result()
    except grpc.RpcError as error:
        return from_rpc_error(error, rpc)
    finally:
        call.cancel()
    return None
