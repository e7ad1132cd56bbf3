"""What a process of a local laboratory does before it becomes a server, in the spawned child.

Servers are imported by name, so that the launcher loads none of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import signal
import stat
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multiprocess import resource_tracker
from multiprocess.process import parent_process

from vtlab.channels import ServerConfig
from vtlab.confinement.confine import confine
from vtlab.confinement.privileges import inherited
from vtlab.errors import InternalError, VtlabError
from vtlab.process import watch_parent


@dataclass(frozen=True)
class ChildSpec:
    """What the launcher tells a child.

    Attributes:
        module: where its main(config) is, "vtl0_guest.server".
        config: without `ready`, which the child has.
        rules: dill pickle of the monitor's rules, made and read on this machine by this user alone; b"" for none.
        log: file for stdout and stderr; None keeps the parent's.
    """

    module: str
    config: ServerConfig
    rules: bytes
    log: Path | None


class _Once:
    """The pipe to the launcher, closed once something was said: the launcher unpickles what comes through it."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def send(self, said: Any) -> None:
        """Raises OSError the second time."""
        self._pipe.send(said)
        self._pipe.close()


def run(orders: Any, ready: Any, modules: tuple[str, ...]) -> None:
    """Body of the child. It ends with the server's main, with SIGTERM, or with its parent.

    Args:
        orders: end of a pipe from which comes one ChildSpec.
        ready: end of a pipe for the bound addresses, or the VtlabError that ended the start.
        modules: to be imported until the orders come.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to act on
    for module in modules:
        if orders.poll():
            break
        with contextlib.suppress(Exception):  # who needs it will say what is wrong with it
            importlib.import_module(module)
    try:
        spec: ChildSpec = orders.recv()
    except EOFError:
        return  # the parent needs nobody any more
    orders.close()
    _serve(spec, ready)


def _serve(spec: ChildSpec, ready: Any) -> None:
    if spec.log is not None:
        _redirect(spec.log)
    parent = parent_process()
    assert parent is not None
    pipe, ready = ready, _Once(ready)
    try:
        # Imported before it is confined, so that byte code is kept; confined before there is a second thread.
        main = importlib.import_module(spec.module).main
        config = replace(spec.config, ready=ready)
        used = [pipe.fileno(), parent.sentinel, *_signs_of_life()]
        confine(replace(config, rules=spec.rules), [spec.module.partition(".")[0]], used)
        watch_parent(parent.sentinel)
        if spec.rules:
            import dill

            config = replace(config, rules=dill.loads(spec.rules))  # noqa: S301 - see ChildSpec.rules
        main(config)
    except Exception as error:  # noqa: BLE001 - whatever it was, the launcher must hear of it
        traceback.print_exc()
        sys.stderr.flush()
        _report(ready, error if isinstance(error, VtlabError) else _internal(spec, error))
        sys.exit(1)


def _signs_of_life() -> list[int]:
    """The end of multiprocess's pipe whose closing tells the launcher that this process is dead; it has no name here.

    The other pipe to write to is the resource tracker's, who unlinks what it is told to, with the launcher's rights.
    """
    tracker = resource_tracker._resource_tracker._fd
    return [
        descriptor
        for descriptor in inherited()
        if descriptor != tracker
        and stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    ]


def _internal(spec: ChildSpec, error: Exception) -> InternalError:
    return InternalError(spec.config.role, f"{type(error).__name__}: {error}")


def _report(ready: _Once, error: VtlabError) -> None:
    try:
        ready.send(error)
    except OSError:  # the launcher reads no more: it has its addresses, or is gone
        return


def _redirect(log: Path) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
