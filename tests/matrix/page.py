"""The run as one HTML page that needs nothing else: the grid, and behind each cell what its verdict rests on.

page.html, page.css and page.js are the page; this module gives it its data, each text once, compressed.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from importlib.resources import files
from typing import Any

from vtlab_attacks.campaign import DESIGN
from vtlab_attacks.evidence import Attack, Transition
from vtlab_matrix.cells import BOOT, EVERY_ATTACK, EVERY_TRANSITION, Verdict
from vtlab_matrix.outcome import Observation, Outcome
from vtlab_matrix.report import PAGE, Report
from vtlab_matrix.terminal import MARKS

CLASSES = {verdict: verdict.value.lower() for verdict in Verdict}


class _Texts:
    """Each text once; numbers stand for them."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        number = self._numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number


def page(report: Report) -> str:
    """The document."""
    folder = files("vtlab_matrix")
    parts = {name: folder.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    packed = base64.b64encode(zlib.compress(json.dumps(_data(report), ensure_ascii=False).encode(), 9)).decode()
    replacements = {
        "/*CSS*/": parts["css"],
        "/*JS*/": parts["js"],
        "<!--SUMMARY-->": "\n".join(_card(report, design) for design in report.designs),
        "<!--SUBTITLE-->": html.escape(_subtitle(report)),
        "DATA": packed,
    }
    document = parts["html"]
    for mark, content in replacements.items():
        document = document.replace(mark, content, 1)
    return document


def _subtitle(report: Report) -> str:
    attacks = {one.cell.name for one in report.outcomes if one.cell.kind == "attack"}
    moves = {one.cell.after or BOOT for one in report.outcomes if one.cell.kind == "attack"}
    counts = ((len(attacks), "attack"), (len(moves), "moment"), (len(report.designs), "design"))
    sizes = " × ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)
    return (
        f"{sizes}: {len(report.outcomes)} cells, each on a fresh machine, in {report.seconds:.0f} s; seed {report.seed}"
    )


def _card(report: Report, design: str) -> str:
    """The line of a design: how its cells came out, as a bar and in words."""
    counts = report.counts(design)
    bar = "".join(
        f'<i class="{CLASSES[verdict]}" style="flex:{counts[verdict]}"></i>' for verdict in MARKS if counts[verdict]
    )
    words = "".join(
        f'<span class="{CLASSES[verdict]}{" none" if not counts[verdict] else ""}"><b>{mark}</b>{counts[verdict]} '
        f"{html.escape(verdict.value.lower().replace('-', ' '))}</span>"
        for verdict, (mark, _style) in MARKS.items()
    )
    name = html.escape(design)
    return f'<li data-design="{name}"><h2>{name}</h2><div class="bar">{bar}</div><p>{words}</p></li>'


def _data(report: Report) -> dict[str, Any]:
    text = _Texts()
    entries: dict[str, Attack | Transition] = {**EVERY_ATTACK, **EVERY_TRANSITION}
    used = {one.cell.name for one in report.outcomes} | {one.cell.after for one in report.outcomes}
    holes = {hole.id: hole for hole in report.explanations.values()}
    cells = [_cell(report, outcome, text) for outcome in report.outcomes]
    return {
        "promised": DESIGN,
        "boot": BOOT,
        "designs": report.designs,
        "marks": {verdict.value: [mark, CLASSES[verdict]] for verdict, (mark, _style) in MARKS.items()},
        "about": {name: [entry.sentence, entry.source] for name, entry in entries.items() if name in used},
        "holes": {name: [hole.text, hole.source, hole.cause, f"{PAGE}#{hole.page}"] for name, hole in holes.items()},
        "cells": cells,
        "texts": text.texts,
    }


def _cell(report: Report, outcome: Outcome, text: _Texts) -> dict[str, Any]:
    cell = outcome.cell
    hole = report.explanations.get(cell)
    told: dict[str, Any] = {
        "d": cell.design,
        "n": cell.name if cell.kind == "attack" else "",
        "a": (cell.after or BOOT) if cell.kind == "attack" else cell.name,
        "v": outcome.verdict.value,
        "e": _observation(outcome.evidence, text),
        "s": round(outcome.seconds, 3),
        "t": [[line.at, text(line.kind), line.vtl, line.vp, text(line.text), line.times] for line in outcome.timeline],
        "l": [text(line) for line in outcome.log.splitlines()],
    }
    if outcome.transition:
        told["m"] = _observation(outcome.transition, text)
    if outcome.broken:
        told["b"] = [[text(one.name), *_observation(one, text)] for one in outcome.broken]
    if outcome.rules:
        told["r"] = [text(rule) for rule in outcome.rules]
    if hole:
        told["h"] = hole.id
    if cell.kind == "transition":
        told["k"] = outcome.kept
    return told


def _observation(one: Observation, text: _Texts) -> list[int]:
    return [text(part) for part in (one.what, one.before, one.after, one.denial, one.error)]
