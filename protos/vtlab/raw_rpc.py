"""Services on a server as the generated code adds them, but that some RPCs take or give bytes in place of messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class _Handlers:
    """Stands in for the server while the generated code adds its handlers."""

    def __init__(self) -> None:
        self.by_service: dict[str, dict[str, Handler]] = {}

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """The same handlers, by another way."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.by_service[service] = handlers


def add_to_server(
    server: grpc.Server, service: str, generated: Callable[[grpc.Server], None], replaced: Mapping[str, Handler]
) -> None:
    """Adds a service.

    Args:
        service: its full name.
        generated: adds it to a server, as add_…Servicer_to_server does.
        replaced: handlers that take the place of the generated ones, by RPC.
    """
    handlers = _Handlers()
    generated(cast(grpc.Server, handlers))
    by_name = handlers.by_service[service] | dict(replaced)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, by_name),))
    cast(Any, server).add_registered_method_handlers(service, by_name)  # as the generated code does
