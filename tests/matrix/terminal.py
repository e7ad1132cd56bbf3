"""The run on a terminal: a row an attack, a column a design, a mark a transition."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vtlab_attacks.campaign import DESIGN
from vtlab_matrix.cells import BOOT, Verdict
from vtlab_matrix.outcome import Outcome
from vtlab_matrix.report import Report

MARKS = {
    Verdict.BLOCKED: ("■", "green"),
    Verdict.KEPT: ("✔", "green"),
    Verdict.SUCCEEDED: ("✘", "bold red"),
    Verdict.GUEST_BROKEN: ("†", "bold magenta"),
    Verdict.UNCLEAR: ("?", "bold yellow"),
}
ROOM = 30  # columns for the names
SHOWN = 40  # cells that fail the run, told in full


def legend() -> Text:
    return Text("  ").join(Text(f"{mark} {verdict.value}", style) for verdict, (mark, style) in MARKS.items())


def tables(report: Report, width: int) -> list[RenderableType]:
    """As many tables as the width needs."""
    groups: list[list[str]] = []
    room = 0
    for design in report.designs:
        need = max(len(_moves(report, design)), len(design)) + 3
        if not groups or need > room:
            groups.append([])
            room = width - ROOM
        groups[-1].append(design)
        room -= need
    return [_table(report, designs) for designs in groups]


def _moves(report: Report, design: str) -> list[str]:
    """What comes before attacks, in order."""
    return list(dict.fromkeys(one.cell.after for one in report.outcomes if one.cell.design == design))


def _table(report: Report, designs: list[str]) -> Table:
    cells = {one.cell: one for one in report.outcomes}
    rows: dict[tuple[str, str], dict[str, Text]] = {}
    for cell, outcome in cells.items():
        if cell.design in designs:
            row = rows.setdefault((cell.kind, cell.name), {})
            row.setdefault(cell.design, Text()).append_text(_mark(outcome))
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for design in designs:
        table.add_column(design, no_wrap=True)
    last = ""
    for (kind, name), marks in rows.items():
        if last and kind != last:
            table.add_section()
        last = kind
        table.add_row(name, *(marks.get(design, Text()) for design in designs))
    return table


def _mark(outcome: Outcome) -> Text:
    mark, style = MARKS[outcome.verdict]
    return Text(mark, style)


def show(report: Report, console: Console) -> None:
    """Prints tables, legend, what fails the run, and the sentence of each design."""
    console.print(Group(*tables(report, console.width)))
    moves = [
        move or BOOT for move in dict.fromkeys(one.cell.after for one in report.outcomes if one.cell.kind == "attack")
    ]
    console.print(legend())
    if moves:
        console.print(Text("marks of an attack, from the left: after " + ", ".join(moves), style="dim"))
    for one in report.unexplained[:SHOWN]:
        console.print(Text.assemble(_mark(one), f" {one.cell}: ", (one.verdict.value, MARKS[one.verdict][1])))
        for line in [str(one.evidence), *(f"{broken.name}: {broken}" for broken in one.broken)]:
            console.print(Text(f"    {line}", style="dim"))
    if len(report.unexplained) > SHOWN:
        console.print(f"… and {len(report.unexplained) - SHOWN} more")
    for design in report.designs:
        console.print(Text(report.sentence(design), style="bold" if design == DESIGN else ""))
