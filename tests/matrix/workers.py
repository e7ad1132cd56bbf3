"""Processes that run cells on this machine: each has a laboratory of its own, and none outlives this process."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, NoReturn, Self

import multiprocess
from multiprocess.process import parent_process

from vtlab.process import watch_parent, without_main
from vtlab_matrix.laboratory import Laboratory, Launch, Task, lost
from vtlab_matrix.outcome import Outcome

LIMIT = 240.0  # seconds of one cell; every wait inside it ends sooner
GRACE = 15.0  # seconds for a worker to end its laboratory


@dataclass
class _Worker:
    """A worker as this process sees it. `task` is what it does now."""

    process: Any
    pipe: Any
    task: Task | None = None
    since: float = 0.0


class Workers:
    """`jobs` processes; as a context manager it ends them."""

    def __init__(self, jobs: int, launch: Launch, seed: int = 0, limit: float = LIMIT) -> None:
        """Args:
        jobs: laboratories at once.
        launch: starts one; must be a function of a module, since it is called by name elsewhere.
        seed: see run_cell.
        limit: seconds after which a cell that says nothing is ended with its laboratory.
        """
        self._start = partial(_start, launch, seed)
        self._jobs = jobs
        self._limit = limit
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Outcomes as they come, in no order. Every task has one, also if its worker dies."""
        left = deque(tasks)
        while left or any(worker.task for worker in self._workers):
            while left and len(self._workers) < self._jobs:
                self._workers.append(self._start())
            for worker in self._workers:
                if left and worker.task is None:
                    worker.task, worker.since = left.popleft(), time.monotonic()
                    worker.pipe.send(worker.task)
            yield from self._take([worker for worker in self._workers if worker.task])

    def _take(self, busy: list[_Worker]) -> Iterator[Outcome]:
        first = min(worker.since for worker in busy) + self._limit
        ready = wait([worker.pipe for worker in busy], max(first - time.monotonic(), 0))
        for worker in busy:
            if worker.pipe in ready:
                yield self._receive(worker)
            elif time.monotonic() - worker.since >= self._limit:
                yield self._give_up(worker, f"no answer within {self._limit:g} s")

    def _receive(self, worker: _Worker) -> Outcome:
        try:
            outcome: Outcome = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(GRACE)
            return self._give_up(worker, f"its worker ended with code {worker.process.exitcode}")
        worker.task = None
        return outcome

    def _give_up(self, worker: _Worker, error: str) -> Outcome:
        """Ends a worker; its laboratory ends with it, and another one takes its place."""
        assert worker.task is not None
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        return lost(worker.task, error, time.monotonic() - worker.since)

    def close(self) -> None:
        """Ends all workers and their laboratories; who does not end in time is killed."""
        workers, self._workers = self._workers, []
        try:
            for worker in workers:
                worker.process.terminate()
            deadline = time.monotonic() + GRACE
            for worker in workers:
                worker.process.join(max(deadline - time.monotonic(), 0))
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()
                worker.pipe.close()


def _start(launch: Launch, seed: int) -> _Worker:
    context = multiprocess.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(launch, seed, theirs), name="vtlab-matrix")
    with without_main():
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(launch: Launch, seed: int, pipe: Any) -> None:
    """Body of a worker. It ends with SIGTERM, with its pipe, or with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    parent = parent_process()
    assert parent is not None
    watch_parent(parent.sentinel, GRACE)
    with Laboratory(launch, seed) as laboratory:
        while True:
            try:
                task = pipe.recv()
                pipe.send(laboratory.run(task))
            except (EOFError, OSError):
                return


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """Unwinds like an exception, so that the laboratory ends too. Once: the end must not be interrupted."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)
