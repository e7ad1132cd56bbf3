"""How a campaign of attacks is told: as lines for people, with a progress bar on a terminal, or as JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vmm.cli.output import print_json
from vtlab.v1 import monitor_pb2
from vtlab_attacks.campaign import DESIGN, Result, Summary
from vtlab_attacks.evidence import Attack, Control, Evidence, Outcome

ROLES = {
    "guest": ("vtl0_guest", "VTL0: the processor of a hostile kernel"),
    "vmm": ("vmm", "the machine: memory, devices, messages; makes no policy"),
    "monitor": ("vtl1_monitor", "VTL1: the policy, the keys, memory that VTL0 has not even open"),
}
OUTCOMES = {Outcome.SUCCEEDED: "SUCCEEDED", Outcome.BLOCKED: "BLOCKED", Outcome.UNCLEAR: "UNCLEAR"}

SHOWN_VERDICTS = 2  # of one attack


class Teller(Protocol):
    """Gets what happens, in the order in which it happens."""

    def processes(self, pids: dict[str, int]) -> None: ...
    def boot_log(self, lines: Sequence[str], design: str) -> None: ...
    def policy(self, status: monitor_pb2.PolicyStatus) -> None: ...
    def begin(self, total: int) -> None: ...
    def results(self, results: Sequence[Result]) -> None: ...
    def end(self) -> None: ...
    def summary(self, summary: Summary, seconds: float) -> None: ...


class JsonTeller:
    """One JSON value a line, `kind` first."""

    def processes(self, pids: dict[str, int]) -> None:
        print_json({"kind": "processes", "pids": pids})

    def boot_log(self, lines: Sequence[str], design: str) -> None:
        print_json({"kind": "boot", "design": design, "lines": list(lines)})

    def policy(self, status: monitor_pb2.PolicyStatus) -> None:
        measurements = [
            {
                "name": one.name,
                "gpa": one.gpa,
                "size": one.size,
                "sha256": one.sha256.hex(),
                "matches": one.matches_image,
            }
            for one in status.measurements
        ]
        record = {"kind": "policy", "sha256": status.sha256.hex(), "locked": status.locked}
        print_json(record | {"measurements": measurements})

    def begin(self, total: int) -> None:
        """Nothing: each result says all."""

    def results(self, results: Sequence[Result]) -> None:
        for result in results:
            print_json(_record(result))

    def end(self) -> None:
        """Nothing was begun."""

    def summary(self, summary: Summary, seconds: float) -> None:
        record = {
            "kind": "summary",
            "attacks": summary.attacks,
            "blocked": summary.blocked,
            "succeeded": summary.succeeded,
            "controls": summary.controls,
            "kept": summary.kept,
            "unprotected_succeeded": summary.unprotected_succeeded,
            "impossible_unprotected": summary.named,
            "passed": summary.passed,
            "seconds": round(seconds, 3),
        }
        print_json(record)


def _record(result: Result) -> dict[str, Any]:
    entry, evidence = result.entry, result.evidence
    record: dict[str, Any] = {
        "kind": "control" if isinstance(entry, Control) else "attack",
        "name": entry.name,
        "sentence": entry.sentence,
        "protected": result.protected,
        "design": result.design,
        "as_expected": result.as_expected,
        "seconds": round(result.seconds, 3),
    }
    if isinstance(entry, Attack):
        record |= {"source": entry.source, "impossible_unprotected": entry.impossible_unprotected}
        record["outcome"] = evidence.outcome.value if evidence else "error"
    if evidence is None:
        return record | {"error": result.error}
    return record | {
        "state": evidence.what,
        "before": evidence.before,
        "after": evidence.after,
        "reached": evidence.reached,
        "intact": evidence.intact,
        "denial": evidence.denial,
        "verdicts": list(result.verdicts),
    }


class ConsoleTeller:
    """Lines on standard output; on a terminal in colour, with a progress bar at the foot."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def processes(self, pids: dict[str, int]) -> None:
        rows = [(name, f"pid {pids[role]}" if role in pids else "remote", what) for role, (name, what) in ROLES.items()]
        if not self._console.is_terminal:
            for name, where, what in rows:
                self._line(f"{name:<14}{where:<12}{what}")
            return
        table = Table.grid(padding=(0, 2))
        for name, where, what in rows:
            table.add_row(f"[bold]{name}[/]", where, what)
        self._console.print(Panel(table, title="three processes", title_align="left", expand=False))

    def boot_log(self, lines: Sequence[str], design: str) -> None:
        if design == DESIGN:
            self._line("\nThe guest deprivileges itself, and VTL1 comes to life:")
        else:
            self._line(f"\nThe guest protects itself by design {design}:")
        for line in lines:
            told = escape(line)
            self._line(f"  [dim]COM1[/]  [bold cyan]{told}[/]" if "VTL1" in line else f"  [dim]COM1[/]  {told}")

    def policy(self, status: monitor_pb2.PolicyStatus) -> None:
        source = monitor_pb2.PolicySource.Name(status.source).removeprefix("POLICY_SOURCE_").lower()
        locked = "locked" if status.locked else "[bold red]not locked[/]"
        self._line(f"\nVTL1 holds the {source}'s policy, {locked}: SHA-256 [bold]{status.sha256.hex()}[/]")
        for one in status.measurements:
            same = "[green]as in the image[/]" if one.matches_image else "[bold red]not as in the image[/]"
            place = f"{one.size:>6} bytes at {one.gpa:#x}"
            self._line(f"  [dim]measured[/]  {escape(one.name):<26}{place}  {one.sha256.hex()[:16]}…  {same}")

    def begin(self, total: int) -> None:
        self._line("")
        self._progress.add_task("", total=total)
        if self._console.is_terminal:
            self._live = Live(self._progress, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()

    def results(self, results: Sequence[Result]) -> None:
        entry = results[0].entry
        mark = "[green]✔[/]" if all(result.as_expected for result in results) else "[bold red]✘[/]"
        self._line(f"{mark} [bold]{entry.name}[/]  {escape(entry.sentence)}")
        for result in results:
            self._line(_side(result))
            for verdict in result.verdicts[:SHOWN_VERDICTS]:
                who = "rule of VTL1" if result.design == DESIGN else result.design
                self._line(f"    [dim]{who:<24} {escape(verdict)}[/]")
        if isinstance(entry, Attack) and entry.impossible_unprotected and not all(r.protected for r in results):
            self._line(f"    [dim]impossible without VTL1 too: {escape(entry.impossible_unprotected)}[/]")
        self._progress.update(self._progress.task_ids[0], advance=1, description=entry.name)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self, summary: Summary, seconds: float) -> None:
        self._line(f"\n{seconds:.1f} s")
        self._console.file.flush()
        sys.stdout.write(f"demo: {summary}\n")
        sys.stdout.flush()


def _side(result: Result) -> str:
    """One line: with or without VTL1, what came of it, the state before and after, the fault."""
    design = "VTL1" if result.design == DESIGN else result.design
    side = f"with {design}   " if result.protected else f"without {design}"
    evidence = result.evidence
    if evidence is None:
        return f"    {side}  [bold red]ERROR[/]      {escape(result.error)}"
    if isinstance(result.entry, Control):
        word = "KEPT" if evidence.kept else "BROKEN"
    else:
        word = OUTCOMES[evidence.outcome]
    colour = "bold red" if not result.as_expected else "yellow" if word == "SUCCEEDED" else "green"
    denial = f"   [magenta]{escape(evidence.denial)}[/]" if evidence.denial else ""
    return f"    {side}  [{colour}]{word:<9}[/]  {_story(evidence)}{denial}"


def _story(evidence: Evidence) -> str:
    """ "CR0.WP: 1 → 1"."""
    return f"{escape(evidence.what)}: {escape(evidence.before)} → {escape(evidence.after)}"
