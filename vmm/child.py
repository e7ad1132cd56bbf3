"""What a process of a local laboratory does before it becomes a server, in the spawned child.

Servers are imported by name, so that the launcher loads none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from multiprocess.process import parent_process

from vtlab.channels import ServerConfig
from vtlab.errors import InternalError, VtlabError
from vtlab.process import remove_folder, watch_parent


@dataclass(frozen=True)
class ChildSpec:
    """What the launcher tells a child.

    Attributes:
        module: where its main(config) is, "vtl0_guest.server".
        config: without `ready`, which the child has.
        rules: dill pickle of the monitor's rules, made and read on this machine by this user alone; b"" for none.
        directories: folders of the laboratory, removed when the parent dies.
        log: file for stdout and stderr; None keeps the parent's.
        parent: its process number.
    """

    module: str
    config: ServerConfig
    rules: bytes
    directories: tuple[Path, ...]
    log: Path | None
    parent: int


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
    watch_parent(parent.sentinel, partial(_remove, spec.directories))
    try:
        main = importlib.import_module(spec.module).main
        config = replace(spec.config, ready=ready)
        if spec.rules:
            import dill

            config = replace(config, rules=dill.loads(spec.rules))  # noqa: S301 - see ChildSpec.rules
        main(config)
    except Exception as error:  # noqa: BLE001 - whatever it was, the launcher must hear of it
        traceback.print_exc()
        sys.stderr.flush()
        _report(ready, error if isinstance(error, VtlabError) else _internal(spec, error))
        sys.exit(1)
    finally:
        if os.getppid() != spec.parent:  # nobody else is left to do it
            _remove(spec.directories)


def _remove(directories: tuple[Path, ...]) -> None:
    for directory in directories:
        remove_folder(directory)


def _internal(spec: ChildSpec, error: Exception) -> InternalError:
    return InternalError(spec.config.role, f"{type(error).__name__}: {error}")


def _report(ready: Any, error: VtlabError) -> None:
    try:
        ready.send(error)
    except OSError:  # the launcher reads no more: it has its addresses, or is gone
        return


def _redirect(log: Path) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
