"""`vtlab chaos`: what survives when processes are killed and stopped and channels cut."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vmm.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from vmm.chaos.run import Report


def chaos(
    kills: Annotated[int, typer.Option("--kills", min=1, help="How many faults.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Which faults: the same number gives the same ones.")] = 1,
    processors: Annotated[int, typer.Option("--vcpus", min=1, max=16, help="Of the guest.")] = 2,
) -> int:
    """Kill, stop and cut off the three processes under a guest whose work is checked after each fault.

    Exit code 0 if no exit, byte or event was lost or doubled, no protection was open, and only deaths of the guest
    process reset the machine.
    """
    from vmm.chaos.run import run

    shown = 0

    def tell(number: int, name: str, report: Report) -> None:
        nonlocal shown
        sys.stdout.write(f"{number}: {name}\n")
        for problem in report.findings.problems[shown:]:
            sys.stdout.write(f"  {problem}\n")
        shown = len(report.findings.problems)
        sys.stdout.flush()

    report = run(kills, seed, processors, tell)
    for problem in report.findings.problems[shown:]:
        sys.stdout.write(f"  {problem}\n")
    sys.stdout.write(report.line() + "\n")
    return ExitCode.OK if report.good else ExitCode.NEGATIVE
