"""Processes that do not know yet who they are, so that one which died can be replaced at once.

Python takes most of a restart to import what a server needs. So a laboratory keeps one process that has done that, was
told nothing and holds nothing but the two pipes to this one: fresh from exec, with an address space and hash seed of
its own, no certificate, no memory file, no descriptor of another role. It becomes whoever is needed next.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import multiprocess

from vmm.child import ChildSpec, run
from vmm.supervisor import LocalProcess
from vtlab.errors import PeerUnavailable
from vtlab.process import without_main

# Seconds until a laboratory has a spare: at its start, where many end before they need one, and after one was taken.
AFTER_START, AFTER_DEATH = 5.0, 0.5


class Blank:
    """A process that waits to be told who it is."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        """Args:
        modules: what it imports while it waits.
        """
        context = multiprocess.get_context("spawn")
        orders, self._orders = context.Pipe(duplex=False)
        self._ready, ready = context.Pipe(duplex=False)
        self._process: Any = context.Process(target=run, args=(orders, ready, tuple(modules)), daemon=True)
        with without_main():
            self._process.start()
        orders.close()
        ready.close()

    def become(self, spec: ChildSpec) -> LocalProcess:
        """Tells it. Raises PeerUnavailable if it is gone."""
        try:
            self._orders.send(spec)
        except OSError:
            self.end()
            raise PeerUnavailable(spec.config.role, "its process ended before it was told who it is") from None
        self._orders.close()
        return LocalProcess(self._process, self._ready, spec.log)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._orders.close()
        self._ready.close()


class Spares:
    """Of one laboratory: at most one waits. Thread-safe."""

    def __init__(self, modules: Callable[[], Sequence[str]]) -> None:
        """Args:
        modules: what any of the roles needs, asked when a spare is made.
        """
        self._modules = modules
        self._lock = threading.Lock()
        self._spare: Blank | None = None
        self._closed = False
        self._timer: threading.Timer | None = None

    def take(self) -> Blank:
        """The spare, or a new one that has imported nothing."""
        with self._lock:
            spare, self._spare = self._spare, None
        return spare or Blank()

    def prepare(self, after: float) -> None:
        """Makes one in so many seconds, unless there is one then."""
        with self._lock:
            if self._closed:
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(after, self._make)
            self._timer.daemon = True
            self._timer.start()

    def _make(self) -> None:
        with self._lock:
            if self._spare is None and not self._closed:
                with contextlib.suppress(OSError):  # no process to be had now: the next restart takes longer
                    self._spare = Blank(self._modules())

    def close(self) -> None:
        """Ends what waits; nothing is made from here on."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            spare, self._spare = self._spare, None
        if spare is not None:
            spare.end()
