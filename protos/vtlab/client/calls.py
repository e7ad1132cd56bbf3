"""Calls with a deadline, whose failures are the exceptions of vtlab.errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import grpc

from vtlab.errors import Cancelled
from vtlab.status import from_rpc_error

DEADLINE = 30.0  # seconds; every unary call of the contract answers far sooner or is lost

Answer = TypeVar("Answer")
Item_co = TypeVar("Item_co", covariant=True)


class Stream(Protocol[Item_co]):
    """A stream of answers as gRPC gives it."""

    def __iter__(self) -> Iterator[Item_co]: ...
    def cancel(self) -> Any: ...


def call(peer: str, method: Callable[..., Answer], request: Any, deadline: float = DEADLINE) -> Answer:
    """One answer.

    Args:
        peer: for errors, "vmm at unix:/run/vmm.sock".
        method: of a stub.
        request: its request, or an iterator of them.
        deadline: seconds.
    """
    try:
        return method(request, timeout=deadline)
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer) from None


def stream(peer: str, method: Callable[..., Stream[Answer]], request: Any) -> Iterator[Answer]:
    """Answers until the server ends, the caller closes the iterator, or an error."""
    answers = method(request)
    try:
        yield from answers
    except grpc.RpcError as error:
        raise from_rpc_error(error, peer) from None
    finally:
        answers.cancel()


class BackgroundStream:
    """A stream that a thread of its own reads.

    Attributes:
        error: why it ended, once it has; None while it runs or after close().
    """

    def __init__(
        self,
        peer: str,
        method: Callable[..., Stream[Any]],
        request: Any,
        on_item: Callable[[Any], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        self._answers = method(request)
        self._closed = False
        self._thread = threading.Thread(
            target=self._read, args=(peer, on_item, on_end), name=f"watch {peer}", daemon=True
        )
        self._thread.start()

    def _read(self, peer: str, on_item: Callable[[Any], None], on_end: Callable[[Exception], None]) -> None:
        try:
            for answer in self._answers:
                on_item(answer)
        except grpc.RpcError as error:
            if not self._closed:
                on_end(from_rpc_error(error, peer))
            return
        on_end(Cancelled(peer, "ended the stream"))

    def close(self) -> None:
        """Ends it and waits for its thread, unless it is that thread that closes."""
        self._closed = True
        self._answers.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
