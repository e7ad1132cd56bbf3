"""VMMs with a defect, to see that the checker finds it: stand-ins for vmm.server in vmm.launcher.SERVERS."""

from __future__ import annotations

import os
import queue
import threading
import time
from typing import Any

from vmm import server
from vmm.journal import Journal
from vmm.processor import Processor
from vtlab.channels import ServerConfig
from vtlab.v1.vcpu_pb2 import Enter, Update

VARIABLE = "VTLAB_TEST_DEFECT"
# Seconds that a transaction comes too late.
_LATE = 0.5


def journal_after_reply() -> None:
    """Transactions are made when the reply has long left."""
    write = Journal.write
    waiting: queue.SimpleQueue[tuple[float, tuple[Any, ...]]] = queue.SimpleQueue()

    def later() -> None:
        while True:
            due, arguments = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            write(*arguments)

    threading.Thread(target=later, daemon=True).start()
    Journal.write = lambda *arguments: waiting.put((time.monotonic() + _LATE, arguments))  # type: ignore[method-assign]


def protection_after_resume() -> None:
    """A vCPU is entered some times before it is told of new page rights."""
    take = Processor._take_waiting
    kept: dict[int, list[tuple[int, Update]]] = {}

    def later(self: Processor, enter: Enter, vtl: int) -> None:
        take(self, enter, vtl)
        mine = kept.setdefault(self.index, [])
        mine += [(enter.sequence + 60, update) for update in enter.updates if update.HasField("protection")]
        rest = [update for update in enter.updates if not update.HasField("protection")]
        del enter.updates[:]
        enter.updates.extend([*rest, *(update for due, update in mine if due <= enter.sequence)])
        mine[:] = [one for one in mine if one[0] > enter.sequence]

    Processor._take_waiting = later  # type: ignore[method-assign]


DEFECTS = {"journal after reply": journal_after_reply, "protection after resume": protection_after_resume}


def main(config: ServerConfig) -> None:
    DEFECTS[os.environ[VARIABLE]]()
    server.main(config)
