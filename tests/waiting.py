"""Waiting for a condition with a bound, so that no test sleeps for luck and none hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 0.01


def wait_until(condition: Callable[[], T], timeout: float = 10.0, what: str | None = None) -> T:
    """The first true value that `condition` returns.

    :param timeout: seconds.
    :raises AssertionError: naming `what` (by default the condition) and its last value, once the time is over.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout} s still not: {what or condition}; last value {value!r}")
        time.sleep(INTERVAL)
    return value
