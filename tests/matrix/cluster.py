"""Cells on a Dask cluster: each worker thread has a laboratory of its own. Needs the extra `vtlab[dask]`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Self

from distributed import Client, WorkerPlugin, as_completed, get_worker

from vtlab.errors import PeerUnavailable
from vtlab_matrix.laboratory import Laboratory, Launch, Task, lost
from vtlab_matrix.outcome import Outcome

PLUGIN = "vtlab-matrix"
CONNECT = 20.0  # seconds


class Laboratories(WorkerPlugin):
    """The laboratories of one Dask worker, as many as cells run in it at once; they end with the plugin."""

    name = PLUGIN

    def __init__(self, launch: Launch, seed: int) -> None:
        self._launch = launch
        self._seed = seed

    def setup(self, worker: Any) -> None:
        self._idle: list[Laboratory] = []
        self._lock = threading.Lock()

    def teardown(self, worker: Any) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for laboratory in idle:
            laboratory.close()

    def run(self, task: Task) -> Outcome:
        """A cell in a laboratory that nobody uses."""
        with self._lock:
            laboratory = self._idle.pop() if self._idle else Laboratory(self._launch, self._seed)
        try:
            return laboratory.run(task)
        finally:
            with self._lock:
                self._idle.append(laboratory)


def _run(task: Task) -> Outcome:
    plugin = get_worker().plugins[PLUGIN]
    assert isinstance(plugin, Laboratories)
    return plugin.run(task)


class Cluster:
    """Workers elsewhere; as a context manager it ends their laboratories and leaves the cluster as it was."""

    def __init__(self, address: str, launch: Launch, seed: int = 0) -> None:
        """:param address: of the scheduler. Raises PeerUnavailable."""
        try:
            self._client = Client(address, timeout=CONNECT)
        except (OSError, ValueError) as error:
            raise PeerUnavailable(f"Dask scheduler {address}", str(error)) from None
        self._client.register_plugin(Laboratories(launch, seed))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Outcomes as they come, in no order. Every task has one, also if its worker dies."""
        waiting = {self._client.submit(partial(_run, task), pure=False): task for task in tasks}
        for future in as_completed(list(waiting)):
            task = waiting.pop(future)
            error = future.exception() if future.status != "finished" else None
            yield lost(task, f"its worker was lost: {error}") if error else future.result()

    def close(self) -> None:
        """Takes back what was not begun."""
        try:
            self._client.unregister_worker_plugin(PLUGIN)
        finally:
            self._client.close()
