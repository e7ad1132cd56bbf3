"""Errors as gRPC statuses, one table in both directions.

A refused call carries a google.rpc.Status whose detail is a google.rpc.ErrorInfo with our domain, a reason (one per
error type) and the error's fields as metadata, so that the caller gets the same exception back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from vtlab import errors

DOMAIN = "vtlab"

# error type -> (status code, ErrorInfo.reason). Reasons are unique; codes are what a caller without our types sees.
TABLE: dict[type[errors.VtlabError], tuple[grpc.StatusCode, str]] = {
    errors.BadArgument: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARGUMENT"),
    errors.BadImage: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_IMAGE"),
    errors.BadPolicy: (grpc.StatusCode.INVALID_ARGUMENT, "BAD_POLICY"),
    errors.WrongState: (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE"),
    errors.NotFound: (grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    errors.AlreadyExists: (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS"),
    errors.PermissionDenied: (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.Refused: (grpc.StatusCode.PERMISSION_DENIED, "REFUSED"),
    errors.PeerUnavailable: (grpc.StatusCode.UNAVAILABLE, "PEER_UNAVAILABLE"),
    errors.TimedOut: (grpc.StatusCode.DEADLINE_EXCEEDED, "TIMED_OUT"),
    errors.GuestMisbehaved: (grpc.StatusCode.INTERNAL, "GUEST_MISBEHAVED"),
    errors.GuestLost: (grpc.StatusCode.INTERNAL, "GUEST_LOST"),
    errors.LimitExceeded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED"),
    errors.Conflict: (grpc.StatusCode.ABORTED, "CONFLICT"),
    errors.Unsupported: (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED"),
    errors.Cancelled: (grpc.StatusCode.CANCELLED, "CANCELLED"),
    errors.InternalError: (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR"),
}
TYPE_OF_REASON = {reason: kind for kind, (_, reason) in TABLE.items()}

# What a status without our ErrorInfo means: gRPC itself, or something between, made it.
TYPE_OF_BARE_CODE: dict[grpc.StatusCode, type[errors.VtlabError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.PeerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.TimedOut,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unsupported,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.LimitExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: errors.BadArgument,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.PermissionDenied,
}


# Characters of a field that travel: a status rides in HTTP/2 trailers, which gRPC bounds to 8 KiB.
FIELD_LIMIT = 800


def _clip(text: str) -> str:
    """What a protobuf string can hold, and not too much of it; names of files may hold bytes that are no text."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= FIELD_LIMIT else text[: FIELD_LIMIT - 1] + "…"


def _row(error: errors.VtlabError) -> tuple[grpc.StatusCode, str]:
    for kind in type(error).__mro__:
        if issubclass(kind, errors.VtlabError) and kind in TABLE:
            return TABLE[kind]
    return TABLE[errors.InternalError]


def to_status(error: errors.VtlabError) -> status_pb2.Status:
    """The status that carries the error. A subclass without a row travels as its nearest base that has one."""
    code, reason = _row(error)
    number: int = code.value[0]
    fields = {name: _clip(value) for name, value in error.fields().items()}
    status = status_pb2.Status(code=number, message=_clip(str(error)))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=fields))
    return status


def from_rpc_error(error: grpc.RpcError, peer: str) -> errors.VtlabError:
    """The exception that a failed call means.

    Args:
        error: as raised by a stub or a stream.
        peer: who was called, "vmm at unix:/run/vmm.sock": the subject where the status itself names none.
    """
    if not hasattr(error, "code"):
        return errors.InternalError(peer, repr(error))
    call = cast("grpc.Call", error)
    info = _error_info(call)
    if info is not None and info.reason in TYPE_OF_REASON:
        return TYPE_OF_REASON[info.reason].from_fields(info.metadata)
    code = call.code()
    kind = TYPE_OF_BARE_CODE.get(code, errors.InternalError)
    details = call.details() or code.name.lower().replace("_", " ")
    return kind(peer, _cause(details) if kind is errors.PeerUnavailable else details)


# In gRPC's account of a failed connection -> what it comes to, for people. The account itself nests and repeats.
_CAUSES = {
    "No such file or directory": "no such socket",
    "Connection refused": "connection refused",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of this laboratory",
    "Hostname Verification Check failed": "its certificate is for another role",
    "peer cert": "its certificate is for another role",
    "Socket closed": "went away in the middle of a call",
    "recvmsg": "went away in the middle of a call",
    "Connection reset": "went away in the middle of a call",
    "GOAWAY": "is shutting down",
    "Stream removed": "went away in the middle of a call",
}

# How gRPC's words begin where a call is made on a closed channel.
_CLOSED = "Cannot invoke RPC"

# Causes that say that the server never saw the call.
_NOT_SENT = frozenset({"no such socket", "connection refused"})


def never_sent(error: BaseException) -> bool:
    """True if a call failed before its server saw it, so that repeating it does nothing twice."""
    return isinstance(error, errors.PeerUnavailable) and error.detail in _NOT_SENT


def _cause(details: str) -> str:
    return next((text for mark, text in _CAUSES.items() if mark in details), details)


def _error_info(call: grpc.Call) -> error_details_pb2.ErrorInfo | None:
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the peer's code and details contradict one another
        return None
    if status is None:
        return None
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            return info
    return None


@contextmanager
def translated(peer: str) -> Iterator[None]:
    """Calls made inside raise VtlabError instead of grpc.RpcError; Cancelled if the channel is closed by its owner.

    A call that begins on a closed channel is no RpcError but a ValueError, which threads must be ready for: the owner
    may close it at any instant.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer) from None
    except ValueError as error:
        if not str(error).startswith(_CLOSED):
            raise
        raise errors.Cancelled(peer, "the channel to it was closed") from None


def abort(context: grpc.ServicerContext, error: errors.VtlabError) -> NoReturn:
    """Ends a call of a server with the error."""
    context.abort_with_status(rpc_status.to_status(to_status(error)))
