"""`vtlab matrix`: attacks × transitions × designs. The command; what it does is in vtlab_matrix."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmm.cli.output import print_error, print_json
from vtlab.errors import Unsupported

if TYPE_CHECKING:
    from vtlab_matrix.matrix import Runner
    from vtlab_matrix.outcome import Outcome

SHOWN_AFTER = 1.0  # seconds before a progress bar appears
WIDTH = 160  # columns of the table where it does not go to a terminal

_Names = Annotated[str | None, typer.Option(metavar="A,B*,…", help="Only these; patterns with * and ?.")]


def _patterns(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def matrix(
    designs: _Names = None,
    attacks: _Names = None,
    after: Annotated[
        str | None, typer.Option(metavar="A,B*,…", help="Attack only after these transitions; `boot` is none.")
    ] = None,
    transitions: Annotated[
        str | None, typer.Option(metavar="A,B*,…", help="Of transitions themselves only these; '' is none of them.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Laboratories at once.")] = max(
        1, os.cpu_count() or 1
    ),
    scheduler: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Run on the workers of this Dask scheduler instead.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Order of the cells, and all that is random in them.")] = 0,
    journal: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where cells that are done are remembered until the run ends.")
    ] = None,
    mutate: Annotated[
        str | None, typer.Option(metavar="A,B*,…", help="Show which cells need these rules of the policy instead.")
    ] = None,
    diagrams: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write sequence diagrams of all transitions into it instead.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with an interrupted run.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page for a browser.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with `cells`.")] = False,
) -> int:
    """Run every attack after every transition under every design, each on a fresh machine.

    An interrupted run goes on where it was. Exit code 0 if under `vtl` no attack succeeded, no guest broke, nothing was
    unclear, and each red cell of the other designs is explained by a known hole.
    """
    from vmm.designs import NAMES
    from vtlab_matrix.cells import Selection, plan
    from vtlab_matrix.holes import Holes
    from vtlab_matrix.journal import Journal, default_path, digest
    from vtlab_matrix.matrix import run_matrix
    from vtlab_matrix.report import Report

    if mutate is not None:
        return _mutate(_patterns(mutate) or [], jobs, scheduler, seed, as_json)
    if diagrams is not None:
        return _diagrams(diagrams, jobs, seed)
    known = sorted(NAMES, key=lambda name: name == "vtl")
    selection = Selection(known, _patterns(designs), _patterns(attacks), _patterns(after), _patterns(transitions), seed)
    total = sum(map(len, plan(selection)))
    started = time.monotonic()
    with (
        Journal(journal or default_path(), digest(seed), fresh) as kept,
        _runner(scheduler, min(jobs, total), seed) as runner,
        _progress(total, len(kept.done), as_json) as advance,
    ):
        outcomes = run_matrix(selection, runner, kept, advance)
        report = Report(outcomes, Holes.shipped(), time.monotonic() - started, seed)
        _write(report, html, junit, as_json)
        kept.finish()
    return 0 if report.passed else 1


@contextlib.contextmanager
def _runner(scheduler: str, jobs: int, seed: int) -> Iterator[Runner]:
    from vmm.launcher import launch

    if not scheduler:
        from vtlab_matrix.workers import Workers

        with Workers(jobs, launch, seed) as workers:
            yield workers
        return
    try:
        from vtlab_matrix.cluster import Cluster
    except ImportError:
        raise Unsupported("--scheduler", "needs dask.distributed: pip install 'vtlab[dask]'") from None
    with Cluster(scheduler, launch, seed) as cluster:
        yield cluster


@contextlib.contextmanager
def _progress(total: int | None, done: int, as_json: bool) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal, on stderr; elsewhere nothing."""
    if done:
        sys.stderr.write(f"going on with an interrupted run: {done} cells are done (--fresh starts anew)\n")
    if as_json or not sys.stderr.isatty():
        yield lambda _outcome: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        started = time.monotonic()
        task = bar.add_task("starting laboratories", total=total, visible=False)

        def advance(outcome: Outcome) -> None:
            visible = time.monotonic() - started > SHOWN_AFTER
            bar.update(task, advance=1, description=str(outcome.cell)[:48].ljust(48), visible=visible)

        yield advance


def _mutate(patterns: list[str], jobs: int, scheduler: str, seed: int, as_json: bool) -> int:
    """0 if each rule is needed by some cell."""
    from vmm.cli.output import print_table
    from vtlab_matrix.mutations import run_mutations

    started, ran = time.monotonic(), 0
    with _runner(scheduler, jobs, seed) as runner, _progress(None, 0, as_json) as advance:

        def count(outcome: Outcome) -> None:
            nonlocal ran
            ran += 1
            advance(outcome)

        red = run_mutations(runner, patterns, count)
    if as_json:
        print_json({rule: [f"{one.cell.name} {one.verdict}" for one in outcomes] for rule, outcomes in red.items()})
        return 0 if all(red.values()) else 1
    rows = [[rule, *_first_red(outcomes)] for rule, outcomes in red.items()]
    print_table("what turns red without a rule of the policy", ["rule", "cell", "verdict", "evidence", "more"], rows)
    needed, seconds = sum(map(bool, red.values())), time.monotonic() - started
    sys.stdout.write(f"{needed} of {len(red)} rules are needed by some cell; {ran} cells in {seconds:.0f} s\n")
    return 0 if needed == len(red) else 1


def _first_red(outcomes: list[Outcome]) -> list[str]:
    """Cell, verdict, evidence, and how many others; an attack that succeeds says most."""
    if not outcomes:
        return ["none", "", "", ""]
    first = min(outcomes, key=lambda one: one.cell.kind != "attack")
    broken = first.broken[0] if first.broken else first.evidence
    told = str(broken).strip().splitlines()
    return [
        first.cell.name,
        first.verdict.value,
        told[-1] if told else "",
        f"+{len(outcomes) - 1}" * (len(outcomes) > 1),
    ]


def _diagrams(document: Path, jobs: int, seed: int) -> int:
    """0 if each transition was complete, so that its diagram is one of it."""
    from vtlab_matrix.cells import EVERY_TRANSITION, Cell
    from vtlab_matrix.diagrams import replace_section, section
    from vtlab_matrix.laboratory import Task

    cells = [Cell(design="vtl", kind="transition", name=name) for name in EVERY_TRANSITION]
    with _runner("", jobs, seed) as runner:
        outcomes = list(runner.run([Task(cell) for cell in cells]))
    for outcome in outcomes:
        if outcome.verdict.red:
            print_error(f"{outcome.cell}: {outcome.verdict}: {outcome.evidence}")
    if any(outcome.verdict.red for outcome in outcomes):
        return 1
    replace_section(document, section(outcomes))
    return 0


def _write(report: object, html: Path | None, junit: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from vtlab_matrix import terminal
    from vtlab_matrix.junit import junit as as_junit
    from vtlab_matrix.report import Report

    assert isinstance(report, Report)
    if junit:
        junit.write_text(as_junit(report), encoding="utf-8")
    if html:
        from vtlab_matrix.page import page

        html.write_text(page(report), encoding="utf-8")
    if as_json:
        print_json(report.as_json())
    else:
        terminal.show(report, Console(width=None if sys.stdout.isatty() else WIDTH))
