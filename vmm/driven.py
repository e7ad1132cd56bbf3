"""A stream whose vCPU is served by the thread that sends.

gRPC sends the requests of a stream from a thread of its own, which takes them from an iterator. Handing it each enter
from another thread costs a change of threads an exit, more than all that the VMM does with it. So the iterator itself
waits for the exit, has it served and gives the next enter, while the thread that owns the vCPU waits for the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import grpc

from vtlab.errors import PeerUnavailable


class DrivenStream:
    """Enters and exits of one vCPU as bytes, from a first enter until nothing follows an exit, or the stream breaks."""

    def __init__(
        self,
        run: grpc.StreamStreamMultiCallable[bytes, bytes],
        first: bytes,
        answer: Callable[[bytes], bytes | None],
    ) -> None:
        """`answer` makes the next enter of an exit, None if there is none; what it raises comes out of wait()."""
        self._answer = answer
        self._open: bytes | None = first  # the enter that is not answered yet
        self._sent = False
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._busy = False  # the sending thread is in __next__, and will notice by itself that the call is over
        self._ended = False
        with self._lock:  # that thread starts at once
            self._call = cast(Any, run(self))  # an iterator, a Call and a Future at once
        self._call.add_done_callback(self._on_end)

    def wait(self) -> bytes | None:
        """Returns when the stream is over: the enter that was not answered, or None. Raises what `answer` raised."""
        self._over.wait()
        if self._error is not None:
            raise self._error
        return self._open

    @property
    def failure(self) -> grpc.RpcError | PeerUnavailable:
        """Why the stream is over although an enter was not answered."""
        if self._call.code() is grpc.StatusCode.OK:
            return PeerUnavailable("stream", "ended by the peer")
        return cast(grpc.RpcError, self._call)

    def close(self) -> None:
        self._call.cancel()

    def __iter__(self) -> DrivenStream:
        return self

    def __next__(self) -> bytes:
        with self._lock:
            if self._ended:
                raise StopIteration
            self._busy = True
        if self._sent:
            try:
                exit_ = next(self._call)
            except (grpc.RpcError, StopIteration):
                self._ended = True
            else:
                self._open = None
                try:
                    self._open = self._answer(exit_)
                except BaseException as error:  # noqa: BLE001 - belongs to the thread that waits
                    self._error = error
        self._sent = True
        with self._lock:
            self._busy = False
            if self._open is not None and not self._ended:
                return self._open
            self._ended = True
        self._over.set()
        raise StopIteration

    def _on_end(self, _call: object) -> None:
        """The call is over. The sending thread may never come back to learn it."""
        with self._lock:
            self._ended = True
            if self._busy:
                return
        self._over.set()
