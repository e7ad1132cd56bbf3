"""Sequence diagrams of transitions under VTL1, from what the machines did: docs/lifecycle.md has them.

A diagram tells who did what in which order. Times, addresses and counts are left out, so that it changes when the
order of events does and not otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vtlab.errors import BadArgument
from vtlab_matrix.cells import EVERY_TRANSITION
from vtlab_matrix.outcome import Outcome
from vtlab_matrix.timeline import LEFT_OUT, Line

BEGIN = "<!-- recorded runs, written by `make lifecycle` -->"
END = "<!-- end of recorded runs -->"

GUEST, VMM, MONITOR = "VTL0", "vmm", "VTL1"
# Numbers that differ from run to run.
_NUMBERS = re.compile(r"\b0x[0-9a-f]{5,}\b|\b\d{3,}\b")
_PLACE = re.compile(r" at [\w+.]+$")


def steps(timeline: Iterable[Line]) -> list[str]:
    """Lines of a diagram: of the part that the transition is, the same again once."""
    told: list[str] = []
    part = 0
    for line in timeline:
        if line.kind == "mark" and line.text.endswith(LEFT_OUT):
            continue
        if line.kind == "mark":
            part += 1
            if part == 2:
                break
            continue
        step = _step(line)
        if step:
            told.append(step)
    return _folded(told)


def _folded(told: list[str]) -> list[str]:
    """What follows itself, alone or with up to three others, becomes a loop."""
    for size in range(1, 5):
        at, folded = 0, []
        while at < len(told):
            group = told[at : at + size]
            times = 1
            while len(group) == size and told[at + times * size : at + (times + 1) * size] == group:
                times += 1
            if times > 1:
                folded += group if size == 1 else ["loop", *(f"    {one}" for one in group), "end"]
            else:
                folded.append(told[at])
            at += times * size if times > 1 else 1
        told = folded
    return told


def _step(line: Line) -> str:
    """One arrow or note; nothing for what other lines tell."""
    text = _PLACE.sub("", line.text)
    who = f"{GUEST}{f' cpu {line.vp}' if line.vp else ''}"
    if line.kind == "exit" and not line.vtl:
        return "" if text.startswith(_TOLD_ELSEWHERE) else f"{who}->>{VMM}: {_plain(text)}"
    if line.kind == "vtl":
        if text.startswith("call "):
            return f"{who}->>{MONITOR}: {_plain(text.removeprefix('call '))}"
        if text.startswith("return "):
            return f"{MONITOR}-->>{who}: {_plain(text)}"
        return f"Note over {VMM}: {_plain(text)}"
    if line.kind == "verdict":
        return f"{MONITOR}-->>{VMM}: {_plain(text.replace('(', '').partition(':')[0])}"
    if line.kind == "protection":
        return f"{MONITOR}->>{VMM}: pages {_plain(text.partition(' pages ')[2])}"
    if line.kind == "state":
        return f"Note over {VMM}: machine {_plain(text)}"
    if line.kind == "device":
        return f"Note over {VMM}: {_plain(text)}"
    return ""


# Reads of the processor and of ports say nothing of the order of things; a VTL call is told by its own event.
_TOLD_ELSEWHERE = ("CPUID", "RDMSR", "WRMSR", "IN ", "OUT ", "kicked", "hypercall VTL_CALL", "interrupt", "halt")


def _plain(text: str) -> str:
    """Without what Mermaid would read as its own, and without numbers that differ from run to run."""
    return _NUMBERS.sub("…", text).replace(";", ",").replace("#", "").strip()


def diagram(outcome: Outcome) -> str:
    """The Mermaid source of one transition; where order says nothing, each step once, by its text."""
    who = [GUEST, VMM, MONITOR]
    lines = ["sequenceDiagram", *(f"    participant {one}" for one in who)]
    told = steps(outcome.timeline)
    if EVERY_TRANSITION[outcome.cell.name].interrupted:
        told = sorted({step.strip() for step in told} - {"loop", "end"})
    return "\n".join([*lines, *(f"    {step}" for step in told)])


def section(outcomes: Sequence[Outcome]) -> str:
    """All diagrams as a part of a document; transitions that go alike share one."""
    order = list(EVERY_TRANSITION)
    together: dict[str, list[str]] = {}
    for outcome in sorted(outcomes, key=lambda one: order.index(one.cell.name)):
        together.setdefault(diagram(outcome), []).append(outcome.cell.name)
    parts = [BEGIN]
    for source, names in together.items():
        title = ", ".join(f"`{name}`" for name in names)
        parts.append(f"\n### {title}\n\n{EVERY_TRANSITION[names[0]].sentence}.\n\n```mermaid\n{source}\n```")
    return "\n".join([*parts, "", END])


def replace_section(document: Path, written: str) -> None:
    """Puts the diagrams where the document has its marks. Raises BadArgument if it lacks them."""
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BadArgument(str(document), f"has no marks {BEGIN!r} and {END!r}")
    document.write_text(before + written + after, encoding="utf-8")


def recorded(document: str) -> dict[str, str]:
    """Diagrams of a document by the names of their transitions."""
    found: dict[str, str] = {}
    for title, source in re.findall(r"^### ([^\n]*)\n\n.*?```mermaid\n(.*?)\n```", document, re.MULTILINE | re.DOTALL):
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", title), source)
    return found
