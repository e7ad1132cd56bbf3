"""Servers that kill themselves at a chosen point, once: stand-ins for the real ones in vmm.launcher.SERVERS.

A file in a server's state folder says where: "POINT COUNT" dies when it has come to POINT so often. It is
removed first, so that the process that takes its place lives on.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtlab.channels import ServerConfig

FILE = "fault"

# point -> (where the function is, its name, whether the process dies before it or after it)
VMM_POINTS: dict[str, tuple[str, str, str]] = {
    "exit received": ("vmm.run_loop", "serve", "before"),
    "exit served": ("vmm.run_loop", "serve", "after"),
    "before the transaction": ("vmm.journal.Journal", "write", "before"),
    "after the transaction": ("vmm.journal.Journal", "write", "after"),
    "before VTL1": ("vmm.processor.Processor", "run_monitor", "before"),
    "after VTL1": ("vmm.processor.Processor", "run_monitor", "after"),
    "pages moved": ("vmm.memory.Memory", "apply", "after"),
    "before the wipe": ("vmm.memory.Memory", "wipe", "before"),
    "before the levels are asked": ("vmm.peers.RemoteLevel", "reconnect", "before"),
}
MONITOR_POINTS: dict[str, tuple[str, str, str]] = {
    "enter received": ("vtl1_monitor.monitor.Monitor", "run", "before"),
    "enter served": ("vtl1_monitor.monitor.Monitor", "run", "after"),
}


def arm(laboratory: Path, role: str, point: str, count: int = 1) -> None:
    """From now on, in the laboratory with that folder."""
    path = laboratory / role / FILE
    temporary = path.with_suffix(".new")
    temporary.write_text(f"{point}\n{count}")
    temporary.replace(path)


HELD = "held"
"""A file in a server's state folder: as long as it is there, a new process of that role touches nothing."""

DRAINED = "drained"
"""Point of any role: its main has returned, and it would end with 0. It ends by a signal, so that it is restarted."""


def _install(path: Path, points: dict[str, tuple[str, str, str]]) -> Callable[[str], None]:
    import importlib

    reached: dict[str, int] = {}

    def reach(point: str) -> None:
        try:
            armed, count = path.read_text().split("\n")
        except OSError:
            return
        if armed != point:
            return
        reached[point] = reached.get(point, 0) + 1
        if reached[point] >= int(count):
            path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    for point, (place, name, when) in points.items():
        module, _, owner = place.rpartition(".")
        try:
            holder: Any = importlib.import_module(place)
        except ModuleNotFoundError:
            holder = getattr(importlib.import_module(module), owner)
        setattr(holder, name, _wrapped(getattr(holder, name), functools.partial(reach, point), when))
    return reach


def _wrapped(function: Callable[..., Any], reach: Callable[[], None], when: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if when == "before":
            reach()
        result = function(*arguments, **keywords)
        if when == "after":
            reach()
        return result

    return wrapper


def main(config: ServerConfig) -> None:
    """The server of any role."""
    import importlib

    servers = {"vmm": "vmm.server", "guest": "vtl0_guest.server", "monitor": "vtl1_monitor.server"}
    while (config.state / HELD).exists():
        time.sleep(0.01)
    points = {"vmm": VMM_POINTS, "monitor": MONITOR_POINTS}
    reach = _install(config.state / FILE, points.get(config.role, {}))
    importlib.import_module(servers[config.role]).main(config)
    reach(DRAINED)
