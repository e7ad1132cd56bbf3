"""The gate of every server: who calls, whether the table lets them, and errors as statuses.

The role comes from the certificate that TLS verified, never from what the caller says. What it sends is not parsed
before it is known that it may call.
"""

from __future__ import annotations

import base64
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from vtlab.errors import BadArgument, InternalError, LimitExceeded, PermissionDenied, VtlabError
from vtlab.status import abort
from vtlab.trust.certificates import URI_PREFIX
from vtlab.trust.revocation import Revocations
from vtlab.trust.roles import Role, may_call

_log = logging.getLogger(__name__)

_URI_TAG = 0x86  # uniformResourceIdentifier of a GeneralName (RFC 5280), before length and characters


def role_of_peer(auth_context: Mapping[str, Iterable[bytes]]) -> Role | None:
    """The role that the verified certificate names; None unless it names exactly one that we know."""
    names = {uri.decode("utf-8", "replace") for uri in auth_context.get("peer_uri", ())}
    roles = {name.removeprefix(URI_PREFIX) for name in names if name.startswith(URI_PREFIX)}
    if len(roles) != 1:
        return None
    try:
        return Role(roles.pop())
    except ValueError:
        return None


# Streams of events or verdicts that clients may hold open at one server. Each takes a worker; the rest is for commands.
MAX_CLIENT_STREAMS = 96
_CLIENTS = frozenset({Role.OPERATOR, Role.OBSERVER})


class Gate(grpc.ServerInterceptor):
    """Wraps every handler of a server."""

    def __init__(self, server: Role, revocations: Revocations, max_client_streams: int = MAX_CLIENT_STREAMS) -> None:
        self._max_client_streams = max_client_streams
        self._client_streams = 0
        self._lock = threading.Lock()
        self._server = server
        self._revocations = revocations
        self._swept = revocations.identity()
        self._streams: dict[Any, bytes] = {}  # open calls that answer with a stream -> the caller's certificate

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        rpc = handler_call_details.method.removeprefix("/")
        behaviour, make = _SHAPES[handler.request_streaming, handler.response_streaming]
        guard = self._stream if handler.response_streaming else self._unary
        parse = _parser(rpc, handler.request_deserializer, handler.request_streaming)
        return make(
            guard(rpc, getattr(handler, behaviour), parse),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    def _authorise(self, rpc: str, context: grpc.ServicerContext) -> Role | None:
        caller = role_of_peer(cast("Mapping[str, Iterable[bytes]]", context.auth_context()))
        if caller is not None and not _names(_certificate(context), caller):
            caller = None
        if not may_call(rpc, caller, self._server):
            raise PermissionDenied(f"role {caller or 'unknown'}", f"may not call {rpc} of the {self._server}")
        self._revocations.check(_certificate(context))
        return caller

    @contextmanager
    def _counted(self, caller: Role | None) -> Iterator[None]:
        """One stream more within the block. Raises LimitExceeded."""
        if caller not in _CLIENTS:
            yield
            return
        with self._lock:
            if self._client_streams >= self._max_client_streams:
                most = self._max_client_streams
                detail = f"clients hold {most} streams open already, which is the most; end one first"
                raise LimitExceeded(str(self._server), detail, limit=most)
            self._client_streams += 1
        try:
            yield
        finally:
            with self._lock:
                self._client_streams -= 1

    def end_revoked(self) -> None:
        """Ends the open streams of callers whose certificate was taken back since they were let in."""
        identity = self._revocations.identity()
        if identity == self._swept:
            return
        self._swept = identity
        for context, certificate in list(self._streams.items()):
            try:
                self._revocations.check(certificate)
            except PermissionDenied as error:
                _log.warning("%s: its stream is ended", error)
                context.cancel()

    def _unary(
        self, rpc: str, behaviour: Callable[[Any, grpc.ServicerContext], Any], parse: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                self._authorise(rpc, context)
                return behaviour(parse(request), context)
            except Exception as error:
                self._fail(rpc, context, error)
                raise

        return call

    def _stream(
        self, rpc: str, behaviour: Callable[[Any, grpc.ServicerContext], Any], parse: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self._streams[context] = _certificate(context)
            try:
                with self._counted(self._authorise(rpc, context)):
                    yield from behaviour(parse(request), context)
            except Exception as error:
                self._fail(rpc, context, error)
                raise
            finally:
                del self._streams[context]

        return call

    def _fail(self, rpc: str, context: Any, error: Exception) -> None:
        """Ends the call with the error, unless the handler had ended it itself or the caller is gone."""
        if context.code() is not None or not context.is_active():
            return
        if isinstance(error, VtlabError):
            abort(context, error)
        _log.error("%s failed", rpc, exc_info=error)
        abort(context, InternalError(f"{self._server}: {rpc}", f"{type(error).__name__}: {error}"))


def _certificate(context: grpc.ServicerContext) -> bytes:
    """What TLS verified of the caller, PEM."""
    found = cast("Mapping[str, Iterable[bytes]]", context.auth_context()).get("x509_pem_cert", ())
    return next(iter(found), b"")


@functools.lru_cache(256)
def _names(certificate: bytes, role: Role) -> bool:
    """Whether the role's URI stands in the certificate (PEM) as it is: what gRPC tells of a URI ends at a NUL."""
    uri = f"{URI_PREFIX}{role}".encode()
    lines = [line for line in certificate.splitlines() if not line.startswith(b"-----")]
    return bytes((_URI_TAG, len(uri))) + uri in base64.b64decode(b"".join(lines))


def _parser(rpc: str, deserializer: Callable[[bytes], Any] | None, streaming: bool) -> Callable[[Any], Any]:
    """From what arrives, bytes or an iterator of them, to what the handler takes. Raises BadArgument for no message."""
    if deserializer is None:
        return lambda request: request

    def parse(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            raise BadArgument(f"request of {rpc}", f"is no such message: {error}") from None

    return (lambda requests: map(parse, requests)) if streaming else parse


# (request streaming, response streaming) -> name of the handler's function, what makes such a handler
_SHAPES: dict[tuple[bool, bool], tuple[str, Callable[..., grpc.RpcMethodHandler[Any, Any]]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
