"""Calls with a deadline, whose failures are the exceptions of vtlab.errors, and streams that go on after a restart.

A server that dies is restarted and knows what it knew. A call that never reached it is therefore repeated, within a
budget, and one that broke off too if it may be done twice. If it may not, it is an error: nobody can tell whether it
was done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import tenacity

from vtlab.errors import Cancelled, PeerUnavailable, VtlabError
from vtlab.status import never_sent, translated

DEADLINE = 30.0  # seconds; every unary call of the contract answers far sooner or is lost
RESTART_BUDGET = 60.0  # seconds that a server may be away; a VMM that is back waits for its levels meanwhile
_PAUSE = 0.02  # seconds between attempts of a stream to go on
_LASTING = 5.0  # seconds that no attempt takes whose server is away: a stream that lasted so long was served

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
    return _when_back(lambda: _once(peer, method, request, deadline), never_sent)


def _once(peer: str, method: Callable[..., Answer], request: Any, deadline: float) -> Answer:
    with translated(peer):
        return method(request, timeout=deadline)


def repeated(peer: str, method: Callable[..., Answer], request: Any, deadline: float = DEADLINE) -> Answer:
    """call() of what may be done twice: repeated while the server is being restarted."""
    return _when_back(lambda: _once(peer, method, request, deadline), lambda error: isinstance(error, PeerUnavailable))


def _when_back(act: Callable[[], Answer], again: Callable[[BaseException], bool]) -> Answer:
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_delay(RESTART_BUDGET),
        wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.25),
        retry=tenacity.retry_if_exception(again),
        reraise=True,
    )
    return attempts(act)


def stream(peer: str, method: Callable[..., Stream[Answer]], request: Any) -> Iterator[Answer]:
    """Answers until the server ends, the caller closes the iterator, or an error."""
    with translated(peer):
        answers = method(request)
        try:
            yield from answers
        finally:
            answers.cancel()


class BackgroundStream:
    """A stream that a thread of its own reads, and that goes on when its server was restarted."""

    def __init__(
        self,
        peer: str,
        method: Callable[..., Stream[Any]],
        request: Callable[[], Any],
        on_item: Callable[[Any], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        """Args:
        request: makes the request from where the stream is to go on.
        on_end: is told why no more will come, unless that is close().
        """
        self._peer = peer
        self._begin: Callable[[], Stream[Any]] = lambda: method(request())
        with translated(peer):
            self._answers = self._begin()
        self._closed = threading.Event()
        self._heard = float("-inf")
        self._thread = threading.Thread(target=self._read, args=(on_item, on_end), name=f"watch {peer}", daemon=True)
        self._thread.start()

    def _read(self, on_item: Callable[[Any], None], on_end: Callable[[Exception], None]) -> None:
        failure = self._take(on_item)
        away_since = time.monotonic()
        while isinstance(failure, PeerUnavailable) and time.monotonic() < away_since + RESTART_BUDGET:
            if self._closed.wait(_PAUSE):
                return
            begun = time.monotonic()
            failure = self._again() or self._take(on_item)
            if self._heard > begun or time.monotonic() > begun + _LASTING:
                away_since = time.monotonic()  # it had been back, and is away again
        if not self._closed.is_set():
            on_end(failure)

    def _take(self, on_item: Callable[[Any], None]) -> VtlabError:
        """Reads to the end; returns why it came."""
        try:
            with translated(self._peer):
                for answer in self._answers:
                    on_item(answer)
                    self._heard = time.monotonic()
        except VtlabError as error:
            return error
        return Cancelled(self._peer, "ended the stream")

    def _again(self) -> VtlabError | None:
        """Begins anew; returns why that cannot be."""
        try:
            with translated(self._peer):
                self._answers = self._begin()
        except VtlabError as error:
            return error
        if self._closed.is_set():  # close() may have cancelled the one before
            self._answers.cancel()
        return None

    def close(self) -> None:
        """Ends it and waits for its thread, unless it is that thread that closes."""
        self._closed.set()
        self._answers.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
