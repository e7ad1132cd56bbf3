"""Processes that never outlive the one that started them, and that drain when asked to end."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)
_main_swap = threading.Lock()


def watch_parent(alive: int, grace: float = 3.0) -> None:
    """Ends this process when the other end of a pipe closes, that is, when its only holder, the parent, is gone.

    A pipe and not PR_SET_PDEATHSIG, which tells of the end of the thread that made this process, not of the parent's.

    Args:
        alive: read end of the pipe.
        grace: seconds that draining after SIGTERM may take; then the process is simply gone.
    """

    def wait() -> None:
        try:
            while os.read(alive, 1):
                pass
        except OSError:
            return
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Hides the user's script from a spawned child, which would otherwise run it again, unguarded, to import it."""
    with _main_swap:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def remove_folder(folder: Path, attempts: int = 100) -> None:
    """Removes a folder that others may be removing too, or still be writing to while they end."""
    for _ in range(attempts):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.02)


def spare_collections() -> None:
    """Keeps what start-up made out of garbage collections for good, and makes collections rarer.

    To be called once a server is up. An exit allocates some dozens of objects and leaves no cycles; with Python's own
    thresholds every fourteenth exit would pay for a collection, and some for one of everything.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def switch_threads_soon() -> None:
    """For processes that may run guest code: a thread that wants to run Python gets its turn after 0.2 ms.

    Python's 5 ms would be the delay of every timer while the processors spin.
    """
    sys.setswitchinterval(0.0002)


# Seconds from the first SIGTERM to the end of the process, whatever it waits for; below the 10 that Docker gives.
DRAIN = 8.0


def termination(bound: float = DRAIN) -> threading.Event:
    """An event that SIGTERM sets, and SIGINT too unless it is ignored. To be called in the main thread.

    A second signal ends the process at once, and so does the bound: all that must last is written before each reply.
    """
    event = threading.Event()

    def late() -> None:
        _log.error("still draining after %g s: ended", bound)
        os._exit(1)

    def on_signal(number: int, _frame: object) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()
        timer = threading.Timer(bound, late)
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, on_signal)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, on_signal)
    return event
