"""`vtlab up`: a laboratory in the foreground, for other commands and scripts to use."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmm.cli import laboratory, options
from vmm.cli.output import print_json, progress
from vmm.supervision import collector
from vtlab.logs import LogFormat
from vtlab.metrics import Endpoint

if TYPE_CHECKING:
    from vmm.launcher import LocalLab

_Listen = "Where clients reach the {}: unix:/PATH or 127.0.0.1:PORT, port 0 for any [a private Unix socket]."


_HOST = "127.0.0.1"
_METRICS = "Answer Prometheus on loopback: the VMM at PORT, the monitor at PORT + 1, this process at PORT + 2; 0: any."
_TRACES = "Trace VTL switches into the files of this folder, or to an OTLP collector at this http address."


def up(
    vmm_listen: Annotated[str, typer.Option("--listen-vmm", metavar="ADDRESS", help=_Listen.format("VMM"))] = "",
    monitor_listen: Annotated[
        str, typer.Option("--listen-monitor", metavar="ADDRESS", help=_Listen.format("monitor"))
    ] = "",
    rules: options.Rules = "",
    log_format: Annotated[LogFormat, typer.Option("--log-format", help="Of the logs.")] = LogFormat.TEXT,
    metrics: Annotated[
        int, typer.Option("--metrics", metavar="PORT", min=-1, max=65533, help=_METRICS, show_default=False)
    ] = -1,
    traces: Annotated[str, typer.Option("--traces", metavar="WHERE", help=_TRACES)] = "",
    as_json: options.Json = False,
) -> int:
    """Run the three processes until Ctrl-C, and tell where they are. Other commands find them by themselves.

    One that dies is restarted and goes on; one that dies again and again ends them all.
    """
    from vmm.launcher import launch

    code = laboratory.load_rules(rules)
    with contextlib.ExitStack() as stack:
        with progress("starting guest, monitor and VMM", as_json):
            lab = stack.enter_context(
                launch(
                    code,
                    vmm_listen=vmm_listen,
                    monitor_listen=monitor_listen,
                    log_format=log_format.value,
                    metrics=_endpoints(metrics),
                    traces=str(Path(traces).absolute()) if traces and "://" not in traces else traces,
                )
            )
        if metrics >= 0:
            address = f"{_HOST}:{metrics + 2 if metrics else 0}"
            stack.callback(Endpoint(address, collector(lab.supervisor)).close)
        stack.enter_context(_published(lab))
        with contextlib.suppress(KeyboardInterrupt):
            _announce(lab, as_json)
            raise lab.supervisor.wait_failure()
    return 0


def _endpoints(port: int) -> tuple[str, str]:
    """Of the VMM and the monitor."""
    if port < 0:
        return "", ""
    return f"{_HOST}:{port}", f"{_HOST}:{port + 1 if port else 0}"


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
