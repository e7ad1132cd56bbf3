"""Restarts the processes of a local laboratory when they die, each with its own state, sockets and certificates.

What a process must know of its former life it finds by itself (vmm.journal, vtl1_monitor.sealed). A process that dies
again and again is not restarted for ever: the circuit opens and the laboratory is over, with a reason.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import tenacity

from vtlab.errors import PeerUnavailable, VtlabError, one_line
from vtlab.trust.roles import Role

_log = logging.getLogger(__name__)

# Seconds between the end of a process, as its sentinel tells it, and its exit code.
DYING = 5.0


@dataclass(frozen=True)
class LocalProcess:
    """One of the three.

    Attributes:
        process: handle of multiprocess.
        ready: receiving end of the pipe on which it reports its addresses.
        log: its output; None if it shares ours.
    """

    process: Any
    ready: Any
    log: Path | None

    def last_words(self) -> str:
        """Last line of its log, to say why it ended."""
        if self.log is None or not self.log.exists():
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return one_line(lines[-1])[:400] if lines else ""


@dataclass(frozen=True)
class Budget:
    """How often is too often.

    Attributes:
        deaths: of one role within `seconds` that end the laboratory.
        attempts: to start a process that ends before it answers.
    """

    deaths: int = 6
    seconds: float = 20.0
    attempts: int = 3


DEFAULT_BUDGET = Budget()


class Supervisor:
    """Watches the processes until close(). Thread-safe.

    Attributes:
        processes: the present ones, by role; a restart replaces the entry.
        failure: why the laboratory is over; None while it is not.
    """

    def __init__(
        self,
        processes: dict[Role, LocalProcess],
        start: Callable[[Role], LocalProcess],
        await_ready: Callable[[Role, LocalProcess], object],
        budget: Budget,
    ) -> None:
        """Args:
        start: makes a new process of that role.
        await_ready: returns once it answers. Raises VtlabError if it ends, or is late.
        """
        self.processes = processes
        self.failure: PeerUnavailable | None = None
        self._start = start
        self._await_ready = await_ready
        self._budget = budget
        self._deaths: dict[Role, deque[float]] = {role: deque(maxlen=budget.deaths) for role in processes}
        self._changed = threading.Condition()
        self._restarts = dict.fromkeys(processes, 0)
        self._away = dict.fromkeys(processes, 0.0)
        self._closing = False
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def restarts(self, role: Role) -> int:
        """How often a process of that role is back after a death."""
        return self._restarts[role]

    def away(self, role: Role) -> float:
        """Seconds from deaths of a process of that role until it answered again, all together."""
        return self._away[role]

    def wait_restarted(self, role: Role, count: int, timeout: float) -> bool:
        """Waits until restarts(role) is at least `count`, or the laboratory is over. False if neither came in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._restarts[role] >= count or self.failure is not None, timeout=timeout
            )

    def wait_failure(self) -> PeerUnavailable:
        """Waits until the laboratory is over, for ever if need be."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None)
        assert self.failure is not None
        return self.failure

    def close(self) -> None:
        """Nothing is restarted from here on."""
        self._closing = True
        os.write(self._waker, b"x")
        self._thread.join()
        os.close(self._wake)
        os.close(self._waker)

    def _watch(self) -> None:
        threads: list[threading.Thread] = []
        watched = dict(self.processes)
        while self._going:
            sentinels: dict[Any, Role] = {local.process.sentinel: role for role, local in watched.items()}
            heard = wait([*sentinels, self._wake])
            for sentinel in heard:
                if sentinel in sentinels and self._going:
                    role = sentinels[sentinel]
                    thread = threading.Thread(target=self._restart, args=(role, watched.pop(role)), daemon=True)
                    threads.append(thread)
                    thread.start()
            if self._wake in heard:
                os.read(self._wake, 1)
                watched |= {role: local for role, local in self.processes.items() if role not in watched}
        for thread in threads:
            thread.join()

    @property
    def _going(self) -> bool:
        return not self._closing and self.failure is None

    def _restart(self, role: Role, dead: LocalProcess) -> None:
        """On a thread of its own: the three may die at once."""
        _end(dead.process)
        words = dead.last_words()
        ended = f"ended with code {dead.process.exitcode}" + (f": {words}" if words else "")
        _log.warning("%s %s", role, ended)
        if dead.process.exitcode == 0:  # somebody asked it to end
            self._give_up(PeerUnavailable(role.value, ended))
            return
        deaths, now = self._deaths[role], time.monotonic()
        deaths.append(now)
        if len(deaths) == self._budget.deaths and now - deaths[0] < self._budget.seconds:
            often = f"ended {len(deaths)} times within {now - deaths[0]:.0f} s, at last"
            self._give_up(PeerUnavailable(role.value, f"{often} with code {dead.process.exitcode}: {words}"))
            return
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._budget.attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1),
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, VtlabError) and self._going),
            reraise=True,
        )
        try:
            attempts(self._once, role)
        except VtlabError as error:
            self._give_up(PeerUnavailable(role.value, f"{ended}; it cannot be restarted: {error}"))
        else:
            dead.ready.close()
            with self._changed:
                self._restarts[role] += 1
                self._away[role] += time.monotonic() - now
                self._changed.notify_all()
            os.write(self._waker, b"x")

    def _once(self, role: Role) -> None:
        if not self._going:
            return
        local = self.processes[role] = self._start(role)
        try:
            self._await_ready(role, local)
        except VtlabError:
            local.process.kill()
            local.process.join()
            raise

    def _give_up(self, failure: PeerUnavailable) -> None:
        """The others end too: without one of them nothing goes on."""
        _log.error("%s", failure)
        if not self._closing:
            for local in self.processes.values():
                local.process.kill()
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()
        os.write(self._waker, b"x")


def _end(process: Any) -> None:
    """Waits for a process whose sentinel told of its end; if that was a lie of another's code, it is ended."""
    deadline = time.monotonic() + DYING
    while process.is_alive():  # join() believes the sentinel, and would wait for ever
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.002)
    process.join()
