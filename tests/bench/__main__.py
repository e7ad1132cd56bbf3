"""`python -m tests.bench [--json FILE] [--turns N] [NAME…]`: measures, prints a table, and writes the figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.figures import MEASUREMENTS, setting_of
from tests.bench.measure import Figure
from vmm.launcher import launch

LIBRARIES = ("unicorn", "grpcio", "protobuf")
WIDTH = 160  # columns of the table where it does not go to a terminal
WORDS = {True: "[green]pass[/]", False: "[red]miss[/]", None: ""}


def main() -> int:
    """The command: 0 if every goal is reached or nobody asked; 1 with --strict if one is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Figures as ratios of one run.")
    parser.add_argument("names", nargs="*", choices=[[], *MEASUREMENTS], metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--turns", type=int, default=5, help="how often each pair is measured in turn (default 5)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a goal is missed")
    arguments = parser.parse_args()
    progress = Console(stderr=True)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="vtlab-bench-") as folder, launch() as lab:
        setting = setting_of(lab, Path(folder), arguments.turns)
        for name in arguments.names or MEASUREMENTS:
            with progress.status(f"measuring: {name}"):
                for figure in MEASUREMENTS[name](setting):
                    figures.append(figure)
                    progress.print(f"{figure.name}: {figure.median:.4g} {figure.unit}", style="dim", highlight=False)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(report(figures), indent=2) + "\n")
    return int(arguments.strict and any(figure.passed is False for figure in figures))


def table(figures: list[Figure]) -> Table:
    """For people: medians, quartiles, goals."""
    result = Table(title="vtlab bench: medians of pairs measured in turn", caption="spread: lower and upper quartile")
    for heading in ("figure", "median", "spread", "goal", "", "behind it"):
        result.add_column(heading, justify="right" if heading in {"median", "spread", "goal"} else "left")
    for figure in figures:
        low, high = figure.quartiles
        goal = "" if figure.goal is None else f"{'≥' if figure.at_least else '≤'} {_number(figure.goal)}"
        result.add_row(
            figure.name,
            f"{_number(figure.median)} {'' if figure.unit == 'ratio' else figure.unit}".strip(),
            f"{_number(low)} - {_number(high)}",
            goal,
            WORDS[figure.passed],
            figure.detail,
        )
    return result


def report(figures: list[Figure]) -> dict[str, object]:
    """For machines: every sample, and what was measured on."""
    return {
        "machine": {
            "processors": os.cpu_count(),
            "architecture": platform.machine(),
            "system": platform.release(),
            "python": platform.python_version(),
            "libraries": {name: version(name) for name in LIBRARIES},
        },
        "figures": [figure.as_json() for figure in figures],
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
