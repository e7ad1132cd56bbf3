"""`vtlab up`: a laboratory in the foreground, for other commands and scripts to use."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from vmm.cli import laboratory, options
from vmm.cli.output import print_json, progress

if TYPE_CHECKING:
    from vmm.launcher import LocalLab

_Listen = "Where clients reach the {}: unix:/PATH or 127.0.0.1:PORT, port 0 for any [a private Unix socket]."


def up(
    vmm_listen: Annotated[str, typer.Option("--listen-vmm", metavar="ADDRESS", help=_Listen.format("VMM"))] = "",
    monitor_listen: Annotated[
        str, typer.Option("--listen-monitor", metavar="ADDRESS", help=_Listen.format("monitor"))
    ] = "",
    rules: options.Rules = "",
    as_json: options.Json = False,
) -> int:
    """Run the three processes until Ctrl-C, and tell where they are. Other commands find them by themselves.

    One that dies is restarted and goes on; one that dies again and again ends them all.
    """
    from vmm.launcher import launch

    code = laboratory.load_rules(rules)
    with contextlib.ExitStack() as stack:
        with progress("starting guest, monitor and VMM", as_json):
            lab = stack.enter_context(launch(code, vmm_listen=vmm_listen, monitor_listen=monitor_listen))
        stack.enter_context(_published(lab))
        with contextlib.suppress(KeyboardInterrupt):
            _announce(lab, as_json)
            raise lab.supervisor.wait_failure()
    return 0


@contextlib.contextmanager
def _published(lab: LocalLab) -> Iterator[None]:
    from vtlab.client.runtime import publish, published

    path = publish(lab.addresses)
    try:
        yield
    finally:
        if published() == lab.addresses:  # unless a later `up` has taken its place
            path.unlink(missing_ok=True)


def _announce(lab: LocalLab, as_json: bool) -> None:
    variables = lab.addresses.environment()
    if as_json:
        print_json({"environment": variables, "pids": lab.pids, "directory": str(lab.directory)})
        return
    processes = ", ".join(f"{role} {pid}" for role, pid in lab.pids.items())
    sys.stdout.write(f"# processes: {processes}; logs: {lab.directory}/*.log; Ctrl-C ends them\n")
    for name, value in variables.items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    sys.stdout.flush()
