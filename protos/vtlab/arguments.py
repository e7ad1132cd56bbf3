"""Command line of the three servers, the same for all: `python -m vtl0_guest --listen … --trust … --state …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vtlab.channels import ServerConfig
from vtlab.errors import VtlabError
from vtlab.logs import LogFormat
from vtlab.trust.roles import Role


def server_config(role: Role | str, arguments: Sequence[str] | None = None) -> ServerConfig:
    """Parses the command line of a server; ends the process with code 2 and a line on stderr if it is wrong."""
    role = Role(role)
    parser = argparse.ArgumentParser(description=f"The {role} process of a laboratory.")
    parser.add_argument("--listen", action="append", required=True, metavar="ADDRESS", help="unix:/path or HOST:PORT")
    parser.add_argument("--trust", type=Path, required=True, help=f"folder with ca.pem, {role}.pem and {role}.key")
    parser.add_argument("--state", type=Path, required=True, help="folder for what it keeps while it runs")
    parser.add_argument("--any-address", action="store_true", help="permit listening beyond loopback")
    if role is not Role.VMM:
        parser.add_argument("--memory", type=Path, required=True, help="the VMM's state folder, for memory files")
    parser.add_argument("--log-format", choices=[*LogFormat], default=LogFormat.TEXT, help="of the log on stderr")
    if role is not Role.GUEST:  # whoever breaks out of the emulator would be the one who answers
        parser.add_argument("--metrics", default="", metavar="HOST:PORT", help="answer Prometheus there")
    parser.add_argument("--traces", default="", metavar="WHERE", help="trace VTL switches to a file or an http address")
    if role is Role.VMM:
        parser.add_argument("--guest", required=True, metavar="ADDRESS", help="where VTL0 is served")
        parser.add_argument("--monitor", required=True, metavar="ADDRESS", help="where VTL1 is served")
    given = parser.parse_args(arguments)
    return ServerConfig(
        listen=tuple(given.listen),
        trust=given.trust,
        role=role.value,
        state=given.state,
        guest=getattr(given, "guest", ""),
        monitor=getattr(given, "monitor", ""),
        allow_any_address=given.any_address,
        memory=getattr(given, "memory", given.state),
        log_format=given.log_format,
        metrics=getattr(given, "metrics", ""),
        traces=given.traces,
    )


def run_server(role: Role | str, main: Callable[[ServerConfig], object]) -> int:
    """Body of a server's __main__: its exit code is 0 after a drain, 1 after an error, which stderr names in a line."""
    from vtlab.confinement.confine import confine

    try:
        config = server_config(role)
        confine(config)
        main(config)
    except VtlabError as error:
        sys.stderr.write(f"{role}: {error}\n")
        return 1
    return 0
