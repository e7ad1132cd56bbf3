"""`vtlab chaos`: what survives when processes are killed and stopped and channels cut."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vmm.cli import options
from vmm.cli.exit_codes import ExitCode
from vmm.cli.output import print_json

if TYPE_CHECKING:
    from vmm.chaos.run import Report


def chaos(
    kills: Annotated[int, typer.Option("--kills", min=1, help="How many faults.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Which faults: the same number gives the same ones.")] = 1,
    processors: Annotated[int, typer.Option("--vcpus", min=1, max=16, help="Of the guest.")] = 2,
    as_json: options.Json = False,
) -> int:
    """Kill, stop and cut off the three processes under a guest whose work is checked after each fault.

    Exit code 0 if no exit, byte or event was lost or doubled, no protection was open, and only deaths of the guest
    process reset the machine.
    """
    from vmm.chaos.run import run

    shown = 0

    def problems(report: Report) -> list[str]:
        """Those that were not told yet."""
        nonlocal shown
        fresh, shown = report.findings.problems[shown:], len(report.findings.problems)
        return fresh

    def tell(number: int, name: str, report: Report) -> None:
        if as_json:
            print_json({"fault": number, "name": name, "problems": problems(report)})
            return
        sys.stdout.write("\n  ".join([f"{number}: {name}", *problems(report)]) + "\n")
        sys.stdout.flush()

    report = run(kills, seed, processors, tell)
    left = problems(report)
    if as_json:
        print_json(report.figures() | {"problems": left})
    else:
        sys.stdout.write("".join(f"  {problem}\n" for problem in left) + report.line() + "\n")
    return ExitCode.OK if report.good else ExitCode.NEGATIVE
