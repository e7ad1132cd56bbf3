"""Streams that go on after a restart, on a channel that their owner closes at the worst instant."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from vtlab.client import calls
from vtlab.client.calls import BackgroundStream, call, stream
from vtlab.errors import Cancelled, VtlabError
from vtlab.status import translated
from vtlab.v1 import vmm_pb2

PATIENCE = 60.0


class Gone(grpc.RpcError):
    """The server died."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Socket closed"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class Broken:
    """A stream that ends with the death of its server."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        yield "an item"
        raise Gone

    def cancel(self) -> None:
        self.cancelled.set()


@pytest.fixture
def channel() -> Iterator[grpc.Channel]:
    with grpc.insecure_channel("unix:/nobody/listens/here") as channel:
        yield channel


class Watched:
    """A BackgroundStream whose first stream breaks, after which `then` happens and a new one is asked for."""

    def __init__(self, channel: grpc.Channel, then: Callable[[Watched], None]) -> None:
        self.broken = Broken()
        self.items: list[str] = []
        self.ends: list[Exception] = []
        self.ended = threading.Event()
        self._channel: Any = channel
        self._then = then
        self._made = threading.Event()
        self.stream = BackgroundStream("vmm", self._begin, dict, self.items.append, self._on_end)
        self._made.set()

    def _begin(self, _request: object) -> Any:
        if not self._made.is_set() and not self.items:
            return self.broken
        self._made.wait()
        try:
            self._then(self)
            return self._channel.unary_stream("/vtlab.v1.VmmService/WatchEvents")(b"")
        finally:
            self.ended.set()

    def _on_end(self, error: Exception) -> None:
        self.ends.append(error)


def test_a_channel_that_is_closed_before_the_new_call_ends_the_stream(channel: grpc.Channel) -> None:
    watched = Watched(channel, lambda _: channel.close())
    assert watched.ended.wait(PATIENCE)
    threads = [thread for thread in threading.enumerate() if thread.name == "watch vmm"]
    for thread in threads:
        thread.join(PATIENCE)
    assert watched.items == ["an item"]
    assert [type(end) for end in watched.ends] == [Cancelled]
    assert str(watched.ends[0]) == "vmm: the channel to it was closed"


def test_who_closes_the_stream_and_then_the_channel_is_told_nothing(channel: grpc.Channel) -> None:
    closers: list[threading.Thread] = []

    def close_both(watched: Watched) -> None:
        closers.append(threading.Thread(target=watched.stream.close))
        closers[0].start()
        assert watched.broken.cancelled.wait(PATIENCE)
        channel.close()

    watched = Watched(channel, close_both)
    assert watched.ended.wait(PATIENCE)
    closers[0].join(PATIENCE)
    watched.stream.close()
    assert watched.ends == []


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Scripted:
    """A stream that lasts so long, gives its items, and ends with the death of its server."""

    def __init__(self, clock: Clock, seconds: float, *items: str) -> None:
        self._clock, self._seconds, self._items = clock, seconds, items

    def __iter__(self) -> Iterator[str]:
        yield from self._items
        self._clock.now += self._seconds
        raise Gone

    def cancel(self) -> None:
        """Nothing is held."""


def watched(monkeypatch: pytest.MonkeyPatch, *script: tuple[float, tuple[str, ...]]) -> tuple[list[str], int]:
    """What came, and how many streams of the script were begun until no more was hoped for."""
    clock, items, ended = Clock(), list[str](), threading.Event()
    monkeypatch.setattr(calls, "time", clock)
    monkeypatch.setattr(calls, "_PAUSE", 0)
    streams = [Scripted(clock, seconds, *what) for seconds, what in script]
    begun: list[Scripted] = []

    def begin(_request: object) -> Scripted:
        if len(begun) < len(streams):
            begun.append(streams[len(begun)])
            return begun[-1]
        return Scripted(clock, 0.9 * calls.RESTART_BUDGET)

    BackgroundStream("vmm", begin, dict, items.append, lambda _error: ended.set())
    assert ended.wait(PATIENCE)
    return items, len(begun)


def test_a_stream_that_was_silent_for_long_goes_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is how long the server is away, not when it last had something to say."""
    silent, away = 100 * calls.RESTART_BUDGET, 0.1
    script = ((silent, ("an item",)), (away, ()), (silent, ()), (away, ()), (away, ("another",)))
    monkeypatch.setattr(calls, "_LASTING", calls.RESTART_BUDGET)
    assert watched(monkeypatch, *script)[0] == ["an item", "another"]


def test_a_server_that_stays_away_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = calls.RESTART_BUDGET / 10
    monkeypatch.setattr(calls, "_LASTING", calls.RESTART_BUDGET)
    items, begun = watched(monkeypatch, (0, ("an item",)), *[(attempt, tuple[str, ...]())] * 100)
    assert items == ["an item"]
    assert 10 <= begun <= 12


def test_calls_on_a_closed_channel_are_cancelled(channel: grpc.Channel) -> None:
    channel.close()
    request = vmm_pb2.GetMachineRequest().SerializeToString()
    attempts: tuple[Callable[[], object], ...] = (
        lambda: call("vmm", channel.unary_unary("/a/b"), request),
        lambda: list(stream("vmm", channel.unary_stream("/a/b"), request)),
        lambda: BackgroundStream("vmm", channel.unary_stream("/a/b"), lambda: request, print, print),
    )
    for attempt in attempts:
        with pytest.raises(Cancelled, match="the channel to it was closed"):
            attempt()


def test_other_values_that_are_wrong_are_no_closed_channel() -> None:
    with pytest.raises(ValueError, match="anything else") as caught, translated("vmm"):
        raise ValueError("anything else")
    assert not isinstance(caught.value, VtlabError)
