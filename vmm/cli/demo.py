"""`vtlab demo` and `vtlab attack`: real attacks on a real guest, without VTL1 and with it, told by the machine's state.

The campaign itself is vtlab_attacks.campaign; here is only how it is told: to a terminal, in plain lines, or as JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from vmm.launcher import LocalLab
from vtlab.client import Lab
from vtlab.errors import BadArgument
from vtlab_attacks.campaign import Result, Summary, run_all
from vtlab_attacks.evidence import Attack, Control, Evidence, Outcome
from vtlab_attacks.guest import boot
from vtlab_attacks.table import ATTACKS, CONTROLS

ROLES = {
    "guest": ("vtl0_guest", "VTL0: the processor of a hostile kernel"),
    "vmm": ("vmm", "the machine: memory, devices, messages; no policy"),
    "monitor": ("vtl1_monitor", "VTL1: the policy, the keys, its private memory"),
}
OUTCOMES = {Outcome.SUCCEEDED: "SUCCEEDED", Outcome.BLOCKED: "BLOCKED", Outcome.UNCLEAR: "NO EVIDENCE"}


def select(names: Sequence[str]) -> list[Attack | Control]:
    """Attacks and controls by name; none named means none. Raises BadArgument for an unknown one."""
    known: dict[str, Attack | Control] = {entry.name: entry for entry in [*ATTACKS, *CONTROLS]}
    for name in names:
        if name not in known:
            raise BadArgument(f"attack {name!r}", f"is none of {', '.join(known)}")
    return [known[name] for name in names]


# ------------------------------------------------------------------------------------------------------- as data


def evidence_record(evidence: Evidence | None) -> dict[str, Any] | None:
    if evidence is None:
        return None
    return {
        "state": evidence.what,
        "before": evidence.before,
        "after": evidence.after,
        "changed": evidence.changed,
        "denial": evidence.denial,
    }


def result_record(result: Result) -> dict[str, Any]:
    """One result for --json."""
    entry, evidence = result.entry, result.evidence
    record: dict[str, Any] = {
        "kind": "control" if isinstance(entry, Control) else "attack",
        "name": entry.name,
        "sentence": entry.sentence,
        "protected": result.protected,
        "as_expected": result.as_expected,
        "evidence": evidence_record(evidence),
        "error": result.error,
        "seconds": round(result.seconds, 3),
    }
    if isinstance(entry, Attack):
        record |= {
            "source": entry.source,
            "outcome": evidence.outcome.value if evidence else "error",
            "impossible_unprotected": entry.impossible_unprotected,
        }
    return record


def summary_record(summary: Summary) -> dict[str, Any]:
    return {
        "attacks": summary.attacks,
        "blocked": summary.blocked,
        "succeeded": summary.succeeded,
        "controls": summary.controls,
        "kept": summary.kept,
        "unprotected_succeeded": summary.unprotected_succeeded,
        "impossible_unprotected": summary.named,
        "passed": summary.passed,
    }


# ------------------------------------------------------------------------------------------------------ as lines


def processes_table(lab: Lab) -> Table:
    """Who is who, with process numbers where the laboratory is this machine's own."""
    table = Table.grid(padding=(0, 2))
    pids = lab.pids if isinstance(lab, LocalLab) else {}
    for role, (name, what) in ROLES.items():
        where = f"pid {pids[role]}" if role in pids else "remote"
        table.add_row(f"[bold]{name}[/]", where, what)
    return table


def story(evidence: Evidence) -> str:
    """ "CR0.WP: 1 → 1"."""
    return f"{escape(evidence.what)}: {escape(evidence.before)} → {escape(evidence.after)}"


def result_line(result: Result) -> str:
    """One line of a result's evidence, in rich's markup."""
    if isinstance(result.entry, Control):
        side = "with VTL1   "
    else:
        side = "with VTL1   " if result.protected else "without VTL1"
    if result.evidence is None:
        return f"    {side}  [bold red]ERROR[/] {escape(result.error)}"
    evidence = result.evidence
    if isinstance(result.entry, Control):
        word = "KEPT" if evidence.kept else "BROKEN"
    else:
        word = OUTCOMES[evidence.outcome]
    colour = "green" if result.as_expected else "bold red"
    if word == "SUCCEEDED" and result.as_expected:
        colour = "yellow"
    denial = f"  [dim]{escape(evidence.denial)}[/]" if evidence.denial else ""
    return f"    {side}  [{colour}]{word:<9}[/] {story(evidence)}{denial}"


def tell(console: Console, results: Sequence[Result]) -> None:
    """All lines about one attack or control."""
    entry = results[0].entry
    mark = "[green]✔[/]" if all(result.as_expected for result in results) else "[bold red]✘[/]"
    console.print(f"{mark} [bold]{entry.name}[/]  {escape(entry.sentence)}", highlight=False, soft_wrap=True)
    for result in results:
        console.print(result_line(result), highlight=False, soft_wrap=True)
    if isinstance(entry, Attack) and entry.impossible_unprotected:
        console.print(
            f"    [dim]impossible without VTL1 too: {escape(entry.impossible_unprotected)}[/]", soft_wrap=True
        )


def tell_deprivileging(console: Console, lab: Lab) -> dict[str, Any]:
    """Boots one guest and shows VTL1 coming to life: the guest's own log, then what the monitor measured."""
    with boot(lab, protected=True) as guest:
        for line in guest.machine.serial(0).splitlines():
            console.print(f"  [dim]COM1[/] {escape(line)}", highlight=False, soft_wrap=True)
        status = lab.policy.get(guest.machine)
        digest = status.sha256.hex()
        locked = "locked" if status.locked else "[bold red]not locked[/]"
        console.print(f"  policy from the guest, {locked}, SHA-256 [bold]{digest}[/]", highlight=False, soft_wrap=True)
        for measurement in status.measurements:
            same = "as in the image" if measurement.matches_image else "written at boot"
            console.print(
                f"  [dim]measured[/] {escape(measurement.name):<18} {measurement.size:>7} bytes at "
                f"{measurement.gpa:#x}  {measurement.sha256.hex()[:16]}…  {same}",
                highlight=False,
                soft_wrap=True,
            )
    return {"policy_sha256": digest, "locked": status.locked}


def _progress(console: Console, total: int) -> tuple[Progress, Any]:
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    return progress, progress.add_task("attacking", total=total)


def run_campaign(lab: Lab, console: Console, attacks: Sequence[Attack], controls: Sequence[Control]) -> list[Result]:
    """Runs and tells them all; the progress bar stays at the foot of a terminal and is absent elsewhere."""
    told: list[Result] = []
    progress, task = _progress(console, len(attacks) + len(controls))
    live = Live(progress, console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
    try:
        if live:
            live.start()
        for results in run_all(lab, attacks, controls):
            tell(console, results)
            told += results
            progress.update(task, advance=1, description=results[-1].entry.name)
    finally:
        if live:
            live.stop()
    return told


def _summarize(results: Sequence[Result]) -> Summary:
    summary = Summary()
    for result in results:
        summary = summary.add(result)
    return summary


def demo(lab: Lab, json_output: bool = False, console: Console | None = None) -> int:
    """The whole story; 0 if every attack was blocked and every control kept, else 1.

    Args:
        lab: where to run it.
        json_output: one document on standard output and nothing else.
        console: where lines go; standard output if None.
    """
    started = time.monotonic()
    console = Console(quiet=True) if json_output else (console or Console())
    if console.is_terminal:
        console.print(Panel(processes_table(lab), title="three processes", expand=False))
    else:
        console.print(processes_table(lab))
    console.print("\nThe guest deprivileges itself; VTL1 comes to life:", highlight=False)
    measured = tell_deprivileging(console, lab)
    console.print(f"\n{len(ATTACKS)} attacks, {len(CONTROLS)} legitimate operations:\n", highlight=False)
    results = run_campaign(lab, console, ATTACKS, CONTROLS)
    summary = _summarize(results)
    seconds = time.monotonic() - started
    if json_output:
        document = {
            "processes": lab.pids if isinstance(lab, LocalLab) else {},
            **measured,
            "results": [result_record(result) for result in results],
            "summary": summary_record(summary),
            "seconds": round(seconds, 3),
        }
        print(json.dumps(document, indent=2))
    else:
        console.print(f"\n{seconds:.1f} s", highlight=False)
        print(f"demo: {summary}", flush=True)
    return 0 if summary.passed else 1


def attack(lab: Lab, names: Sequence[str], json_output: bool = False, console: Console | None = None) -> int:
    """Runs the named attacks and controls; 0 if each came out as it should, else 1. Raises BadArgument."""
    entries = select(names)
    console = Console(quiet=True) if json_output else (console or Console())
    attacks = [entry for entry in entries if isinstance(entry, Attack)]
    controls = [entry for entry in entries if isinstance(entry, Control)]
    results = run_campaign(lab, console, attacks, controls)
    if json_output:
        print(json.dumps([result_record(result) for result in results], indent=2))
    return 0 if all(result.as_expected for result in results) else 1


def listing(console: Console, json_output: bool = False) -> None:
    """`vtlab attack` without a name: what there is."""
    if json_output:
        records = [{"name": entry.name, "sentence": entry.sentence} for entry in [*ATTACKS, *CONTROLS]]
        print(json.dumps(records, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("attack", "what it does", "described by"):
        table.add_column(heading)
    for entry in ATTACKS:
        table.add_row(entry.name, entry.sentence, entry.source)
    table.add_section()
    for control in CONTROLS:
        table.add_row(control.name, control.sentence, "[dim]legitimate[/]")
    console.print(table)
