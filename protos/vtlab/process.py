"""Processes that never outlive the one that started them, and that drain when asked to end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def signal_when_parent_dies(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel for a signal when the parent ends; raises it at once if it has ended already.

    Linux sends it when the *thread* that made this process ends, so a process started from a short-lived thread must
    rather watch a pipe (see watch).
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def watch(alive: int, on_death: Callable[[], None], grace: float = 3.0) -> None:
    """Ends this process when the other end of a pipe closes, that is, when its last holder is gone.

    Args:
        alive: read end; its write end is held by the parent alone.
        on_death: called first, from a thread of its own.
        grace: seconds that draining may take after SIGTERM before the process is simply gone.
    """

    def wait() -> None:
        try:
            while os.read(alive, 1):
                pass
        except OSError:
            return
        try:
            on_death()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(grace)
            os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def termination() -> threading.Event:
    """An event that SIGTERM sets, and SIGINT too unless it is ignored. To be called in the main thread."""
    event = threading.Event()

    def on_signal(_number: int, _frame: object) -> None:
        event.set()

    signal.signal(signal.SIGTERM, on_signal)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, on_signal)
    return event
